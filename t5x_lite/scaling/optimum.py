"""The best size, tokens and loss of a compute budget, and how they grow with it.

Compute is k·N·D with k = 6 (Kaplan et al. 2020, §2.1), or what the runs themselves were counted by.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_lite.scaling import constrained, kaplan, laws
from t5x_lite.scaling.laws import Predicts
from t5x_lite.scaling.points import FLOPS

Parameters = dict[str, np.ndarray]  # name to values, [M, 1]
# Of parameters and FLOPs, [C]: "n" and "d", "loss", or all three, [M, C] each.
Along = Callable[[Parameters, np.ndarray], dict[str, np.ndarray]]


def best_size(parameters: dict[str, np.ndarray], c: float | np.ndarray) -> np.ndarray:
    """N that minimises Chinchilla's law under C = 6ND (Hoffmann et al. 2022, §3.3, eq. 4)."""
    p, beta = parameters, _beta(parameters)
    ratio = p["alpha"] * p["A"] / (beta * p["B"])
    return ratio ** (1 / (p["alpha"] + beta)) * (c / FLOPS) ** (beta / (p["alpha"] + beta))


def _beta(parameters):
    return parameters.get("beta", parameters["alpha"])


def _kaplan_size(p, c):
    """The same of Kaplan's law of both, where d/dN of its bracket is zero."""
    ratio = p["alpha_N"] / p["alpha_D"]
    product = ratio * p["N_c"] ** ratio * c / (FLOPS * p["D_c"])
    return product ** (1 / (1 + ratio))


def exponent(law: Predicts, parameters: Parameters) -> np.ndarray:
    """a of N_opt ∝ C^a."""
    p = parameters
    if law is kaplan.BOTH:
        return p["alpha_D"] / (p["alpha_N"] + p["alpha_D"])
    return _beta(p) / (p["alpha"] + _beta(p))


def has_optimum(law: Predicts) -> bool:
    """Whether a budget's best size follows from the law."""
    repeated = (constrained.CONSTRAINED, constrained.TIED)
    return law in (laws.CHINCHILLA, laws.TIED, kaplan.BOTH, *repeated)


def of_law(law: Predicts, flops: float, unique: float | None = None) -> Along:
    """The optimum by a law of N and D, at `flops` a token and parameter.

    Args:
      law: one that has an optimum.
      flops: k of C = k·N·D.
      unique: how many tokens differ, of a law of repeated ones; None: as many as are read.
    """

    def along(p, c):
        product = c / flops
        if "unique" in law.columns and unique is not None:
            sizes = [constrained.best_size(p, each, unique) for each in np.atleast_1d(product)]
            n = np.stack(sizes, axis=1)
        else:
            size = _kaplan_size if law is kaplan.BOTH else best_size
            n = size(p, FLOPS * product)
        d = product / n
        columns = {"n": n, "d": d}
        if "unique" in law.columns:
            columns["unique"] = d if unique is None else np.minimum(d, unique)
        return {"n": n, "d": d, "loss": law.predict(p, columns)}

    return along


def of_compute(law: Predicts) -> Along:
    """The lowest loss by a law of C alone, which knows no sizes."""
    return lambda p, c: {"loss": law.predict(p, {"c": c})}


def of_powers(flops: float) -> Along:
    """The optimum by N_opt = G·C^a, D_opt = C / kN_opt or H·C^b, and E + F/C^γ of its loss."""

    def along(p, c):
        n = p["G"] * c ** p["a"]
        d = p["H"] * c ** p["b"] if "H" in p else c / (flops * n)
        found = {"n": n, "d": d}
        if np.isfinite(p["E"]).any():
            found["loss"] = p["E"] + p["F"] * c ** -p["gamma"]
        return found

    return along


def describe(
    along: Along, draws: Mapping[str, Mapping[str, Any]], target: float, budgets: np.ndarray
) -> dict[str, Any]:
    """For fit.json: the optimum at the target, and along the budgets, or why there is none.

    Args:
      along: what follows from parameters.
      draws: "value", a set of parameters, and for each kind of interval its samples.
      target: FLOPs.
      budgets: FLOPs of the frontier, [C].
    """
    many = {kind: _columns(values) for kind, values in draws.items() if values}
    with np.errstate(all="ignore"):  # of draws that no law fits
        at = {kind: _ratio(along(p, np.array([target]))) for kind, p in many.items()}
        far = {kind: _ratio(along(p, budgets)) for kind, p in many.items()}
    if not all(np.isfinite(values).all() for values in far["value"].values()):
        return {"caveat": "its exponents have no best size, so it gives no optimum"}
    best: dict[str, Any] = {"c": target}
    for name, value in at["value"].items():
        best[name] = {"value": float(value[0, 0])}
        for kind in at.keys() - {"value"}:
            best[name] |= laws.interval(kind, at[kind][name])
    frontier: dict[str, Any] = {"c": budgets.tolist()}
    for name, value in far["value"].items():
        frontier[name] = {"value": value[0].tolist()}
    for name, samples in far.get("interval", {}).items():
        known = np.where(np.isfinite(samples), samples, np.nan)
        if np.isfinite(known).any(axis=0).all():
            low, high = np.nanpercentile(known, [2.5, 97.5], axis=0)
            frontier[name] |= {"low": low.tolist(), "high": high.tolist()}
    return {"optimum": best, "frontier": frontier}


def _ratio(found):
    return found | {"tokens_per_parameter": found["d"] / found["n"]} if "d" in found else found


def _columns(values):
    return {name: np.reshape(np.asarray(v, float), (-1, 1)) for name, v in values.items()}


def budgets_for(c: np.ndarray, target: float | None) -> np.ndarray:
    """FLOPs of the frontier, four a decade, to ten times the largest run or to the target."""
    low, high = 4 * np.log10([c.min(), max(10 * c.max(), target or 0)])
    return 10 ** (np.arange(np.floor(low), np.ceil(high) + 1) / 4)
