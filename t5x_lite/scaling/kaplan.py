"""Kaplan et al. 2020: powers of size, tokens or compute alone, and of size and tokens together."""

import dataclasses

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import frontier, laws
from t5x_lite.scaling.curved import Curve
from t5x_lite.scaling.laws import Columns, Fitted

_OTHER = {"n": "tokens", "d": "parameters"}


def _log_loss(p, x):
    alpha_n, alpha_d = np.exp(p["alpha_N"]), np.exp(p["alpha_D"])
    size = alpha_n / alpha_d * (p["N_c"] - x["n"])
    return alpha_d * np.logaddexp(size, p["D_c"] - x["d"])


def _starts(rng, count, mean):
    """Exponents between 0.03 and 0.6, and shares of the loss that the two terms take."""
    alpha_n, alpha_d = np.exp(rng.uniform(np.log(0.03), np.log(0.6), (2, count)))
    share = rng.uniform(0.05, 0.95, count)
    n_c = (np.log(share) + mean / alpha_d) * alpha_d / alpha_n
    d_c = np.log1p(-share) + mean / alpha_d
    return np.stack([n_c, d_c, np.log(alpha_n), np.log(alpha_d)], axis=1)


def _rescale(p, scales):
    return p | {"N_c": p["N_c"] * scales["n"], "D_c": p["D_c"] * scales["d"]}


# Eq. 1.5. It has no constant, so that it says too little where the loss has one.
BOTH = Curve(
    "[(N_c/N)^(α_N/α_D) + D_c/D]^α_D",
    ("n", "d"),
    ("N_c", "D_c", "alpha_N", "alpha_D"),
    ("alpha_N", "alpha_D"),
    _log_loss,
    _starts,
    _rescale,
)


def fit_one(columns: Columns, column: str, floor: bool, **options) -> tuple[Fitted, np.ndarray]:
    """(X_c/X)^α of N, D or C (eq. 1.1-1.3), with or without a constant, and the rows it is of.

    Those are the runs that the other quantities hold back the least: the lowest loss of each size,
    of each number of tokens, or of all runs of no more compute.

    Args:
      columns: "n", "d", "c" and "loss".
      column: "n", "d" or "c".
      floor: whether there is a constant E.
      options: of `laws.fit`; bootstraps draw the rows that are fitted.

    Raises:
      UserError: too few such rows.
    """
    rows = lowest(columns, column)
    law = laws.of_one(column, floor)
    need = len(law.scales) + len(law.exponents) + 1
    if len(rows) < need:
        what = "runs of the lowest loss yet" if column == "c" else f"values of {column.upper()}"
        raise UserError(f"{law.name} needs {need} {what}, and there are {len(rows)}.")
    return laws.fit(law, {name: columns[name][rows] for name in (column, "loss")}, **options), rows


def lowest(columns: Columns, column: str) -> np.ndarray:
    """The rows of the lowest loss of each N or D, or of the lowest loss yet as C rises."""
    log = np.log(columns[column])
    if column == "c":
        group = frontier.steps(log)
    else:
        order = np.argsort(log, kind="stable")
        group = np.empty(len(log), int)
        group[order] = np.append(0, np.cumsum(np.diff(log[order]) > 1e-6))
    order = np.lexsort((columns["loss"], group))
    best = order[np.append(True, np.diff(group[order]) > 0)]
    if column != "c":
        return best
    loss = columns["loss"][best]
    before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    return best[loss < before]


def held_back(columns: Columns, column: str) -> str:
    """Why a power of N or D alone says little here: its best runs still gain from the other."""
    other = "d" if column == "n" else "n"
    if other not in columns:
        return (
            f"the runs' {_OTHER[column]} aren't known, so nothing tells whether they hold the best "
            f"of them back"
        )
    gains = []
    for row in lowest(columns, column):
        same = np.abs(columns[column] / columns[column][row] - 1) < 1e-6
        less = same & (columns[other] < columns[other][row] / 1.3)
        if less.any():
            last = np.flatnonzero(less)[np.argmax(columns[other][less])]
            steps = np.log2(columns[other][row] / columns[other][last])
            gains.append(1 - (columns["loss"][row] / columns["loss"][last]) ** (1 / steps))
    if not gains or np.median(gains) < 0.01:
        return ""
    return (
        f"the best runs still gain {np.median(gains):.1%} by twice the {_OTHER[column]}, so this "
        f"is no law of {column.upper()} alone"
    )


def with_critical(fitted: Fitted, column: str) -> Fitted:
    """With X_c, of (X_c/X)^α, in place of A = X_c^α."""

    def renamed(values):
        with np.errstate(over="ignore"):
            critical = np.exp(np.log(values["A"]) / values["alpha"])
        rest = {name: value for name, value in values.items() if name != "A"}
        return {f"{column.upper()}_c": critical} | rest

    one = {name: np.array([value]) for name, value in fitted.parameters.items()}
    return dataclasses.replace(
        fitted,
        parameters={name: float(v[0]) for name, v in renamed(one).items()},
        samples=renamed(fitted.samples) if fitted.samples else {},
        noisy=renamed(fitted.noisy) if fitted.noisy else {},
    )
