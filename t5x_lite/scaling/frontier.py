"""Best sizes and lowest losses against compute: lines, and E + F/C^γ (Kaplan et al. 2020, §1)."""

import numpy as np

_FEWEST = 4  # points, one more than parameters
_STEP = 0.1  # of log C, within which budgets count as one
_GRID = np.geomspace(0.005, 1.0, 60)  # of γ; twice refined


def fit(log_c_mk: np.ndarray, loss_mk: np.ndarray) -> dict[str, np.ndarray]:
    """E, F and γ, [M] each, of M sets of K points, by least squares of the relative error.

    Given γ the law is linear in E and F, neither of which may be negative. NaN marks a point that
    is absent; sets of fewer than four have NaN parameters.
    """
    there = np.isfinite(loss_mk) & np.isfinite(log_c_mk)
    loss = np.where(there, loss_mk, 1.0)[:, None]
    centre = float(np.mean(log_c_mk[there])) if there.any() else 0.0
    log_c = np.where(there, log_c_mk - centre, 0.0)[:, None]
    weight = there[:, None] / loss**2
    gamma = np.repeat(_GRID[None], len(loss), 0)
    ratio = _GRID[1] / _GRID[0]
    for _ in range(3):
        e, f, error = _solve(gamma, log_c, loss, weight)
        best = np.argmin(error, axis=1)[:, None]
        e, f, found = (np.take_along_axis(values, best, 1)[:, 0] for values in (e, f, gamma))
        gamma = found[:, None] * np.geomspace(1 / ratio, ratio, 21)
        ratio **= 0.1
    few = there.sum(axis=1) < _FEWEST
    scaled = f * np.exp(found * centre)
    return {name: np.where(few, np.nan, values)
            for name, values in (("E", e), ("F", scaled), ("gamma", found))}  # fmt: skip


def _solve(gamma_mg, log_c, loss, weight):
    """E and F of each γ, and the error that they leave, less what is common to all."""
    power = np.exp(-gamma_mg[:, :, None] * log_c)
    ones, mean, square = (np.sum(weight * power**k, axis=2) for k in range(3))
    right, along = np.sum(weight * loss, axis=2), np.sum(weight * loss * power, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        f = (ones * along - mean * right) / (ones * square - mean**2)
        e = (right - f * mean) / ones
        f = np.where(e < 0, along / square, f)
        e = np.where(e < 0, 0.0, e)
        e = np.where(f < 0, right / ones, e)
        f = np.where(f < 0, 0.0, f)
        error = e**2 * ones + 2 * e * f * mean + f**2 * square - 2 * (e * right + f * along)
    return e, f, np.where(np.isfinite(error), error, np.inf)


def steps(log_c: np.ndarray) -> np.ndarray:
    """A number for each run, rising with compute: one for all within 10% of the first of them."""
    found, start, number = np.zeros(len(log_c), int), -np.inf, -1
    for row in np.argsort(log_c, kind="stable"):
        if log_c[row] > start + _STEP:
            start, number = log_c[row], number + 1
        found[row] = number
    return found


def line(x_mk: np.ndarray, y_mk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts of M lines; NaN marks absent points, and lines of fewer than two."""
    there = np.isfinite(x_mk) & np.isfinite(y_mk)
    count = np.maximum(there.sum(axis=1, keepdims=True), 1)
    x, y = (np.where(there, values, 0.0) for values in (x_mk, y_mk))
    middle, height = x.sum(axis=1, keepdims=True) / count, y.sum(axis=1, keepdims=True) / count
    x, y = np.where(there, x - middle, 0.0), np.where(there, y - height, 0.0)
    spread = np.sum(x**2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(spread > 1e-12, np.sum(x * y, axis=1) / spread, np.nan)
    return slope, height[:, 0] - slope * middle[:, 0]
