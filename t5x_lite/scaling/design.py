"""Grids of runs for a scaling law: which sizes, for how many tokens, and what they cost."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.scaling import rates

CLOSE = 0.01  # of its budget: how far a run's FLOPs may be from it


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run that is wanted: its size, and its tokens or its FLOPs, whichever is given."""

    n: float
    d: float | None = None
    c: float | None = None


@dataclasses.dataclass(frozen=True)
class Law:
    """E + A/N^α + B/D^β, assumed before anything is measured.

    The default is Chinchilla's, as its points are fitted (`docs/scaling.md`).
    """

    E: float = 1.817
    A: float = 477.8
    B: float = 2143.0
    alpha: float = 0.3473
    beta: float = 0.3672

    def loss(self, n: Any, d: Any) -> Any:
        """Of N parameters and D tokens."""
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def best_size(self, c: float) -> float:
        """N that minimises the loss under C = 6ND (Hoffmann et al. 2022, §3.3, eq. 4)."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        total = self.alpha + self.beta
        return ratio ** (1 / total) * (c / 6) ** (self.beta / total)


def isoflop(budgets: Sequence[float], sizes: int, span: float, centre: Callable[[float], float]):
    """Hoffmann et al. 2022, §3.2: for each budget, sizes around the best one.

    Args:
      budgets: FLOPs.
      sizes: how many for each.
      span: the largest over the best, and the best over the smallest; sizes are even in log N.
      centre: the best size of a budget, as far as is known.
    """
    if sizes < 4:
        raise UserError(f"sizes={sizes}: a parabola through a budget's sizes needs at least 4.")
    return [Cell(centre(c) * span ** (2 * k / (sizes - 1) - 1), c=c)
            for c in budgets for k in range(sizes)]  # fmt: skip


def kaplan(sizes: Sequence[float], tokens: Sequence[float]) -> list[Cell]:
    """Kaplan et al. 2020, §4: every size with every number of tokens, each a run of its own."""
    return [Cell(n, d=d) for n in sizes for d in tokens]


def envelope(sizes: Sequence[float], longest: float, horizons: int = 4) -> list[Cell]:
    """Hoffmann et al. 2022, §3.1: every size for several horizons, each twice the one before.

    Args:
      sizes: parameters.
      longest: tokens per parameter of the longest run.
      horizons: how many; their curves are points too.
    """
    return [Cell(n, d=n * longest / 2**k) for n in sizes for k in reversed(range(horizons))]


def spaced(low: float, high: float, count: int) -> list[float]:
    """Numbers from low to high, even in their logarithm."""
    if not 0 < low <= high or count < 1 or (count == 1 and low != high):
        raise UserError(
            f"{low:g} to {high:g} in {count}: give LOW:HIGH:COUNT, such as 1e18:1e20:5."
        )
    if count == 1:
        return [low]
    return [low * (high / low) ** (k / (count - 1)) for k in range(count)]


# --- cells as runs -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """A shape with what is counted of it: gin values, parameters by compute, all parameters."""

    values: Mapping[str, Any]
    n: float
    n_total: int
    row_tokens: int  # positions of a row, on both sides
    row_flops: float | int  # training FLOPs of a row


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of a grid, ready to be written as a point of a sweep."""

    values: dict[str, Any]
    n: float
    d: float
    c: float


def realise(
    cells: Sequence[Cell],
    shapes: Sequence[Measured],
    *,
    law: str,
    length: int,
    batch_tokens: float | None = None,
    batch_size: int = 1,
    rate_factor: float = 1.0,
    cool_down: float | None = None,
) -> list[Planned]:
    """Runs of the shapes that are nearest to the cells, each once.

    Args:
      cells: what is wanted.
      shapes: what there is.
      law: of rates and batches, as in `rates.settings`.
      length: LENGTH.
      batch_tokens: instead of the law's.
      batch_size: rows, where neither says anything.
      rate_factor: times the law's rate.
      cool_down: share of the steps at the end in which a trunk's runs decay.

    Raises:
      UserError: no number of steps comes within 1% of a budget.
    """
    planned: dict[tuple, Planned] = {}
    for cell in cells:
        shape = min(shapes, key=lambda s: abs(math.log(s.n / cell.n)))
        d = cell.d if cell.d is not None else cell.c / (6 * shape.n)
        found = rates.settings(law, shape.n, d, 6 * shape.n * d)
        wanted = batch_tokens or found.batch_tokens
        scale = length / shape.row_tokens  # laws count tokens, rows have those of both sides
        rows = batch_size if wanted is None else rates.rows(wanted * scale, length, d * scale)
        steps = max(1, round(d / (rows * shape.row_tokens)))
        c = steps * rows * shape.row_flops
        if cell.c is not None and abs(c / cell.c - 1) > CLOSE:
            _refuse(cell, shape, steps, rows, c)
        values = {
            **shape.values,
            "STEPS": steps,
            "BATCH_SIZE": rows,
            "LEARNING_RATE": float(f"{found.learning_rate * rate_factor:.3g}"),
        }
        if cool_down is not None:
            values["CHECKPOINT_PERIOD"] = max(1, steps - max(1, math.floor(cool_down * steps)))
        run = Planned(values, shape.n, float(steps * rows * shape.row_tokens), float(c))
        planned.setdefault(tuple(sorted(values.items())), run)
    return list(planned.values())


def _refuse(cell: Cell, shape: Measured, steps: int, rows: int, c: float) -> None:
    names = ", ".join(f"{name}={value}" for name, value in shape.values.items())
    raise UserError(
        f"no run comes within 1% of the budget of {cell.c:.3g} FLOPs: the nearest, {names}, has "
        f"{steps} steps of {rows} rows and {c:.3g} FLOPs, {abs(c / cell.c - 1):.1%} off; raise the "
        f"budget, or lower --batch_tokens or LENGTH."
    )


def check_budgets(cells: Sequence[Cell], shapes: Sequence[Measured]) -> None:
    """Refuses sizes that no shape comes near: then a grid isn't what it was tested as."""
    for cell in cells:
        nearest = min(shapes, key=lambda s: abs(math.log(s.n / cell.n)))
        if abs(math.log(nearest.n / cell.n)) > math.log(1.5):
            at = "" if cell.c is None else f" of the budget of {cell.c:.3g} FLOPs"
            raise UserError(
                f"no shape has about {cell.n:.3g} parameters{at}; the nearest has {nearest.n:.3g}: "
                f"change the budgets, --span, --head_dim or VOCAB_SIZE."
            )


# --- the gin file --------------------------------------------------------------------------------


def gin_text(
    name: str,
    head: Sequence[str],
    includes: Sequence[str],
    runs: Sequence[Planned],
    held_out: Sequence[Planned] = (),
    *,
    lines: Sequence[str] = (),
    seeds: int = 1,
    trunk: bool = False,
) -> str:
    """A sweep's file, which `sweep run` takes.

    Args:
      name: of the sweep.
      head: what it says of itself, lines of a comment.
      includes: gin files.
      runs: its points.
      held_out: points to predict.
      lines: more bindings.
      seeds: runs of each point, which differ in SEED.
      trunk: as in `Sweep`.
    """
    text = [*(f"# {line}".rstrip() for line in head)]
    text += [
        "from __gin__ import dynamic_registration",
        "",
        "from t5x_lite.scaling import sweep",
        "",
    ]
    text += [f"include '{path}'" for path in includes]
    text += ["", *lines, *([""] if lines else []), f"sweep.Sweep.name = {name!r}"]
    text += ["sweep.Sweep.points = [", *_points(runs), "]"]
    if held_out:
        text += ["sweep.Sweep.held_out = [", *_points(held_out), "]"]
    if seeds > 1:
        text.append(f"sweep.Sweep.axes = {{'SEED': {list(range(seeds))}}}")
    if trunk:
        text.append("sweep.Sweep.trunk = True")
    return "\n".join(text) + "\n"


def _points(runs: Sequence[Planned]) -> list[str]:
    return [f"    { ({'name': _name(run)} | run.values)!r}," for run in runs]


def _name(run: Planned) -> str:
    """`n74k-d9.8M-c4.3e12`: rounded, and told apart by all three."""
    from t5x_lite.scaling.watch import short

    c = f"{run.c:.2e}".replace("e+", "e")
    return f"n{short(run.n)}-d{short(run.d)}-c{c}"
