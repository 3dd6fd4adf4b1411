"""What a sweep's finished runs predict for those that it holds out, written down beforehand."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from t5x_lite.errors import UserError
from t5x_lite.scaling import laws, records
from t5x_lite.scaling.sweep import RUNS, Run, write_text

FILE = "predictions.json"
_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one run's last held-out loss, in nats.

    Attributes:
      run: its name.
      loss: by Chinchilla's law through the finished runs.
      interval: 95%, of the law's bootstraps and of a run's scatter around it.
      times: its compute over the largest that was fitted.
      runs: how many were fitted.
      made: when, UTC.
    """

    run: str
    loss: float
    interval: tuple[float, float]
    times: float
    runs: int
    made: str


def predict(
    columns: laws.Columns, held_out: Sequence[tuple[str, float, float]], *, seed: int = 0
) -> list[Prediction]:
    """Losses of other sizes, by the law E + A/N^α + B/D^β.

    Args:
      columns: "n", "d" and "loss" of finished runs.
      held_out: name, N and D of each run to predict.
      seed: of the draws.
    """
    fitted = laws.fit(laws.CHINCHILLA, columns, bootstraps=_DRAWS, seed=seed)
    count = len(columns["loss"])
    residuals = np.log(columns["loss"]) - np.log(fitted.law.predict(fitted.parameters, columns))
    residuals *= np.sqrt(count / (count - len(fitted.parameters)))  # those of a fit are too small
    scatter = np.random.default_rng(seed).choice(residuals, _DRAWS)
    largest = float(np.max(np.asarray(columns["n"]) * columns["d"]))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = []
    for name, n, d in held_out:
        one = {"n": np.array([n]), "d": np.array([d])}
        p = fitted.samples
        draws = p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]
        loss = float(fitted.law.predict(fitted.parameters, one)[0])
        interval = laws.percentiles(draws * np.exp(scatter))
        found.append(Prediction(name, loss, interval, n * d / largest, count, now))
    return found


def write_down(out: Path, runs: Sequence[Run], console: Console) -> None:
    """Predicts the runs that are held out and haven't begun, and prints and stores it.

    Raises:
      UserError: the others haven't finished, or are too few.
    """
    stored = read(out)
    held_out = [run for run in runs if run.held_out and run.name not in stored]
    begun = [run.name for run in held_out if records.progress(out / RUNS / run.name)]
    if begun:
        raise UserError(f"run {begun[0]} has begun already, and a prediction comes before: remove "
                        f"{out / RUNS / begun[0]}.")  # fmt: skip
    if held_out:
        for one in predict(_columns(out, runs), [_sizes(run) for run in held_out]):
            stored[one.run] = dataclasses.asdict(one)
        write_text(out / FILE, json.dumps(list(stored.values()), indent=1) + "\n")
    for one in stored.values():
        low, high = one["interval"]
        console.print(
            f"{one['run']}: predicted {one['loss']:.4f}, 95% {low:.4f} … {high:.4f}, from "
            f"{one['runs']} runs of up to {1 / one['times']:.2g} of its compute",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def compare(out: Path, runs: Sequence[Run], console: Console) -> None:
    """Prints what was predicted beside what came out, for runs that are finished."""
    stored = read(out)
    for run in runs:
        one = stored.get(run.name)
        last = [loss for step, loss, _ in records.losses(out / RUNS / run.name)
                if step == run.facts["steps"]]  # fmt: skip
        if one is None or not last:
            continue
        low, high = one["interval"]
        inside = "inside" if low <= last[-1] <= high else "outside"
        console.print(
            f"{run.name}: predicted {one['loss']:.4f}, measured {last[-1]:.4f}, "
            f"{one['loss'] / last[-1] - 1:+.2%}; {inside} the interval, "
            f"{(high - low) / one['loss']:.1%} wide",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def read(out: Path) -> dict[str, dict[str, Any]]:
    """What has been predicted in a sweep's folder, by run."""
    try:
        return {row["run"]: row for row in json.loads((out / FILE).read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{out / FILE} can't be read ({error}).") from error


def _columns(out: Path, runs: Sequence[Run]) -> dict[str, np.ndarray]:
    fitted = [run for run in runs if not run.held_out]
    rows = [row for run in fitted for row in records.rows_of(out, run) if row["final"]]
    if len(rows) < len(fitted):
        raise UserError(
            f"{len(fitted) - len(rows)} of the {len(fitted)} runs that the prediction needs aren't "
            f"finished; run them first, without --held_out."
        )
    return {name: np.array([row[name] for row in rows], float) for name in ("n", "d", "loss")}


def _sizes(run: Run) -> tuple[str, float, float]:
    return run.name, run.facts["n"], float(run.facts["d"])
