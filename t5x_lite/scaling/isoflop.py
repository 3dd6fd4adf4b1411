"""Chinchilla's approach 2: the best size of each compute budget, and how it grows with compute.

Runs of one budget trace the loss against size; the minimum of a curve through them is the budget's
best size, and a line through those in logarithms is N_opt = G · C^a (Hoffmann et al. 2022, §3.2).
The minimum of a parabola is biased where the grid isn't centred on it or α differs from β.
"""

import dataclasses

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling.laws import Columns

_SAME_BUDGET = 0.05  # runs within 5% of each other's FLOPs
_FEWEST = {"parabola": 4, "akima": 5}  # points of a curve, one more than fix it


@dataclasses.dataclass(frozen=True)
class Minimum:
    """A budget's best size.

    Attributes:
      c: FLOPs, the geometric mean of its runs.
      runs: how many they are.
      n: the best number of parameters, or None.
      loss: the curve's loss there.
      refused: why there is none.
    """

    c: float
    runs: int
    n: float | None = None
    loss: float | None = None
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """N_opt = scale · C^exponent, from the minima that were found.

    Attributes:
      curve: "parabola" in log N, or "akima".
      exponent: a; the tokens' is 1 − a where C = 6ND.
      scale: G.
      minima: of every budget, refused ones too.
      samples: exponents of bootstraps over runs.
    """

    curve: str
    exponent: float
    scale: float
    minima: tuple[Minimum, ...]
    samples: np.ndarray

    def optimum(self, c: float) -> float:
        """The best number of parameters at `c` FLOPs."""
        return self.scale * c**self.exponent


def fit(
    columns: Columns, curve: str = "parabola", *, bootstraps: int = 0, seed: int = 0
) -> IsoFlop:
    """The line through the budgets' minima.

    Args:
      columns: "n", "c" and "loss".
      curve: "parabola" (least squares, in log N) or "akima" (through every point).
      bootstraps: draws of each budget's runs with replacement.
      seed: of the draws.

    Raises:
      UserError: fewer than two budgets have a minimum inside their runs.
    """
    log_n, log_c = np.log(columns["n"]), np.log(columns["c"])
    loss = np.asarray(columns["loss"], float)
    budgets = _budgets(log_c)
    minima = tuple(_minimum(log_n[b], loss[b], float(np.mean(log_c[b])), curve) for b in budgets)
    found = [m for m in minima if m.n is not None]
    if len(found) < 2:
        why = "; ".join(sorted({m.refused for m in minima if m.refused}))
        raise UserError(
            f"{len(found)} of {len(minima)} budgets have a minimum, and a line needs 2 ({why})."
        )
    exponent, intercept = _line(found)
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(bootstraps):
        drawn = [rng.choice(b, len(b)) for b in budgets]
        again = [_minimum(log_n[b], loss[b], float(np.mean(log_c[b])), curve) for b in drawn]
        again = [m for m in again if m.n is not None]
        samples.append(_line(again)[0] if len(again) > 1 else np.nan)
    return IsoFlop(curve, exponent, float(np.exp(intercept)), minima, np.array(samples))


def _budgets(log_c: np.ndarray) -> list[np.ndarray]:
    """Indices of the runs of each budget, by rising FLOPs."""
    order = np.argsort(log_c, kind="stable")
    cuts = np.flatnonzero(np.diff(log_c[order]) > np.log1p(_SAME_BUDGET)) + 1
    return np.split(order, cuts)


def _minimum(log_n, loss, log_c, curve) -> Minimum:
    c, runs = float(np.exp(log_c)), len(loss)
    sizes, inverse = np.unique(log_n, return_inverse=True)
    if len(sizes) < _FEWEST[curve]:
        return Minimum(c, runs, refused=f"fewer than {_FEWEST[curve]} sizes")
    if curve == "parabola":
        middle = sizes.mean()
        bend, slope, height = np.polyfit(log_n - middle, loss, 2)
        if bend <= 0:
            return Minimum(c, runs, refused="the parabola has no minimum")
        best = middle - slope / (2 * bend)
        low = height - slope**2 / (4 * bend)
    else:
        from scipy.interpolate import Akima1DInterpolator

        means = np.bincount(inverse, loss) / np.bincount(inverse)
        fine = np.linspace(sizes[0], sizes[-1], 2001)
        values = Akima1DInterpolator(sizes, means)(fine)
        best, low = fine[np.argmin(values)], values.min()
    if not sizes[0] < best < sizes[-1]:
        return Minimum(c, runs, refused="the minimum lies at the edge of the sizes")
    return Minimum(c, runs, float(np.exp(best)), float(low))


def _line(minima) -> tuple[float, float]:
    """Slope and intercept of log N_opt against log C."""
    c, n = (np.log([getattr(m, name) for m in minima]) for name in ("c", "n"))
    slope, intercept = np.polyfit(c, n, 1)
    return float(slope), float(intercept)
