"""Variable projection: of E + A/N^α + B/D^β only α and β are searched for, the rest is solved.

Given the exponents the law is linear in E, A and B, which non-negative least squares finds exactly,
whatever the start (Golub and Pereyra 1973; Lawson and Hanson 1974, ch. 23).
"""

import itertools

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import laws
from t5x_lite.scaling.laws import CHINCHILLA, Columns, Fitted, Noise
from t5x_lite.scaling.minimise import minimise

_NUDGE = 1e-5  # of an exponent, for the curvature: differences of exact gradients
_GRID = np.geomspace(0.05, 1.5, 8)
_LIMITS = 0.0, 5.0  # no law of loss has exponents beyond them


def fit(
    columns: Columns,
    *,
    bootstraps: int = 0,
    seed: int = 0,
    weights: np.ndarray | None = None,
    noise: Noise | None = None,
) -> Fitted:
    """Chinchilla's law by least squares of the relative error, Σ (1 − prediction / L)².

    Args:
      columns: "n", "d" and "loss".
      bootstraps: draws of as many points with replacement; 0 for none.
      seed: of the draws.
      weights: of draws given from outside, [bootstraps, points]; None draws them.
      noise: the errors with which the law's own losses are fitted again.

    Raises:
      UserError: fewer than six points.
    """
    logs = {name: np.log(np.asarray(columns[name], float)) for name in ("n", "d")}
    loss_n = np.asarray(columns["loss"], float)
    loss_1n, count = loss_n[None], len(loss_n)
    if count < 6:
        raise UserError(
            f"{CHINCHILLA.name} has 5 parameters, and there are {count} points; give at least 6."
        )
    centres = {name: float(np.mean(values)) for name, values in logs.items()}
    away = [logs[name] - centres[name] for name in ("n", "d")]

    starts = np.array(list(itertools.product(_GRID, _GRID)))
    found, values = minimise(_reduced(away, loss_1n, np.ones((len(starts), count))), starts)
    best = found[np.argmin(values)]
    samples: dict[str, np.ndarray] = {}
    if bootstraps or weights is not None:
        if weights is None:
            rng = np.random.default_rng(seed)
            weights = rng.multinomial(count, np.full(count, 1 / count), size=bootstraps)
        weights = np.asarray(weights, float)
        again, _ = minimise(
            _reduced(away, loss_1n, weights), np.repeat(best[None], len(weights), 0)
        )
        samples = _parameters(again, away, loss_1n, weights, centres)
    one = _parameters(best[None], away, loss_1n, np.ones((1, count)), centres)
    samples = {name: _reflected(one[name], drawn, count) for name, drawn in samples.items()}
    parameters = {name: float(v[0]) for name, v in one.items()}
    noisy: dict[str, np.ndarray] = {}
    if noise is not None:
        exact = CHINCHILLA.predict(parameters, columns)
        loss_mn = exact * np.exp(noise(np.log(loss_n / exact)))
        ones = np.ones_like(loss_mn)
        again, _ = minimise(_reduced(away, loss_mn, ones), np.repeat(best[None], len(ones), 0))
        noisy = _parameters(again, away, loss_mn, ones, centres)
    weak = laws.weak(CHINCHILLA, columns, parameters)
    return Fitted(CHINCHILLA, parameters, float(np.min(values)), samples, weak, noisy)


def _reflected(found: np.ndarray, drawn: np.ndarray, count: int) -> np.ndarray:
    """Draws as far on the other side of what was found, in logarithms; their middle is an interval.

    The basic bootstrap (Davison and Hinkley 1997, §5.2): the draws err from the fit as the fit errs
    from the truth. They err by too little, as residuals do after 5 parameters were fitted.
    `benchmarks/coverage.py` counts how often the intervals hold.
    """
    spread = np.sqrt(count / (count - 5))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(np.log(found) + spread * (np.log(found) - np.log(drawn)))


def _reduced(away, loss_mn, weights_mn):
    """The least squares that are left once E, A and B are solved, as a function of (α, β).

    `loss_mn` has a row for each problem, or one for all.
    """

    def slope(exponents, rows):
        inside = np.all((exponents > _LIMITS[0]) & (exponents < _LIMITS[1]), axis=1)
        exponents = np.clip(exponents, *_LIMITS)
        losses = loss_mn if len(loss_mn) == 1 else loss_mn[rows]
        basis_mnk, coefficients_mk = _solve(exponents, away, losses, weights_mn[rows])
        error_mn = np.einsum("mnk,mk->mn", basis_mnk, coefficients_mk) - 1.0
        weighted = weights_mn[rows] * error_mn
        # The coefficients are optimal, so that they count as constants (the envelope theorem).
        change = [
            -2 * coefficients_mk[:, k] * np.sum(weighted * basis_mnk[:, :, k] * away[k], axis=1)
            for k in range(2)
        ]
        value = np.where(inside, np.sum(weighted * error_mn, axis=1), np.inf)
        return value, np.stack(change, axis=1)

    def compute(exponents, rows):
        value, gradient = slope(exponents, rows)
        columns = [
            (slope(exponents + step, rows)[1] - slope(exponents - step, rows)[1]) / (2 * _NUDGE)
            for step in _NUDGE * np.eye(2)
        ]
        hessian = np.stack(columns, axis=1)
        return value, gradient, 0.5 * (hessian + hessian.transpose(0, 2, 1))

    return compute


def _solve(exponents_mk, away, loss_mn, weights_mn):
    """The basis N^-α, D^-β, 1, each over the loss, and its non-negative coefficients.

    Of three columns the sets that may be positive are seven: each is solved, the best is taken.
    """
    powers = [np.exp(-exponents_mk[:, k, None] * away[k]) for k in range(2)]
    basis_mnk = np.stack([*powers, np.ones_like(powers[0])], axis=-1) / loss_mn[:, :, None]
    weighted = weights_mn[:, :, None] * basis_mnk
    gram = np.einsum("mnk,mnl->mkl", weighted, basis_mnk)
    right = weighted.sum(axis=1)
    best = np.zeros_like(right)
    least = np.zeros(len(right))  # Σ w, which no coefficients leave, is common to all sets
    open_ = np.ones(len(right), bool)  # problems whose answer isn't known to be the best
    for size in (3, 2, 1):
        rows = np.flatnonzero(open_)
        for chosen in itertools.combinations(range(3), size):
            part = gram[rows][:, chosen][:, :, chosen]
            tiny = 1e-13 * np.trace(part, axis1=1, axis2=2)[:, None, None] * np.eye(size)
            solved = np.linalg.solve(part + tiny, right[rows][:, chosen, None])[..., 0]
            gained = -np.sum(solved * right[rows][:, chosen], axis=1)
            better = np.all(solved >= 0, axis=1) & (gained < least[rows])
            least[rows[better]] = gained[better]
            best[rows[better]] = 0
            best[np.ix_(rows[better], chosen)] = solved[better]
            if size == 3:  # all three positive: nothing can be better
                open_[rows[better]] = False
    return basis_mnk, best


def _parameters(exponents_mk, away, loss_mn, weights_mn, centres):
    _, coefficients = _solve(exponents_mk, away, loss_mn, weights_mn)
    alpha, beta = exponents_mk.T
    with np.errstate(over="ignore"):
        return {
            "A": coefficients[:, 0] * np.exp(alpha * centres["n"]),
            "B": coefficients[:, 1] * np.exp(beta * centres["d"]),
            "E": coefficients[:, 2],
            "alpha": alpha,
            "beta": beta,
        }
