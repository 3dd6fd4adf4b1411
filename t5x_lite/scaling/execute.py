"""Running a sweep's runs on this machine, or through a command that starts them elsewhere."""

import functools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from t5x_lite import environment
from t5x_lite.errors import UserError
from t5x_lite.metrics import FILE_NAME
from t5x_lite.scaling import pool, records, trunk
from t5x_lite.scaling.pool import DONE, FAILED, Job
from t5x_lite.scaling.sweep import CONFIGS, LOGS, RUNS, Run
from t5x_lite.scaling.watch import Watch, short

SENT = "sent"  # started elsewhere, by a command that didn't wait


def execute(
    runs: Sequence[Run],
    out: Path,
    *,
    workers: int | None = None,
    retries: int = 2,
    launch: str | None = None,
    console: Console | None = None,
) -> int:
    """Runs what isn't finished; the sweep's folder is written already.

    Args:
      runs: those to run.
      out: the sweep's folder.
      workers: runs at once; None: a core each, or one where there are accelerators.
      retries: how often a run that fails is started again.
      launch: a command that gets what `train` gets, such as `bash launch/tpu_vm.sh train … --`;
        `{name}` in it stands for the run's name. None: here.
      console: where to print.

    Returns:
      the number of the signal that stopped it, or 0.

    Raises:
      UserError: some runs failed, the disk is full, or a number is out of range.
    """
    workers = _workers() if workers is None else workers
    if workers < 1 or retries < 0:
        raise UserError(f"workers={workers} must be at least 1, and retries={retries} at least 0.")
    console = console or Console()
    jobs = [_job(run, out, launch) for run in runs]
    with Watch(out, runs, jobs, console, workers) as watch:
        stopped = pool.run(
            jobs, workers=workers, environment=_environment(workers, launch), retries=retries,
            watch=watch.update,
        )  # fmt: skip
    failed = [job for job in jobs if job.state == FAILED]
    for job in failed:
        console.print(
            f"{job.name} failed after {job.tries} tries ({job.log}): {job.why}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    done = sum(job.state in (DONE, SENT) for job in jobs)
    if stopped:
        console.print(f"stopped; {done} of {len(jobs)} runs are done; the same command goes on.")
    elif failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed ({', '.join(j.name for j in failed[:3])}"
            f"{', …' if failed[3:] else ''}): {failed[0].why or failed[0].log}"
        )
    return stopped


def _job(run: Run, out: Path, launch: str | None) -> Job:
    folder = out / RUNS / run.name

    def ended() -> str:
        if records.is_finished(out, run):
            return DONE
        return FAILED if launch is None else SENT

    return Job(
        run.name,
        command(run, out, launch),
        out / LOGS / f"{run.name}.log",
        cost=run.facts["c"],
        kin=run.kin if launch is None else "",
        after=run.after[0] if run.after else None,
        prepare=functools.partial(trunk.begin, out, run) if run.after else lambda: None,
        has_compiled=(folder / FILE_NAME).exists,
        ended=ended,
        state=DONE if records.is_finished(out, run) else pool.WAITING,
    )


def command(run: Run, out: Path, launch: str | None = None) -> list[str]:
    """The words that train one run."""
    options = ["--gin_file", str(out / CONFIGS / f"{run.name}.gin")]
    options += ["--model_dir", str(out / RUNS / run.name)]
    if launch is None:
        return [sys.executable, "-m", "t5x_lite", "train", *options]
    return [word.replace("{name}", run.name) for word in shlex.split(launch)] + options


def _workers() -> int:
    has_gpu = Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()
    if has_gpu or environment.has_tpu(Path("/sys/bus/pci/devices")):
        return 1
    return _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(workers: int, launch: str | None) -> dict[str, str]:
    """Variables of this process, and a share of the cores for each run."""
    variables = dict(os.environ)
    # Small programs are worth keeping too: the next run of the same shapes finds them.
    variables.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    variables.setdefault("PYTHONUNBUFFERED", "1")  # logs are read while they grow
    if launch is None and workers > 1 and not environment.emulated_devices(variables):
        threads = str(max(1, _cores() // workers))
        # XLA's pool of threads, and those of libraries beneath NumPy.
        for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            variables.setdefault(name, threads)
    return variables


def show_plan(runs: Sequence[Run], out: Path, launch: str | None, console: Console) -> None:
    """Prints what would be run: sizes, then the command of each run."""
    table = Table("run", box=None, pad_edge=False)
    for name in ("N", "all parameters", "D", "D/N", "C", "batch", "rate"):
        table.add_column(name, justify="right")
    for run in runs:
        known = run.facts
        table.add_row(
            run.name, short(known["n"]), short(known["n_total"]), short(known["d"]),
            f"{known['d'] / known['n']:.3g}", f"{known['c']:.3e}", short(known["batch_tokens"]),
            f"{known['learning_rate']:.3g}",
        )  # fmt: skip
    console.print(table)
    total = sum(run.facts["c"] for run in runs)
    console.print(f"{len(runs)} runs, {total:.3e} FLOPs in all", highlight=False)
    for run in runs:
        words = shlex.join(command(run, out, launch or "t5x_lite train"))
        console.print(words, markup=False, highlight=False, soft_wrap=True)
