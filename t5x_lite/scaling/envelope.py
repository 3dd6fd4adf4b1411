"""Chinchilla's approach 1: at each compute the run of the lowest loss so far, and its size.

The runs' training curves, or rows of one size at several numbers of tokens, are followed through a
grid of FLOPs; lines through the winners' sizes and tokens in logarithms are N_opt = G·C^a and
D_opt = H·C^b (Hoffmann et al. 2022, §3.1). Compute at which the smallest or the largest model there
is wins says nothing, and is left out.
"""

import dataclasses

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import frontier
from t5x_lite.scaling.laws import Columns

_A_DECADE = 24  # steps of the grid
_FEWEST_CURVES = 3
_SAME_SIZE = 1e-6


@dataclasses.dataclass(frozen=True)
class Envelope:
    """Winners and the powers through them.

    Attributes:
      c: FLOPs, [K].
      n: the winner's parameters, [K].
      d: its tokens there, [K].
      loss: its loss there, [K].
      parameters: G, a, H, b, and E, F, gamma of the loss, E + F/C^γ; NaN of too few.
      samples: the same over bootstraps, [draws] each.
      curves: how many were followed, or 0 where rows are points of their own.
    """

    c: np.ndarray
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    parameters: dict[str, float]
    samples: dict[str, np.ndarray]
    curves: int


def fit(columns: Columns, *, bootstraps: int = 0, seed: int = 0) -> Envelope:
    """The envelope's powers.

    Args:
      columns: "n", "d", "c", "loss", and "run" where rows belong to training curves. Without it
        rows of one size make a curve, and where few sizes have two rows each is its own.
      bootstraps: draws of the curves with replacement.
      seed: of the draws.

    Raises:
      UserError: fewer than two sizes win.
    """
    groups = _curves(columns)
    curves = len(groups)
    table = _followed(columns, groups) if curves else _rows(columns)
    found = _winners(table, np.ones(len(table["log_n"]), bool))
    sizes = len(np.unique(np.round(found[1], 6)))
    if sizes < 2:
        raise UserError(
            f"{sizes} sizes win at some compute among {curves or len(columns['n'])} "
            f"{'curves' if curves else 'runs'} with smaller and larger ones beside them, and a "
            "line needs 2; give curves of more sizes, or longer ones."
        )
    one = _powers(*(values[None] for values in found))
    rng = np.random.default_rng(seed)
    count = len(table["log_n"])
    drawn = []
    for _ in range(bootstraps):
        there = np.zeros(count, bool)
        there[rng.integers(0, count, count)] = True
        drawn.append(_winners(table, there, full=True))
    samples = _powers(*map(np.stack, zip(*drawn, strict=True))) if drawn else {}
    parameters = {name: float(values[0]) for name, values in one.items()}
    c, n, d, loss = (np.exp(values) for values in found)
    return Envelope(c, n, d, loss, parameters, samples, curves)


def _curves(columns):
    """The rows of each training curve, in order of their tokens."""
    if "run" in columns:
        label = columns["run"]
    else:
        order = np.argsort(columns["n"], kind="stable")
        label = np.empty(len(order), int)
        steps = np.diff(np.log(columns["n"][order])) > _SAME_SIZE
        label[order] = np.append(0, np.cumsum(steps))
    groups = []
    for each in np.unique(label):
        rows = np.flatnonzero(label == each)
        _, first = np.unique(columns["c"][rows], return_index=True)
        if len(first) > 1:
            groups.append(rows[first])
    if len(groups) < _FEWEST_CURVES:
        if "run" in columns:
            raise UserError(
                f"{len(groups)} runs have two rows or more, and an envelope needs "
                f"{_FEWEST_CURVES}; give the curves of more runs, or none."
            )
        return []
    return groups


def _followed(columns, groups):
    """Log-losses and log-tokens of every curve on a grid of log C; NaN before and after it."""
    log = {name: np.log(columns[name]) for name in ("n", "d", "c", "loss")}
    low, high = log["c"].min(), log["c"].max()
    steps = max(3, int(np.ceil((high - low) / np.log(10) * _A_DECADE)))
    grid = np.linspace(low, high, steps + 1)

    def along(name):
        return np.array([
            np.interp(grid, log["c"][rows], log[name][rows], left=np.nan, right=np.nan)
            for rows in groups
        ])  # fmt: skip

    sizes = np.array([log["n"][rows].mean() for rows in groups])
    grids = np.repeat(grid[None], len(groups), 0)
    return {
        "curves": True,
        "log_c": grids,
        "log_n": sizes,
        "log_d": along("d"),
        "log_loss": along("loss"),
    }


def _rows(columns):
    """Each row a curve of one point: it competes with the rows of about as much compute or less."""
    log = {name: np.log(columns[name]) for name in ("n", "d", "c", "loss")}
    step = frontier.steps(log["c"])
    own = step[:, None] == np.arange(step.max() + 1)
    table = {name: np.where(own, log[name][:, None], np.nan) for name in ("c", "d", "loss")}
    return {"curves": False, "log_n": log["n"]} | {f"log_{k}": v for k, v in table.items()}


def _winners(table, there, full=False):
    """log C, N, D and loss at which a run wins between others; NaN elsewhere where `full`."""
    loss = np.where(there[:, None], table["log_loss"], np.inf)
    loss = np.where(np.isnan(loss), np.inf, loss)
    size = table["log_n"][:, None]
    alive = np.isfinite(loss)
    run, at = np.argmin(loss, axis=0), np.arange(loss.shape[1])
    smallest = np.min(np.where(alive, size, np.inf), axis=0)
    largest = np.max(np.where(alive, size, -np.inf), axis=0)
    if not table["curves"]:  # rows must beat all of less compute; few have others beside them
        few = alive.sum(axis=0) < _FEWEST_CURVES
        smallest = np.where(few, smallest.min(), smallest)
        largest = np.where(few, largest.max(), largest)
        best = loss[run, at]
        alive &= best < np.concatenate([[np.inf], np.minimum.accumulate(best)[:-1]])
    won = table["log_n"][run]
    keep = alive[run, at] & (won > smallest + _SAME_SIZE) & (won < largest - _SAME_SIZE)
    found = table["log_c"][run, at], won, table["log_d"][run, at], loss[run, at]
    if full:
        return tuple(np.where(keep, values, np.nan) for values in found)
    return tuple(values[keep] for values in found)


def _powers(log_c, log_n, log_d, log_loss):
    """Lines in logarithms through each row's winners, and the loss's power."""
    a, g = frontier.line(log_c, log_n)
    b, h = frontier.line(log_c, log_d)
    found = {"G": np.exp(g), "a": a, "H": np.exp(h), "b": b}
    return found | frontier.fit(log_c, np.exp(log_loss))
