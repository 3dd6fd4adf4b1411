"""How far to trust a law: fit it without the largest budgets, predict them, and compare."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import isoflop, laws
from t5x_lite.scaling.laws import Columns, Fitted

_SHARE = 0.1  # of the runs are held out at least, where that is left open


def held_out(c: np.ndarray, budgets: int | None = None) -> np.ndarray:
    """Which runs are of the largest budgets: as many as asked for, or as hold a tenth of all.

    Args:
      c: FLOPs of the runs.
      budgets: how many; None for the fewest that have a tenth of the runs.

    Raises:
      UserError: no budget would be left.
    """
    groups = isoflop.budgets(np.log(c))
    if budgets is None:
        sizes = np.cumsum([len(group) for group in groups[::-1]])
        budgets = int(np.searchsorted(sizes, _SHARE * len(c))) + 1
    if not 0 < budgets < len(groups):
        raise UserError(
            f"{budgets} budgets can't be held out: the runs have {len(groups)}, and one must stay."
        )
    out = np.zeros(len(c), bool)
    out[np.concatenate(groups[-budgets:])] = True
    return out


def check(
    fits: Mapping[str, Callable[..., Fitted]],
    columns: Columns,
    out: np.ndarray,
    *,
    bootstraps: int = 200,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Predictions of the runs that are held out, by every law, with their 95% intervals.

    A prediction's interval holds a new run's loss: the law's own doubt, and the errors of the runs
    that it was fitted to.

    Args:
      fits: of `methods.surfaces`.
      columns: all runs.
      out: which of them are held out.
      bootstraps: draws for the intervals; 0 for none.
      seed: of the draws.
      options: of the fits.
    """
    kept = {name: values[~out] for name, values in columns.items()}
    new = {name: values[out] for name, values in columns.items()}
    count = int(np.sum(~out))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=bootstraps)
    result: dict[str, Any] = {
        "rows": np.flatnonzero(out).tolist(),
        "largest_c_fitted": float(kept["c"].max()),
        "times": float(new["c"].max() / kept["c"].max()),
        "methods": {},
        "refused": {},
    }
    for name, fit in fits.items():
        try:
            fitted = fit(kept, seed=seed, weights=weights if bootstraps else None, **options)
        except UserError as error:
            result["refused"][name] = str(error)
            continue
        result["methods"][name] = _compared(fitted, kept, new, rng)
    return result


def check_minima(
    columns: Columns, out: np.ndarray, curve: str, *, bootstraps: int = 200, seed: int = 0
) -> list[dict[str, Any]]:
    """What approach 2 says of the budgets that are held out, beside the minima of their own curves.

    Args:
      columns: all runs.
      out: which of them are held out.
      curve: of `isoflop.fit`.
      bootstraps: draws for the intervals; 0 for none.
      seed: of the draws.

    Returns:
      Of each held-out budget that has a minimum "c", "n" and "loss" as measured, and "predicted_n"
      and "predicted_loss".

    Raises:
      UserError: too few budgets are left.
    """
    kept = {name: values[~out] for name, values in columns.items()}
    new = {name: values[out] for name, values in columns.items()}
    fitted = isoflop.fit(kept, curve, bootstraps=bootstraps, seed=seed)
    value = {"G": fitted.scale, "a": fitted.exponent, **fitted.lowest}
    samples = {"G": fitted.scales, "a": fitted.samples, **fitted.lowest_samples}
    found = []
    for minimum in isoflop.minima(new, curve):
        if minimum.n is None:
            continue
        row: dict[str, Any] = {"c": minimum.c, "n": minimum.n, "loss": minimum.loss}
        for name, along in (
            ("predicted_n", lambda p, c=minimum.c: p["G"] * c ** p["a"]),
            ("predicted_loss", lambda p, c=minimum.c: p["E"] + p["F"] * c ** -p["gamma"]),
        ):
            at = float(np.reshape(along(value), -1)[0])
            if np.isfinite(at):
                row[name] = {"value": at} | laws.interval("interval", along(samples))
        found.append(row)
    return found


def _compared(fitted, kept, new, rng):
    predicted = fitted.law.predict(fitted.parameters, new)
    errors = np.log(new["loss"] / predicted)
    found: dict[str, Any] = {
        "predicted": predicted.tolist(),
        "rms_error": float(np.sqrt(np.mean(np.expm1(errors) ** 2))),
        "mean_error": float(np.mean(np.expm1(-errors))),
    }
    if not fitted.samples:
        return found
    residuals = np.log(kept["loss"] / fitted.law.predict(fitted.parameters, kept))
    spare = len(residuals) / max(1, len(residuals) - len(fitted.parameters))
    many = {name: values[:, None] for name, values in fitted.samples.items()}
    with np.errstate(all="ignore"):  # of draws that no law fits
        draws = fitted.law.predict(many, new)
    draws = draws[np.isfinite(draws).all(axis=1)]
    if not len(draws):
        return found
    draws = draws * np.exp(np.sqrt(spare) * rng.choice(residuals, draws.shape))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    inside = (low <= new["loss"]) & (new["loss"] <= high)
    return found | {
        "low": low.tolist(),
        "high": high.tolist(),
        "inside": float(np.mean(inside)),
    }
