"""Trying a grid before it is run: how well a known law comes back from its runs under noise."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import design, isoflop, laws
from t5x_lite.scaling.design import Law, Planned


@dataclasses.dataclass(frozen=True)
class Recovered:
    """How a method's answers scatter around the truth.

    Attributes:
      method: "approach_3" or "approach_2_parabola".
      quantity: "exponent" a of N_opt ∝ C^a, "n" at the target, or "loss" of the target's best run.
      truth: of the assumed law.
      bias: of the median answer; relative, but of the exponent, whose is a difference.
      low: of the middle 95% of the answers.
      high: the same.
      failed: share of the trials without an answer.
    """

    method: str
    quantity: str
    truth: float
    bias: float
    low: float
    high: float
    failed: float


def recover(
    runs: Sequence[Planned],
    target: float,
    *,
    law: Law = Law(),  # noqa: B008 - frozen
    noise: float = 0.005,
    trials: int = 200,
    seed: int = 0,
) -> list[Recovered]:
    """Draws the grid's losses from the law, fits them, and compares what is found with the truth.

    Args:
      runs: the grid.
      target: FLOPs to predict for.
      law: the truth.
      noise: standard deviation of log L of a run; two seeds of one run differ by √2 of it.
      trials: how many draws.
      seed: of the draws.

    Raises:
      UserError: too few runs for any method.
    """
    n, d = (np.array([getattr(run, name) for run in runs]) for name in ("n", "d"))
    rng = np.random.default_rng(seed)
    answers: dict[tuple[str, str], list[float]] = {}
    for _ in range(trials):
        loss = law.loss(n, d) * np.exp(noise * rng.standard_normal(len(n)))
        columns = {"n": n, "d": d, "c": 6 * n * d, "loss": loss}
        for method, fit in _METHODS.items():
            for quantity, value in fit(columns, target).items():
                answers.setdefault((method, quantity), []).append(value)
    best = law.best_size(target)
    truth = {
        "exponent": law.beta / (law.alpha + law.beta),
        "n": best,
        "loss": law.loss(best, target / (6 * best)),
    }
    found = [_summary(*key, truth[key[1]], values) for key, values in answers.items()]
    if all(one.failed == 1 for one in found):
        raise UserError(f"no method can be fitted to these {len(n)} runs; add sizes or budgets.")
    return found


def _summary(method: str, quantity: str, truth: float, values: list[float]) -> Recovered:
    good = np.array(values)[np.isfinite(values)]
    failed = 1 - len(good) / len(values)
    if not len(good):
        return Recovered(method, quantity, truth, np.nan, np.nan, np.nan, failed)
    low, middle, high = np.percentile(good, [2.5, 50, 97.5])
    bias = middle - truth if quantity == "exponent" else middle / truth - 1
    return Recovered(method, quantity, truth, *map(float, (bias, low, high)), failed)


def _approach_3(columns: Any, target: float) -> dict[str, float]:
    try:
        p = laws.fit(laws.CHINCHILLA, columns, starts=6).parameters
    except UserError:
        return {"exponent": np.nan, "n": np.nan, "loss": np.nan}
    found = Law(**p)
    with np.errstate(all="ignore"):  # a fit that went astray has no best size
        n = found.best_size(target)
        loss = found.loss(n, target / (6 * n))
    return {"exponent": found.beta / (found.alpha + found.beta), "n": n, "loss": loss}


def _approach_2(columns: Any, target: float) -> dict[str, float]:
    try:
        found = isoflop.fit(columns)
    except UserError:
        return {"exponent": np.nan, "n": np.nan}
    return {"exponent": found.exponent, "n": float(found.optimum(target))}


_METHODS = {"approach_3": _approach_3, "approach_2_parabola": _approach_2}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A grid of IsoFLOP budgets, and among how many it was the best."""

    budgets: int
    sizes: int
    span: float
    tried: int


def choose(
    low: float,
    high: float,
    total: float,
    target: float,
    *,
    centre: Callable[[float], float],
    law: Law = Law(),  # noqa: B008 - frozen
    noise: float = 0.005,
    trials: int = 30,
) -> Choice:
    """The grid that finds the target's best size most narrowly for at most `total` FLOPs.

    Grids of any shape that can be made: 3 to 6 budgets from low to high, 5 to 9 sizes of each, the
    largest 2 to 8 times the best. Scored by approach 3: the width of the middle 95% of log N, and
    its bias.

    Args:
      low: the smallest budget, FLOPs.
      high: the largest.
      total: FLOPs in all.
      target: FLOPs to predict for.
      centre: the best size of a budget, as far as is known.
      law: the truth.
      noise: as in `recover`.
      trials: draws of each grid.

    Raises:
      UserError: even the smallest grid takes more.
    """
    best, tried, cheapest = None, 0, np.inf
    for budgets, sizes, span in itertools.product((3, 4, 5, 6), (5, 7, 9), (2.0, 4.0, 8.0)):
        cells = design.isoflop(design.spaced(low, high, budgets), sizes, span, centre)
        cost = sum(cell.c for cell in cells)
        cheapest = min(cheapest, cost)
        if cost > total:
            continue
        tried += 1
        runs = [Planned({}, cell.n, cell.c / (6 * cell.n), cell.c) for cell in cells]
        found = recover(runs, target, law=law, noise=noise, trials=trials)
        size = next(one for one in found if (one.method, one.quantity) == ("approach_3", "n"))
        score = np.log(size.high / size.low) + abs(np.log1p(size.bias)) + 10 * size.failed
        if best is None or score < best[0]:
            best = (score, budgets, sizes, span)
    if best is None:
        raise UserError(f"the smallest grid takes {cheapest:.3g} FLOPs, and {total:.3g} are given; "
                        f"raise --choose or lower the budgets.")  # fmt: skip
    return Choice(*best[1:], tried)
