"""Damped Newton on many small problems at once: starts and bootstraps are rows of one array.

A fit of five parameters to hundreds of points is tiny, and thousands of them are wanted; one by one
they cost Python's overhead, as a batch they cost arithmetic.
"""

from collections.abc import Callable

import numpy as np

# M problems, P parameters. Of parameters [M, P] and the problems' numbers [M]: the values [M], the
# gradients [M, P] and the Hessians [M, P, P].
Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]

_GROW, _SHRINK, _LEAST, _MOST = 4.0, 0.25, 1e-12, 1e12  # the damping's


def minimise(
    objective: Objective, start: np.ndarray, steps: int = 400, tolerance: float = 1e-11
) -> tuple[np.ndarray, np.ndarray]:
    """Local minima near each row of `start`, [M, P]: the parameters, and the values, [M].

    Negative curvature is turned positive, and the step damped until it lowers the value (Nocedal
    and Wright 2006, §3.4). A problem is done when its Newton decrement says that no more than
    `tolerance` of its value is to be gained, or when nothing lowers it any more.
    """
    best, rows = np.array(start, float), np.arange(len(start))
    here = objective(best, rows)  # value, gradient and Hessian of the problems still running
    values, damping = here[0].copy(), np.full(len(best), 1e-3)
    for _ in range(steps):
        step, gain = _newton(here[1], here[2], damping[rows])
        trial = best[rows] + step
        there = objective(trial, rows)
        lower = there[0] < here[0]
        best[rows[lower]] = trial[lower]
        here = tuple(np.where(_like(lower, b), b, a) for a, b in zip(here, there, strict=True))
        values[rows] = here[0]
        damping[rows] = np.maximum(damping[rows] * np.where(lower, _SHRINK, _GROW), _LEAST)
        going = (~lower | (gain > tolerance * here[0])) & (damping[rows] < _MOST)
        rows, here = rows[going], tuple(part[going] for part in here)
        if not len(rows):
            break
    return best, values


def _like(flags_M: np.ndarray, other: np.ndarray) -> np.ndarray:
    return flags_M.reshape(-1, *(1,) * (other.ndim - 1))


def _newton(gradient, hessian, damping):
    """The damped step, and what a quadratic would gain by it."""
    eigenvalues, vectors = np.linalg.eigh(hessian)
    size = np.abs(eigenvalues)
    # Where all errors are beyond the Huber loss's δ there is no curvature: parameters, logarithms
    # and exponents, then move by no more than 1 / damping.
    scale = size.max(axis=1) + np.linalg.norm(gradient, axis=1) + np.finfo(float).tiny
    size = size + (damping * scale)[:, None]
    along = np.einsum("mpq,mp->mq", vectors, gradient) / size
    gain = 0.5 * np.einsum("mq,mq->m", along**2, size)
    return -np.einsum("mpq,mq->mp", vectors, along), gain
