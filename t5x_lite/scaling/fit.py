"""Fits of one set of points by every method that it allows, side by side, and what they predict.

Depends on NumPy and SciPy alone: `fit(Points({"n": …, "d": …, "c": …, "loss": …}))`.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import isoflop, laws, projection
from t5x_lite.scaling.laws import Fitted
from t5x_lite.scaling.points import FLOPS, Points

FARTHEST = 100.0  # times the largest fitted compute


def fit(
    points: Points,
    *,
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    target: float | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Every number of every method that the points allow, json-able.

    Args:
      points: finished runs.
      delta: of the Huber loss of the log-loss.
      bootstraps: draws over runs for the 95% intervals.
      seed: of starts and draws.
      target: FLOPs to predict for.
      force: predict however far it is from the fitted compute.

    Raises:
      UserError: too few points for any method, or a target too far away.
    """
    columns = points.columns
    result: dict[str, Any] = {
        "points": len(points),
        "unfinished": points.unfinished,
        "dropped": points.dropped,
        "largest_c": float(columns["c"].max()),
        "methods": {},
        "refused": {},
    }
    if target is not None:
        _check_distance(target, result["largest_c"], force)
    options = {"delta": delta, "bootstraps": bootstraps, "seed": seed}
    if "density" in columns:
        plans = {"sparse": lambda: _of_law(laws.fit(laws.SPARSE, columns, **options))}
    else:
        plans = _plans(columns, options, target)
    for name, plan in plans.items():
        try:
            result["methods"][name] = plan()
        except UserError as error:
            result["refused"][name] = str(error)
    if not result["methods"]:
        raise UserError(next(iter(result["refused"].values())))
    return result


def _plans(columns, options, target):
    resampling = {name: options[name] for name in ("bootstraps", "seed")}

    def chinchilla(law):
        return lambda: _of_law(laws.fit(law, columns, **options), target)

    def iso(curve):
        return lambda: _of_minima(isoflop.fit(columns, curve, **resampling), target)

    return {
        "approach_3": chinchilla(laws.CHINCHILLA),
        "approach_3_tied": chinchilla(laws.TIED),
        "variable_projection": lambda: _of_law(projection.fit(columns, **resampling), target),
        "approach_2_parabola": iso("parabola"),
        "approach_2_akima": iso("akima"),
    }


def _of_law(fitted: Fitted, target: float | None = None) -> dict[str, Any]:
    """Parameters with their intervals, then what follows from them."""
    found: dict[str, Any] = {
        "law": fitted.law.name,
        "objective": fitted.objective,
        "parameters": {
            name: _with_interval(value, fitted.samples.get(name))
            for name, value in fitted.parameters.items()
        },
    }
    if fitted.weak:
        found["not_identified"] = fitted.weak
    if "n" in fitted.law.columns and "d" in fitted.law.columns and "density" not in (
        fitted.law.columns
    ):  # fmt: skip
        found |= _optimum(fitted, target)
    return found


def _optimum(fitted: Fitted, target: float | None) -> dict[str, Any]:
    """The exponent of the best size, and the best size, tokens and loss at the target."""
    one = {name: np.array([value]) for name, value in fitted.parameters.items()}

    def both(quantity):
        samples = quantity(fitted.samples) if fitted.samples else None
        return _with_interval(float(quantity(one)[0]), samples)

    found = {"n_exponent": both(lambda p: _beta(p) / (p["alpha"] + _beta(p)))}
    if target is None:
        return found
    at = {
        "n": lambda p: best_size(p, target),
        "d": lambda p: target / (FLOPS * best_size(p, target)),
        "tokens_per_parameter": lambda p: target / (FLOPS * best_size(p, target) ** 2),
        "loss": lambda p: _loss(p, best_size(p, target), target),
    }
    return found | {"optimum": {"c": target} | {name: both(f) for name, f in at.items()}}


def best_size(parameters: dict[str, np.ndarray], c: float) -> np.ndarray:
    """N that minimises Chinchilla's law under C = 6ND (Hoffmann et al. 2022, §3.3, eq. 4)."""
    p, beta = parameters, _beta(parameters)
    ratio = p["alpha"] * p["A"] / (beta * p["B"])
    return ratio ** (1 / (p["alpha"] + beta)) * (c / FLOPS) ** (beta / (p["alpha"] + beta))


def _beta(parameters):
    return parameters.get("beta", parameters["alpha"])


def _loss(p, n, c):
    return p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * (c / (FLOPS * n)) ** -_beta(p)


def _of_minima(found: isoflop.IsoFlop, target: float | None) -> dict[str, Any]:
    samples = found.samples if len(found.samples) else None
    result: dict[str, Any] = {
        "law": "N_opt = G · C^a",
        "n_exponent": _with_interval(found.exponent, samples),
        "scale": found.scale,
        "budgets": [vars(minimum) for minimum in found.minima],
    }
    if target is not None:
        n = found.optimum(target)
        result["optimum"] = {"c": target, "n": {"value": n}, "d": {"value": target / (FLOPS * n)}}
    return result


def _with_interval(value: float, samples: np.ndarray | None) -> dict[str, Any]:
    if samples is None:
        return {"value": value}
    return {"value": value, "interval": list(laws.percentiles(samples))}


def _check_distance(target: float, largest: float, force: bool) -> None:
    if not (math.isfinite(target) and target > 0):
        raise UserError(f"target={target} must be a positive number of FLOPs.")
    if target > FARTHEST * largest and not force:
        raise UserError(
            f"the target of {target:.3g} FLOPs is {target / largest:,.0f} times the largest fitted "
            f"run; beyond {FARTHEST:g} times a law is a guess: --force makes it."
        )


def write(result: dict[str, Any], out: str) -> Path:
    """Stores a fit's numbers as fit.json in the folder `out`; returns its path."""
    path = Path(out) / "fit.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return path
