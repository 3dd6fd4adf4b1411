"""The law of repeated tokens (Muennighoff et al. 2023, §3.1): what they and spare parameters add.

L = E + A/N'^α + B/D'^β. D' = U_D (1 + R_D* (1 − exp(−R_D / R_D*))) is what D tokens are worth, U_D
of them different and each read R_D = D/U_D − 1 times more; N' likewise with U_N, the best size for
U_D tokens that are read once, and R_N = N/U_N − 1. `R_D` and `R_N` stand for R_D* and R_N*.
"""

import dataclasses

import numpy as np

from t5x_lite.scaling.curved import Curve
from t5x_lite.scaling.laws import Columns, Fitted

_MOST = 50.0  # of the logarithm of how often something is repeated


def _best_size(p, unique):
    """log U_N: αA/N^α = βB/D^β where N and D are the best for their compute."""
    alpha, beta = p["alpha"], _beta(p)
    return (alpha + p["A"] - beta - p["B"] + np.exp(beta) * unique) / np.exp(alpha)


def _beta(p):
    return p.get("beta", p["alpha"])


def _worth(total, unique, log_r):
    """log of the effective amount."""
    r = np.exp(log_r)
    again = np.expm1(np.clip(total - unique, 0.0, _MOST))
    return unique + np.log1p(-r * np.expm1(-again / r))


def _log_loss(p, x):
    unique_d = np.minimum(x["unique"], x["d"])
    unique_n = np.minimum(_best_size(p, unique_d), x["n"])
    size = p["A"] - np.exp(p["alpha"]) * _worth(x["n"], unique_n, p["R_N"])
    data = p["B"] - np.exp(_beta(p)) * _worth(x["d"], unique_d, p["R_D"])
    return np.logaddexp(np.logaddexp(size, data), p["E"])


def _starts(rng, count, mean):
    shares = mean + rng.uniform(np.log(0.01), 0, (count, 3))
    exponents = rng.uniform(np.log(0.05), np.log(1.5), (count, 2))
    return np.concatenate([shares, exponents, np.log(rng.uniform(1, 40, (count, 2)))], axis=1)


def _rescale(p, scales):
    return p | {
        "A": p["A"] * scales["n"] ** p["alpha"],
        "B": p["B"] * scales["d"] ** _beta(p),
    }


CONSTRAINED = Curve(
    "E + A/N'^α + B/D'^β",
    ("n", "d", "unique"),
    ("A", "B", "E", "alpha", "beta", "R_D", "R_N"),
    ("alpha", "beta", "R_D", "R_N"),
    _log_loss,
    _starts,
    _rescale,
    units={"unique": "d"},
)

# As the paper fits it, α = β.
TIED = dataclasses.replace(
    CONSTRAINED,
    name="E + A/N'^α + B/D'^α",
    parameters=("A", "B", "E", "alpha", "R_D", "R_N"),
    exponents=("alpha", "R_D", "R_N"),
    starts=lambda rng, count, mean: np.delete(_starts(rng, count, mean), 4, axis=1),
)


def not_identified(fitted: Fitted, columns: Columns) -> dict[str, str]:
    """What the points can't say about R_D* and R_N*, with the reason."""
    found = {}
    repeats = columns["d"] / columns["unique"]
    if not np.any(repeats > 1.01):
        found["R_D"] = "no run repeats its tokens"
    elif repeats.max() < 1 + fitted.parameters["R_D"] / 2:
        found["R_D"] = (
            f"no run repeats its tokens more than {repeats.max() - 1:.3g} times, too few to tell "
            "where repeating stops to help"
        )
    logs = {name: np.log(value) for name, value in fitted.parameters.items()}
    spare = np.log(columns["n"]) - _best_size(logs, np.log(columns["unique"]))
    if not np.any(spare > 0.01):
        found["R_N"] = "no run is larger than the best size for its unique tokens"
    return found


def best_size(parameters: dict[str, np.ndarray], product: float, unique: float) -> np.ndarray:
    """N of the lowest loss where N·D = product and no more than `unique` tokens differ.

    By golden section; the loss has one minimum in log N.
    """
    p = {name: np.reshape(np.log(value), (-1, 1)) for name, value in parameters.items()}
    shape = (len(p["E"]), 1)
    low, high = np.full(shape, np.log(product) - 60.0), np.full(shape, np.log(product))
    inside = (np.sqrt(5) - 1) / 2

    def loss(n):
        d = np.log(product) - n
        return _log_loss(p, {"n": n, "d": d, "unique": np.minimum(np.log(unique), d)})

    for _ in range(90):
        left, right = high - inside * (high - low), low + inside * (high - low)
        lower = loss(left) < loss(right)
        low, high = np.where(lower, low, left), np.where(lower, right, high)
    return np.exp(0.5 * (low + high))[:, 0]
