"""Chinchilla's approach 2: the best size of each compute budget, and how it grows with compute.

Runs of one budget trace the loss against size; the minimum of a curve through them is the budget's
best size, and a line through those in logarithms is N_opt = G · C^a (Hoffmann et al. 2022, §3.2).
The minimum of a parabola is biased where the grid isn't centred on it or α differs from β.
"""

import dataclasses

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import frontier
from t5x_lite.scaling.laws import Columns, Noise

_SAME_BUDGET = 0.05  # runs within 5% of each other's FLOPs
_SAME_SIZE = 0.05  # and within 5% of each other's parameters
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
      scales: G of the same bootstraps.
      lowest: E, F and gamma of the minima's losses, E + F/C^γ; NaN of fewer than four.
      lowest_samples: the same of the bootstraps.
      noisy: "a", "G", "E", "F" and "gamma" where the curves are true and the losses err.
    """

    curve: str
    exponent: float
    scale: float
    minima: tuple[Minimum, ...]
    samples: np.ndarray
    scales: np.ndarray
    lowest: dict[str, np.ndarray]
    lowest_samples: dict[str, np.ndarray]
    noisy: dict[str, np.ndarray]

    def optimum(self, c: float) -> float:
        """The best number of parameters at `c` FLOPs."""
        return self.scale * c**self.exponent


def fit(
    columns: Columns,
    curve: str = "parabola",
    *,
    bootstraps: int = 0,
    seed: int = 0,
    noise: Noise | None = None,
) -> IsoFlop:
    """The line through the budgets' minima.

    Args:
      columns: "n", "c" and "loss".
      curve: "parabola" (least squares, in log N) or "akima" (through every size).
      bootstraps: draws of each budget's runs with replacement.
      seed: of the draws.
      noise: the errors with which the curves' own losses are fitted again.

    Raises:
      UserError: fewer than two budgets have a minimum inside their runs.
    """
    log_n, log_c = np.log(columns["n"]), np.log(columns["c"])
    loss = np.asarray(columns["loss"], float)
    groups = budgets(log_c)

    def again(rows, losses):
        return [_minimum(log_n[b], losses[b], float(np.mean(log_c[b])), curve) for b in rows]

    found = minima(columns, curve)
    inside = sum(m.n is not None for m in found)
    if inside < 2:
        why = "; ".join(sorted({m.refused for m in found if m.refused}))
        raise UserError(
            f"{inside} of {len(found)} budgets have a minimum, and a line needs 2 ({why})."
        )
    one = _powers([found])
    rng = np.random.default_rng(seed)
    enough = [b for b in groups if len(b) >= _FEWEST[curve]]
    drawn = _powers(
        [again([rng.choice(b, len(b)) for b in enough], loss) for _ in range(bootstraps)]
    )
    noisy: dict[str, np.ndarray] = {}
    if noise is not None:
        exact, known = loss.copy(), np.zeros(len(loss), bool)
        for rows, minimum in zip(groups, found, strict=True):
            if minimum.n is not None:
                exact[rows], known[rows] = _smooth(log_n[rows], loss[rows], curve), True
        errors = noise(np.log(loss[known] / exact[known]))
        losses = np.repeat(exact[None], len(errors), 0)
        losses[:, known] *= np.exp(errors)
        noisy = _powers([again(enough, each) for each in losses])
    lowest, lowest_samples = (
        {name: values[name] for name in ("E", "F", "gamma")} for values in (one, drawn)
    )
    return IsoFlop(
        curve, float(one["a"][0]), float(one["G"][0]), tuple(found), drawn["a"], drawn["G"],
        lowest, lowest_samples, noisy,
    )  # fmt: skip


def minima(columns: Columns, curve: str) -> list[Minimum]:
    """Every budget's best size, by rising FLOPs."""
    log_n, log_c, loss = (*np.log([columns["n"], columns["c"]]), np.asarray(columns["loss"], float))
    return [_minimum(log_n[b], loss[b], float(np.mean(log_c[b])), curve) for b in budgets(log_c)]


def _powers(sets) -> dict[str, np.ndarray]:
    """Lines through the minima of each set, in logarithms, and their losses' power."""
    if not sets:
        return dict.fromkeys(("a", "G", "E", "F", "gamma"), np.zeros(0))
    absent = float("nan")
    rows = [[(m.c, m.n or absent, m.loss or absent) for m in minima] for minima in sets]
    c, n, loss = np.moveaxis(np.array(rows, float), 2, 0)
    slope, intercept = frontier.line(np.log(c), np.log(n))
    return {"a": slope, "G": np.exp(intercept)} | frontier.fit(np.log(c), loss)


def _smooth(log_n, loss, curve):
    """The curve's own losses at the sizes of its runs."""
    if curve == "parabola":
        middle = log_n.mean()
        return np.polyval(np.polyfit(log_n - middle, loss, 2), log_n - middle)
    return np.interp(log_n, *_by_size(log_n, loss))


def budgets(log_c: np.ndarray) -> list[np.ndarray]:
    """Indices of the runs of each budget, by rising FLOPs."""
    order = np.argsort(log_c, kind="stable")
    cuts = np.flatnonzero(np.diff(log_c[order]) > np.log1p(_SAME_BUDGET)) + 1
    return np.split(order, cuts)


def _minimum(log_n, loss, log_c, curve) -> Minimum:
    c, runs = float(np.exp(log_c)), len(loss)
    few = Minimum(c, runs, refused=f"fewer than {_FEWEST[curve]} sizes")
    if runs < _FEWEST[curve]:
        return few
    sizes, _ = _by_size(log_n, loss)
    if len(sizes) < _FEWEST[curve]:
        return few
    if curve == "parabola":
        middle = sizes.mean()
        bend, slope, height = np.polyfit(log_n - middle, loss, 2)
        if bend <= 0:
            return Minimum(c, runs, refused="the parabola has no minimum")
        best = middle - slope / (2 * bend)
        low = height - slope**2 / (4 * bend)
    else:
        fine, values = akima(log_n, loss)
        best, low = fine[np.argmin(values)], values.min()
    if not sizes[0] < best < sizes[-1]:
        return Minimum(c, runs, refused="the minimum lies at the edge of the sizes")
    return Minimum(c, runs, float(np.exp(best)), float(low))


def akima(log_n: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An Akima curve through every size of a budget: logarithms of sizes, and losses."""
    from scipy.interpolate import Akima1DInterpolator

    sizes, means = _by_size(log_n, loss)
    fine = np.linspace(sizes[0], sizes[-1], 2001)
    return fine, Akima1DInterpolator(sizes, means)(fine)


def _by_size(log_n: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean size and loss of each size's runs; between sizes that all but agree a curve swings."""
    order = np.argsort(log_n, kind="stable")
    size = np.append(0, np.cumsum(np.diff(log_n[order]) > np.log1p(_SAME_SIZE)))
    runs = np.bincount(size)
    return np.bincount(size, log_n[order]) / runs, np.bincount(size, loss[order]) / runs
