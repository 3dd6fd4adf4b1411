"""Fits of one set of points by every method that it allows, side by side, and what they predict.

Depends on NumPy and SciPy alone: `fit(Points({"n": …, "d": …, "c": …, "loss": …}))`.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import agreement, downstream, methods, optimum, validation
from t5x_lite.scaling.laws import Noise
from t5x_lite.scaling.methods import Draws, Estimate
from t5x_lite.scaling.points import Points

FARTHEST = 100.0  # times the largest fitted compute
_LAWS_FIRST = ("approach_3", "variable_projection", "data_constrained", "sparse", "kaplan_nd")


def fit(
    points: Points,
    *,
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    target: float | None = None,
    target_unique: float | None = None,
    force: bool = False,
    only: Sequence[str] = (),
    noise: str | None = None,
    chance: float | None = None,
    holdout: int | None = None,
    starts: int | None = None,
) -> dict[str, Any]:
    """Every number of every method that the points allow, json-able.

    Args:
      points: finished runs.
      delta: of the Huber loss of the log-loss.
      bootstraps: draws over runs for the 95% intervals; runs that differ in seed alone are drawn
        together.
      seed: of starts and draws.
      target: FLOPs to predict for; None for the largest that was fitted.
      target_unique: tokens that differ there, for the law of repeated ones; None for all.
      force: predict however far it is from the fitted compute.
      only: names of the methods to fit; none for all.
      noise: adds intervals for a law that is true and losses that err: as runs that differ in seed
        alone do ("seeds"), or as the points err from it ("residuals"). None: seeds, if there are.
      chance: the accuracy of guessing; None to fit it.
      holdout: how many of the largest budgets to predict from the others; None for those that have
        a tenth of the runs, 0 for no such check.
      starts: of every law's search; None for what each needs where nothing is known.

    Raises:
      UserError: too few points for any method, or a target too far away.
    """
    columns = points.columns
    largest = float(columns["c"].max()) if "c" in columns else None
    _check_numbers(columns, delta, bootstraps, target_unique, chance)
    _check_known_sizes(columns, target, holdout)
    if target is not None:
        _check_distance(target, largest, force)
    flops = _flops_of(columns)
    draws = _draws(columns, bootstraps, seed, delta, noise, starts)
    plans = methods.plans(columns, points.curves, draws, flops, target_unique)
    _check_known(only, [*plans, *(["downstream"] if "accuracy" in columns else [])])
    result: dict[str, Any] = {
        "points": len(points),
        "unfinished": points.unfinished,
        "dropped": points.dropped,
        "largest_c": largest,
        "flops_per_token_and_parameter": flops,
        "columns": {name: values.tolist() for name, values in columns.items()},
        "methods": {},
        "refused": {},
    }
    if draws.noise is not None:
        result["noise"] = _noise_found(columns, noise)
    at = largest if target is None else target
    budgets = None if largest is None else optimum.budgets_for(columns["c"], target)
    estimates: dict[str, Estimate] = {}
    for name, plan in plans.items():
        if only and name not in only:
            continue
        try:
            estimates[name] = plan()
        except UserError as error:
            result["refused"][name] = str(error)
            continue
        result["methods"][name] = _complete(estimates[name], columns, at, budgets)
    if not estimates:
        raise UserError(next(iter(result["refused"].values())))
    fresh = methods.rows_of("", columns)
    kept = columns if fresh is None else {name: values[fresh] for name, values in columns.items()}
    result["comparison"] = agreement.compare(result["methods"], kept, flops)
    if "accuracy" in columns and (not only or "downstream" in only):
        _add_downstream(result, estimates, columns, draws, chance, at, budgets)
    if holdout != 0:
        _add_validation(result, estimates, columns, draws, holdout)
    return _finite(result)


def _draws(columns, bootstraps, seed, delta, noise, starts=None) -> Draws:
    """Draws of whole groups of runs that differ in seed alone, and errors of the losses."""
    rng = np.random.default_rng(seed)
    count = len(columns["loss"])
    group = _same_sizes(columns) if "seed" in columns else np.arange(count)
    groups = group.max() + 1
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=bootstraps)[:, group]
    if noise is None and "seed" in columns and np.bincount(group).max() > 1:
        noise = "seeds"
    errors: Noise | None = None
    if noise == "seeds":
        deviations = _deviations(columns)

        def errors(residuals):
            return rng.choice(deviations, (bootstraps, len(residuals)))
    elif noise == "residuals":

        def errors(residuals):
            spare = np.sqrt(len(residuals) / max(1, len(residuals) - 5))
            return spare * rng.choice(residuals, (bootstraps, len(residuals)))

    return Draws(weights, seed, delta, errors if bootstraps else None, starts)


def _same_sizes(columns):
    """A number for each set of runs that differ in seed alone."""
    names = [name for name in ("n", "d", "c", "density", "unique") if name in columns]
    sizes = np.stack([np.round(np.log(columns[name]), 6) for name in names], axis=1)
    return np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)


def _deviations(columns):
    """How far log-losses of runs that differ in seed alone lie from their expectation."""
    if "seed" not in columns:
        raise UserError("noise of seeds needs the column that tells them apart: --seed_column.")
    group = _same_sizes(columns)
    runs = np.bincount(group)
    if runs.max() < 2:
        raise UserError("no two runs differ in seed alone; --noise residuals takes the law's own.")
    log_loss = np.log(columns["loss"])
    mean = np.bincount(group, log_loss) / runs
    spare = np.sqrt(runs / np.maximum(runs - 1, 1))
    return ((log_loss - mean[group]) * spare[group])[runs[group] > 1]


def _noise_found(columns, noise):
    if noise == "residuals":
        return {"of": "residuals"}
    deviations = _deviations(columns)
    return {
        "of": "seeds",
        "runs": len(deviations),
        "log_loss": float(np.sqrt(np.mean(deviations**2))),
    }


def _flops_of(columns):
    """k of C = k·N·D; None where not all three are known."""
    if not {"n", "d", "c"} <= columns.keys():
        return None
    return float(np.exp(np.mean(np.log(columns["c"] / (columns["n"] * columns["d"])))))


def _check_known(only, known):
    for name in only:
        if name not in known:
            raise UserError(f"no method {name!r} for these points; there are: {', '.join(known)}.")


def _complete(estimate, columns, target, budgets):
    """A method's numbers with its optimum and its predictions of every run."""
    found = dict(estimate.found)
    if estimate.along is not None:
        found |= optimum.describe(estimate.along, estimate.draws, target, budgets)
    if estimate.law is not None:
        found["predicted"] = estimate.law.predict(estimate.draws["value"], columns).tolist()
    if estimate.rows is not None:
        found["rows"] = estimate.rows.tolist()
    return found


def _add_downstream(result, estimates, columns, draws, chance, target, budgets):
    """Accuracy by loss, and by compute through the first law that has an optimum."""
    try:
        found = downstream.fit(columns, chance=chance, weights=draws.weights, seed=draws.seed)
    except UserError as error:
        result["refused"]["downstream"] = str(error)
        return
    result["downstream"] = described = {
        "law": downstream.LAW,
        "parameters": {
            name: methods.interval(value, found.samples.get(name))
            for name, value in found.parameters.items()
        },
        "rms_error": found.error,
        "predicted": downstream.accuracy(found.parameters, columns["loss"]).tolist(),
    }
    if found.weak:
        described["not_identified"] = found.weak
    name = next((name for name in _LAWS_FIRST if name in estimates), None)
    if name is None:
        return
    estimate = estimates[name]
    law_loss = estimate.law.predict(estimate.draws["value"], columns)
    described |= {
        "loss_by": name,
        "predicted_by_law": downstream.accuracy(found.parameters, law_loss).tolist(),
    }
    if estimate.along is None:
        return

    def along(parameters, c):
        loss = estimate.along(parameters, c)["loss"]
        return {"loss": loss, "accuracy": downstream.accuracy(parameters, loss)}

    both = {
        "value": {**estimate.draws["value"], **found.parameters},
        "interval": {**estimate.draws["interval"], **found.samples} if found.samples else {},
    }
    described |= optimum.describe(along, both, target, budgets)


def _add_validation(result, estimates, columns, draws, holdout):
    fits = {
        name: fit_one
        for name, fit_one in methods.surfaces(columns).items()
        if name in estimates and methods.rows_of(name, columns) is None
    }
    if not fits and not any(name.startswith("approach_2") for name in estimates):
        return
    try:
        out = validation.held_out(columns["c"], holdout)
    except UserError as error:
        if holdout is not None:
            raise
        result["refused"]["validation"] = str(error)
        return
    result["validation"] = validation.check(
        fits, columns, out, bootstraps=min(200, draws.count), **draws.options()
    )
    result["validation"]["minima"] = minima = {}
    for curve in ("parabola", "akima"):
        if f"approach_2_{curve}" in estimates and "unique" not in columns:
            try:
                minima[f"approach_2_{curve}"] = validation.check_minima(
                    columns, out, curve, bootstraps=min(200, draws.count), seed=draws.seed
                )
            except UserError as error:
                result["validation"]["refused"][f"approach_2_{curve}"] = str(error)


def _check_numbers(columns, delta, bootstraps, target_unique, chance) -> None:
    if not delta > 0:
        raise UserError(f"delta={delta} must be positive; 0.001 is usual.")
    if bootstraps < 0:
        raise UserError(f"bootstraps={bootstraps} must be 0, for no intervals, or more.")
    if target_unique is not None and "unique" not in columns:
        raise UserError("a target's unique tokens need those of the runs: --unique.")
    if target_unique is not None and not (math.isfinite(target_unique) and target_unique > 0):
        raise UserError(f"target_unique={target_unique} must be a positive number of tokens.")
    if chance is not None and "accuracy" not in columns:
        raise UserError("a chance needs accuracies: --accuracy.")


def _check_known_sizes(columns, target, holdout) -> None:
    known = [column.upper() for column in "ndc" if column in columns]
    if not known:
        raise UserError("points need N, D or C beside their loss.")
    if target is not None and "C" not in known:
        raise UserError(
            f"a target is in FLOPs, and of the runs {known[0]} alone is known: name one more "
            f"column by {methods.absent(columns)}."
        )
    if holdout and len(known) == 1:
        raise UserError(
            f"no law of {known[0]} alone is tried on budgets that are held out: name one more "
            f"column by {methods.absent(columns)}, or leave --holdout out."
        )


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


def _finite(found: Any) -> Any:
    """None in place of numbers that JSON doesn't know."""
    if isinstance(found, dict):
        return {name: _finite(each) for name, each in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(each) for each in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
