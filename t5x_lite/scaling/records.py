"""Measured losses of a sweep's runs as rows: `runs.jsonl`, which `fit` reads as it is.

A row for each held-out loss that a run has logged. Its columns:

    run, final          its name, and whether it had ended (`fit` leaves the others out)
    n                   parameters by what they compute: c / 6d, so that C = 6ND holds
    n_total, n_non_embedding, n_active
                        all parameters; without tables of the vocabulary; those that a token meets
    d                   tokens trained on: positions, padding included, of both sides
    c                   training FLOPs of all matrix products, counted
    loss                held-out, in nats a token
    step, steps         updates so far, and of the whole run
    batch_size, batch_tokens, length
                        rows, and tokens, of a batch; tokens of a row
    learning_rate, schedule, optimizer, seed, family
                        the schedule's peak; its name in gin; "decoder-only", …
    gin_hash            of the run's configuration, configs/NAME.gin
    seconds             of wall-clock, compiling and evaluating included
    hardware, devices, jax, t5x_lite
                        kind of device and how many; versions
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.metrics import MetricsLog
from t5x_lite.scaling.sweep import RUNS, Run, write_text

FITTED, HELD_OUT = "runs.jsonl", "held_out.jsonl"
LOSS = "eval/loss"
_COLUMNS = (
    *("batch_size", "batch_tokens", "length", "learning_rate", "schedule", "optimizer"),
    *("seed", "family"),
)


def columns(path: str) -> dict[str, str]:
    """Which column is what for `points.read`, if the file is a sweep's; nothing of any other."""
    names = ("n", "d", "c", "run", "final")
    try:
        with Path(path).open(encoding="utf-8") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    own = isinstance(row, dict) and {*names, "gin_hash"} <= row.keys()
    return {name: name for name in names} if own else {}


def collect(out: Path, runs: Sequence[Run]) -> dict[str, int]:
    """Writes what the runs have measured so far; returns rows by file."""
    written = {}
    for name, held_out in ((FITTED, False), (HELD_OUT, True)):
        rows = [row for run in runs if run.held_out == held_out for row in rows_of(out, run)]
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(out / name, text)
            written[name] = len(rows)
    return written


def rows_of(out: Path, run: Run) -> Iterator[dict[str, Any]]:
    """The rows of one run, by step."""
    folder, known = out / RUNS / run.name, run.facts
    place = _environment(folder)
    for step, loss, seconds in losses(folder):
        yield {
            "run": run.name,
            "final": step == known["steps"],
            "n": known["n"],
            **{name: known[name] for name in ("n_total", "n_non_embedding", "n_active")},
            "d": step * known["batch_tokens"],
            "c": step * known["step_flops"],
            "loss": loss,
            "step": step,
            "steps": known["steps"],
            **{name: known[name] for name in _COLUMNS},
            "gin_hash": run.gin_hash,
            "seconds": round(seconds, 3),
            **place,
        }


def losses(folder: Path) -> Iterator[tuple[int, float, float]]:
    """Step, held-out loss and seconds until then, over all of a run's starts."""
    before = last = 0.0
    for row in MetricsLog(folder).read():
        now = row.get("seconds", last)
        if now < last:  # started again
            before += last
        last = now
        if LOSS in row:
            yield row["step"], row[LOSS], before + last


def progress(folder: Path) -> dict[str, Any]:
    """The newest `step`, `loss`, `seconds` and held-out loss of a run; empty before the first."""
    newest: dict[str, Any] = {}
    for row in MetricsLog(folder).read():
        newest |= {name: row[name] for name in ("step", "loss", "seconds", LOSS) if name in row}
    return newest


def is_finished(out: Path, run: Run) -> bool:
    """Whether the run's last held-out loss is there."""
    return any(step >= run.facts["steps"] for step, *_ in losses(out / RUNS / run.name))


def _environment(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'environment.json'} can't be read ({error}).") from error
    packages = found.get("packages", {})
    return {
        "hardware": found.get("device_kind"),
        "devices": found.get("devices"),
        **{name: packages.get(name) for name in ("jax", "t5x_lite")},
    }
