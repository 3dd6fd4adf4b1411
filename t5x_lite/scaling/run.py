"""The verbs `sweep run` and `sweep status`."""

import fnmatch
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from t5x_lite.errors import UserError
from t5x_lite.scaling import execute, pool, prediction, records, sweep
from t5x_lite.scaling.sweep import Run, Sweep
from t5x_lite.scaling.watch import Watch


def run(
    grid: Sweep,
    runs: Sequence[Run],
    out: str,
    *,
    workers: int | None = None,
    retries: int = 2,
    only: str | None = None,
    held_out: bool = False,
    dry_run: bool = False,
    slurm: bool = False,
    launch: str | None = None,
    console: Console | None = None,
) -> int:
    """Runs a sweep, or a part of it, or prints how others can.

    Args:
      grid: the sweep.
      runs: of `sweep.plan`.
      out: its folder.
      workers: as in `execute`.
      retries: as in `execute`.
      only: names, separated by commas; * stands for anything.
      held_out: the runs that are held out instead of the others.
      dry_run: only print what would be run.
      slurm: only write the folder and print the command for Slurm.
      launch: as in `execute`.
      console: where to print.

    Returns:
      the number of the signal that stopped it, or 0.

    Raises:
      UserError: as in `sweep.write` and `execute.execute`, or no such run.
    """
    console = console or Console(width=None if Console().is_terminal else 160)
    folder = Path(out)
    chosen = _chosen(grid, runs, only, held_out)
    if dry_run:
        execute.show_plan(chosen, folder, launch, console)
        return 0
    with pool.locked(folder):
        sweep.write(grid, runs, folder)
        if slurm:
            _show_slurm(chosen, folder, console)
            return 0
        if held_out:
            prediction.write_down(folder, runs, console)
        try:
            return execute.execute(
                chosen, folder, workers=workers, retries=retries, launch=launch, console=console
            )
        finally:
            _report(folder, runs, console)


def _chosen(grid: Sweep, runs: Sequence[Run], only: str | None, held_out: bool) -> list[Run]:
    chosen = [run for run in runs if run.held_out == held_out]
    if not chosen:
        raise UserError(f"sweep {grid.name} holds no run out.")
    if only is None:
        return chosen
    patterns = [pattern.strip() for pattern in only.split(",")]
    for pattern in patterns:
        if not fnmatch.filter([run.name for run in chosen], pattern):
            names = ", ".join(run.name for run in chosen[:8])
            raise UserError(f"--only {pattern}: sweep {grid.name} has no such run; it has {names}"
                            f"{', …' if chosen[8:] else ''}.")  # fmt: skip
    return [run for run in chosen if any(fnmatch.fnmatch(run.name, p) for p in patterns)]


def _show_slurm(chosen: Sequence[Run], folder: Path, console: Console) -> None:
    """Writes the names of what isn't finished, a line each, and prints the array over them."""
    if any(run.after for run in chosen):
        raise UserError("runs of a trunk follow each other, and an array's don't: run them on one "
                        "machine, or by --launch.")  # fmt: skip
    names = [run.name for run in chosen if not records.is_finished(folder, run)]
    if not names:
        console.print(f"all {len(chosen)} runs are done.", highlight=False)
        return
    text = "".join(f"{name}\n" for name in names)
    # By content, so that an array that waits keeps its names.
    path = folder / f"array-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
    sweep.write_text(path, text)
    words = ["sbatch", f"--array=0-{len(names) - 1}", "launch/sweep.sbatch"]
    words += ["--out", str(folder), "--names", str(path)]
    console.print(shlex.join(words), markup=False, highlight=False, soft_wrap=True)
    console.print(f"then: t5x_lite sweep status --out {folder}", highlight=False, soft_wrap=True)


def status(out: str, console: Console | None = None) -> None:
    """Prints how far each run of a folder is, and writes their rows anew.

    Raises:
      UserError: the folder holds no sweep.
    """
    console = console or Console(width=None if Console().is_terminal else 160)
    folder = Path(out)
    name, runs = sweep.read(folder)
    console.print(f"sweep {name}", highlight=False)
    console.print(Watch(folder, runs, [], console).table())
    _report(folder, runs, console)


def _report(folder: Path, runs: Sequence[Run], console: Console) -> None:
    """Writes the rows of all runs anew, and compares those that were predicted."""
    prediction.compare(folder, runs, console)
    for file, rows in records.collect(folder, runs).items():
        console.print(f"{folder / file}: {rows} rows", highlight=False, soft_wrap=True)
