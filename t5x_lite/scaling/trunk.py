"""Runs that share their way: one trunk at a constant rate, and a cool-down for every length.

Until it cools down, a run of warm-up, constant rate and decay is the same as every longer one
(Hägele et al. 2024, §4). So each run begins with the checkpoint of the next shorter one, saved
where that began to cool down, and is bitwise the run that was trained alone.
"""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.metrics import FILE_NAME
from t5x_lite.scaling.sweep import RUNS, Run

CHECKPOINTS = "checkpoints"  # in a run's folder
FREE = ("STEPS", "CHECKPOINT_PERIOD")  # what runs of one trunk may differ in


Given = tuple[str, dict[str, Any], dict[str, Any]]  # a run's name, values, arguments of `train`


def starts(runs: Sequence[Given]) -> dict[str, tuple[str, int]]:
    """For each run that shares another's way, that one and the step where they part.

    Args:
      runs: name, gin values and arguments of `train`.

    Raises:
      UserError: two runs of one trunk learn at different rates before they part.
    """
    groups: dict[str, list] = {}
    for run in runs:
        key = sorted((name, str(v)) for name, v in run[1].items() if name not in FREE)
        groups.setdefault(str(key), []).append(run)
    found = {}
    for group in groups.values():
        ordered = sorted(group, key=lambda run: run[2]["steps"])
        for (before, _, short), (name, _, long) in itertools.pairwise(ordered):
            period = short.get("checkpoint_period")
            at = period and (short["steps"] - 1) // period * period
            if not at:
                raise UserError(
                    f"run {name} is to begin where {before} cools down, and {before} saves nothing "
                    f"before its end: set its CHECKPOINT_PERIOD to the step where it cools down."
                )
            _check_rates(before, short, name, long, at)
            found[name] = (before, at)
    return found


def _check_rates(before: str, short: dict, name: str, long: dict, at: int) -> None:
    steps = np.unique(np.linspace(0, at - 1, min(at, 1000)).round())
    rates = [np.asarray(run["optimizer"].schedule(jnp.asarray(steps))) for run in (short, long)]
    apart = np.flatnonzero(rates[0] != rates[1])
    if len(apart):
        first = apart[0]
        raise UserError(
            f"runs {before} and {name} can't share their first {at} steps: at step "
            f"{steps[first]:.0f} their rates are {rates[0][first]:g} and {rates[1][first]:g}; give "
            f"WARMUP_STEPS as whole steps, and CHECKPOINT_PERIOD where the decay begins."
        )


def begin(out: Path, run: Run) -> None:
    """Gives a run that hasn't begun the checkpoint and the log of the one it shares its way with.

    Raises:
      UserError: that checkpoint is gone, or the disk is full.
    """
    before, at = run.after
    source, target = (out / RUNS / name for name in (before, run.name))
    if any(path.name.isdecimal() for path in (target / CHECKPOINTS).glob("*")):
        return
    if not (source / CHECKPOINTS / str(at)).is_dir():
        raise UserError(
            f"run {run.name} begins with the checkpoint of {before} at step {at}, which is gone: "
            f"remove {source}, and {before} makes it again."
        )
    beside = target / f".{at}.tmp"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source / CHECKPOINTS / str(at), beside)
        shutil.copyfile(source / FILE_NAME, target / FILE_NAME)
        (target / CHECKPOINTS).mkdir(exist_ok=True)
        beside.rename(target / CHECKPOINTS / str(at))
    except (OSError, shutil.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{target} cannot be written: {why}.") from error
