"""Every method under its name: what it fits, to which of the points, and what follows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import (
    constrained,
    curved,
    envelope,
    isoflop,
    kaplan,
    laws,
    optimum,
    projection,
)
from t5x_lite.scaling.laws import Columns, Fitted, Noise, Predicts

_REPEATED = 1.01  # reads of a unique token, from which on they aren't fresh


@dataclasses.dataclass(frozen=True)
class Draws:
    """What all methods draw alike.

    Attributes:
      weights: how often each draw has each point, [draws, points].
      seed: of draws that a method makes itself, and of starts.
      delta: of the Huber loss.
      noise: errors of losses, or None for no intervals by them.
      starts: of every search, or None for each law's own number.
    """

    weights: np.ndarray
    seed: int
    delta: float
    noise: Noise | None = None
    starts: int | None = None

    @property
    def count(self) -> int:
        """How many draws there are."""
        return len(self.weights)

    def options(self) -> dict[str, Any]:
        """What every law's fit takes."""
        starts = {} if self.starts is None else {"starts": self.starts}
        return {"seed": self.seed, "delta": self.delta} | starts


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a method found.

    Attributes:
      found: its numbers, for fit.json.
      draws: "value", its parameters, and samples for each kind of interval.
      along: the optimum that follows, if one does.
      law: what predicts losses, if something does.
      rows: which of the points it was fitted to; None for all.
    """

    found: dict[str, Any]
    draws: dict[str, Mapping[str, Any]]
    along: optimum.Along | None = None
    law: Predicts | None = None
    rows: np.ndarray | None = None


def surfaces(columns: Columns) -> dict[str, Callable[..., Fitted]]:
    """Laws that predict the loss of any run, by name: fits of columns, as `laws.fit` is called."""
    if "density" in columns:
        return {"sparse": functools.partial(laws.fit, laws.SPARSE)}
    found: dict[str, Callable[..., Fitted]] = {
        "approach_3": functools.partial(laws.fit, laws.CHINCHILLA),
        "approach_3_tied": functools.partial(laws.fit, laws.TIED),
        "variable_projection": _projection,
        "kaplan_nd": functools.partial(curved.fit, kaplan.BOTH),
    }
    if "unique" in columns:
        repeated = {"": constrained.CONSTRAINED, "_tied": constrained.TIED}
        return {
            f"data_constrained{tied}": functools.partial(curved.fit, law)
            for tied, law in repeated.items()
        } | found
    return found


def _projection(columns, delta=None, starts=None, **options):
    """Least squares that have one minimum need neither a δ nor starts."""
    return projection.fit(columns, **options)


def rows_of(name: str, columns: Columns) -> np.ndarray | None:
    """Which points a method may be fitted to; None for all: most know of no repeated tokens."""
    if "unique" not in columns or name.startswith("data_constrained"):
        return None
    return np.flatnonzero(columns["d"] <= _REPEATED * columns["unique"])


def plans(
    columns: Columns,
    curves: Columns | None,
    draws: Draws,
    flops: float | None,
    unique: float | None = None,
) -> dict[str, Callable[[], Estimate]]:
    """Every method that may apply, by name; it raises a UserError where it can't be fitted.

    Args:
      columns: finished runs.
      curves: rows of their training curves.
      draws: for the intervals.
      flops: k of C = k·N·D; None where not all three are known.
      unique: tokens that differ at the target, of the law of repeated ones.
    """
    every = _plans(columns, curves, draws, flops, unique)
    return {name: _unless_lacking(name, columns, plan) for name, plan in every.items()}


def _unless_lacking(name, columns, plan):
    """`plan`, or what says which of N, D and C it lacks."""
    alone = {"kaplan_n": ("n",), "kaplan_d": ("d",), "kaplan_c": ("c",)}
    needs = alone.get(name.removesuffix("_floor"), ("n", "d"))
    lacks = [column.upper() for column in needs if column not in columns]
    if not lacks:
        return plan

    def refuse():
        raise UserError(
            f"no {' and no '.join(lacks)} is known: name one more column by {absent(columns)}."
        )

    return refuse


def absent(columns: Columns) -> str:
    """Options that name what the runs lack of N, D and C: "--d or --c"."""
    return " or ".join(f"--{column}" for column in "ndc" if column not in columns)


def _plans(columns, curves, draws, flops, unique):
    found: dict[str, Callable[[], Estimate]] = {}
    for name, fit in surfaces(columns).items():
        found[name] = functools.partial(_surface, name, fit, columns, draws, flops, unique)
    if "density" in columns:
        return found
    fresh = rows_of("", columns)
    kept = columns if fresh is None else {key: v[fresh] for key, v in columns.items()}
    for curve in ("parabola", "akima"):
        found[f"approach_2_{curve}"] = functools.partial(_isoflop, kept, curve, draws, flops)
    found["approach_1"] = functools.partial(_envelope, curves or kept, draws, flops)
    for column in ("n", "d", "c"):
        for floor in (False, True):
            name = f"kaplan_{column}{'_floor' if floor else ''}"
            found[name] = functools.partial(_of_one, kept, fresh, column, floor, draws)
    return found


def _surface(name, fit, columns, draws, flops, unique):
    rows = rows_of(name, columns)
    weights = draws.weights
    if rows is not None:
        columns = {key: values[rows] for key, values in columns.items()}
        weights = weights[:, rows]
    if not len(weights):
        weights = None
    fitted = fit(columns, weights=weights, noise=draws.noise, **draws.options())
    weak = dict(fitted.weak)
    if "unique" in fitted.law.columns:
        weak = constrained.not_identified(fitted, columns) | weak
    found = _described(fitted, weak)
    if not optimum.has_optimum(fitted.law):
        return Estimate(found, _draws(fitted), None, fitted.law, rows)
    found["n_exponent"] = interval(
        *(optimum.exponent(fitted.law, _arrays(each)) if each else None
          for each in _draws(fitted).values())
    )  # fmt: skip
    along = optimum.of_law(fitted.law, flops, unique)
    return Estimate(found, _draws(fitted), along, fitted.law, rows)


def _described(fitted, weak):
    """Parameters with their intervals, and those that aren't identified."""
    found: dict[str, Any] = {
        "law": fitted.law.name,
        "objective": fitted.objective,
        "parameters": {
            name: interval(value, fitted.samples.get(name), fitted.noisy.get(name))
            for name, value in fitted.parameters.items()
        },
    }
    if fitted.samples:
        weak = laws.vague(fitted.samples, fitted.law.exponents) | weak
    if weak:
        found["not_identified"] = weak
    return found


def _isoflop(columns, curve, draws, flops):
    fitted = isoflop.fit(columns, curve, bootstraps=draws.count, seed=draws.seed, noise=draws.noise)
    samples = {"a": fitted.samples, "G": fitted.scales, **fitted.lowest_samples}
    value = {"a": [fitted.exponent], "G": [fitted.scale], **fitted.lowest}
    found = {
        "law": "N_opt = G · C^a",
        "n_exponent": interval(fitted.exponent, fitted.samples, fitted.noisy.get("a")),
        "scale": fitted.scale,
        "budgets": [vars(minimum) for minimum in fitted.minima],
    }
    sets = {"value": value, "interval": _known(samples), "noise_interval": _known(fitted.noisy)}
    return Estimate(found, sets, optimum.of_powers(flops))


def _envelope(columns, draws, flops):
    fitted = envelope.fit(columns, bootstraps=draws.count, seed=draws.seed)
    samples = _known(fitted.samples)
    found = {
        "law": "N_opt = G · C^a, D_opt = H · C^b",
        "n_exponent": interval(fitted.parameters["a"], samples.get("a")),
        "d_exponent": interval(fitted.parameters["b"], samples.get("b")),
        "scale": fitted.parameters["G"],
        "curves": fitted.curves,
        "envelope": {name: getattr(fitted, name).tolist() for name in ("c", "n", "d", "loss")},
    }
    sets = {"value": fitted.parameters, "interval": samples}
    return Estimate(found, sets, optimum.of_powers(flops))


def _of_one(columns, fresh, column, floor, draws):
    fitted, rows = kaplan.fit_one(
        columns, column, floor, bootstraps=draws.count, noise=draws.noise,
        **{"starts": 40} | draws.options(),
    )  # fmt: skip
    critical = kaplan.with_critical(fitted, column)
    found = _described(critical, dict(fitted.weak))
    found["law"] = f"{'E + ' if floor else ''}({column.upper()}_c/{column.upper()})^α"
    found["rows"] = (rows if fresh is None else fresh[rows]).tolist()
    if column != "c" and (caveat := kaplan.held_back(columns, column)):
        found["caveat"] = caveat
    along = optimum.of_compute(fitted.law) if column == "c" else None
    rows = rows if fresh is None else fresh[rows]
    return Estimate(found, _draws(fitted), along, fitted.law, rows)


# --- intervals -----------------------------------------------------------------------------------


def _known(samples):
    """Draws that have a line; none at all where there are none."""
    if not samples or not len(samples["a"]):
        return {}
    known = np.isfinite(samples["a"])
    return {name: values[known] for name, values in samples.items()} if known.any() else {}


def _draws(fitted):
    return {
        "value": fitted.parameters,
        "interval": fitted.samples,
        "noise_interval": fitted.noisy,
    }


def _arrays(values):
    return {name: np.atleast_1d(np.asarray(v, float)) for name, v in values.items()}


def interval(value, samples=None, noisy=None) -> dict[str, Any]:
    """A value with the 95% intervals that its samples make."""
    found: dict[str, Any] = {"value": float(np.reshape(value, -1)[0])}
    return found | laws.interval("interval", samples) | laws.interval("noise_interval", noisy)
