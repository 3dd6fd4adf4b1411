"""Do the methods agree? Their optima side by side, how far they part, and what is known to err."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import isoflop, laws, optimum
from t5x_lite.scaling.laws import Columns

_QUANTITIES = {
    "n": "N_opt",
    "d": "D_opt",
    "tokens_per_parameter": "tokens per parameter",
    "loss": "the loss",
}
_SMALL = 0.005  # a bias that nobody needs to hear of


def compare(methods: Mapping[str, Mapping[str, Any]], columns: Columns, flops: float | None):
    """The methods' optima at one C, the largest over the smallest of each, and remarks.

    Args:
      methods: of fit.json, with their "optimum".
      columns: the points that approach 2 was fitted to.
      flops: k of C = k·N·D, if all three are known.
    """
    best = {name: method["optimum"] for name, method in methods.items() if "optimum" in method}
    if not best:
        return None
    c = next(iter(best.values()))["c"]
    spread = {}
    remarks = []
    for quantity, words in _QUANTITIES.items():
        found = {name: each[quantity] for name, each in best.items() if quantity in each}
        values = [each["value"] for each in found.values()]
        if len(values) > 1 and min(values) > 0:
            spread[quantity] = max(values) / min(values)
        if quantity in ("n", "loss"):  # the others follow from N
            remarks += _apart(found, f"{words} at {c:.3g} FLOPs")
    exponents = {n: m["n_exponent"] for n, m in methods.items() if "n_exponent" in m}
    remarks += _apart(exponents, "a of N_opt ∝ C^a")
    remarks += _bias(methods, columns, flops, c)
    return {"c": c, "methods": best, "spread": spread, "remarks": remarks}


def _apart(found, words):
    """A sentence where two intervals don't overlap: of the two that are farthest apart."""
    known = {name: each for name, each in found.items() if "interval" in each}
    if len(known) < 2:
        return []
    low = min(known, key=lambda name: known[name]["interval"][1])
    high = max(known, key=lambda name: known[name]["interval"][0])
    top, bottom = known[low]["interval"][1], known[high]["interval"][0]
    if bottom <= top:
        return []
    pairs = sum(known[a]["interval"][1] < known[b]["interval"][0] for a in known for b in known)
    return [
        f"The methods disagree on {words} beyond their 95% intervals, in {pairs} of "
        f"{len(known) * (len(known) - 1) // 2} pairs: {low} says at most {top:.4g}, {high} at "
        f"least {bottom:.4g}."
    ]


def _bias(methods, columns, flops, c):
    """What a parabola or an Akima curve finds on the fitted law's own losses, at the same sizes."""
    name = next((n for n in ("approach_3", "variable_projection") if n in methods), None)
    if name is None:
        return []
    p = {key: each["value"] for key, each in methods[name]["parameters"].items()}
    if min(p.values()) <= 0:
        return []
    exact = {**columns, "loss": laws.CHINCHILLA.predict(p, columns)}
    one = {key: np.array([[value]]) for key, value in p.items()}
    n = optimum.of_law(laws.CHINCHILLA, flops)(one, np.array([c]))["n"][0, 0]
    true = p["beta"] / (p["alpha"] + p["beta"])
    remarks = []
    for curve in ("parabola", "akima"):
        if f"approach_2_{curve}" not in methods:
            continue
        try:
            found = isoflop.fit(exact, curve)
        except UserError:
            continue
        error, slope = found.optimum(c) / n - 1, found.exponent - true
        if abs(error) > _SMALL or abs(slope) > _SMALL / 2:
            remarks.append(
                f"approach_2_{curve} is biased on this grid: of losses that follow {name}'s law "
                f"exactly (α {p['alpha']:.3g}, β {p['beta']:.3g}), at the same sizes, it finds "
                f"N_opt at {c:.3g} FLOPs {error:+.1%} off and a {slope:+.3f} off; α ≠ β and sizes "
                "that aren't centred on the best one do that."
            )
    return remarks
