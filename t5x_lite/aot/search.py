"""`compile --search`: the settings of a run that fit a topology, and the fastest by the model.

Candidates are batch × remat × rule table × microbatches. Arithmetic leaves out what can't be it;
the others are compiled by commands of their own, as many at once as this host has cores and memory.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from t5x_lite.aot import topology as topologies
from t5x_lite.aot.candidates import GIB, Arithmetic, Candidate, Trial, candidates
from t5x_lite.aot.pool import Pool, share
from t5x_lite.errors import UserError

SHOWN = 12  # rows of the table
_PAUSE = 0.2  # seconds between looks


def search(
    run: Mapping[str, Any],
    command: Sequence[str],
    topology: str,
    *,
    batches: Sequence[int] | None = None,
    remats: Sequence[str] | None = None,
    tables: Sequence[str] | None = None,
    microbatches: Sequence[int] | None = None,
    workers: int | None = None,
    worker_memory: float | int | None = None,
    json_file: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Finds the candidate with the highest modelled MFU among those that fit, and prints it.

    Args:
        run: arguments of `compile_step`.
        command: the words that compile the run; overrides and --json are added.
        topology: for which.
        batches: rows a batch to try; None: the run's, half and twice as many.
        remats: policies of `nn.remat`; None: `REMATS`, and the run's own.
        tables: rule tables, each with its mesh, "fsdp_tp:tensor=4"; None: the run's own and
            `TABLES`.
        microbatches: parts of a batch; None: powers of two.
        workers: compilers at once; None: as many as cores and memory allow.
        worker_memory: GiB of the host that a compiler may take; None: its share of what is free.
        json_file: where to write what was found, as JSON.
        console: where to print.

    Returns:
        What `json_file` would hold: `topology`, `best` (a report of `compile` with `overrides`),
        and `others`, each with `overrides` and `why`.

    Raises:
        UserError: nothing fits, or a value that can't be tried.
    """
    console, target = console or Console(), topologies.find(topology)
    trials = [Trial(each) for each in candidates(run, batches, remats, tables, microbatches)]
    prune = Arithmetic(run, target)
    pool = Pool(command, run, *share(workers, worker_memory))
    try:
        _try_all(trials, prune, pool, console)
    except KeyboardInterrupt:
        _show(trials, run, topology, console)
        raise
    result = _result(trials, run, topology)
    if json_file is not None:
        _write(json_file, result)
    _show(trials, run, topology, console)
    if result["best"] is None:
        raise UserError(_nothing(trials, topology))
    return result


def _try_all(
    trials: Sequence[Trial],
    prune: Callable[[Candidate, Sequence[Trial]], str],
    pool: Pool,
    console: Console,
) -> None:
    todo = list(enumerate(trials))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with pool, Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=len(trials))
        while todo or pool.running:
            while pool.vacant and (place := _next(todo, pool.running)) is not None:
                number, trial = todo.pop(place)
                trial.why = prune(trial.candidate, trials)
                if not trial.why:
                    pool.start(number, trial)
            done = len(trials) - len(todo) - len(pool.running)
            bar.update(task, completed=done, description=_so_far(trials))
            if not pool.look() and pool.running:
                time.sleep(_PAUSE)


def _next(todo: Sequence[tuple[int, Trial]], running: Sequence[Trial]) -> int | None:
    """The first that no compiler at work may make needless: one of the same in fewer parts."""
    for place, (_, trial) in enumerate(todo):
        parts = trial.candidate.microbatches
        others = [dataclasses.replace(t.candidate, microbatches=parts) for t in running]
        if trial.candidate not in others:
            return place
    return None


def _so_far(trials: Sequence[Trial]) -> str:
    compiled, best = sum(t.compiled for t in trials), max(t.mfu for t in trials)
    return f"{compiled} compiled" + (f", best {best:.1%} MFU" if best else "")


def ranked(trials: Sequence[Trial], run: Mapping[str, Any]) -> list[Trial]:
    """Those that fit, fastest first; of equals the one that changes least of the run."""
    fitting = [trial for trial in trials if trial.mfu]
    changes = {id(trial): len(trial.candidate.overrides(run)) for trial in fitting}
    return sorted(fitting, key=lambda trial: (-round(trial.mfu, 3), changes[id(trial)]))


def _others(trials: Sequence[Trial], run: Mapping[str, Any]) -> list[Trial]:
    """All but the best: those that a compiler refused, those that are slower, those left out."""
    fitting = ranked(trials, run)
    for trial in fitting[1:]:
        trial.why = f"{trial.mfu:.1%} MFU"
    refused = [trial for trial in trials if trial.compiled and not trial.mfu]
    refused.sort(key=lambda trial: (trial.report or {"hbm": {}})["hbm"].get("total") or math.inf)
    left_out = [trial for trial in trials if trial.why and not trial.compiled]
    return [*refused, *fitting[1:], *left_out]


def _result(trials: Sequence[Trial], run: Mapping[str, Any], topology: str) -> dict[str, Any]:
    fitting, others = ranked(trials, run), _others(trials, run)
    best = None
    if fitting:
        best = {"overrides": fitting[0].candidate.overrides(run), **fitting[0].report}
    rows = [
        {"overrides": trial.candidate.overrides(run), "why": trial.why, "compiled": trial.compiled}
        for trial in others
    ]
    return {"topology": topology, "best": best, "others": rows}


def _show(trials: Sequence[Trial], run: Mapping[str, Any], topology: str, console: Console) -> None:
    fitting, others = ranked(trials, run), _others(trials, run)
    compiled = sum(trial.compiled for trial in trials)
    left_out = sum(bool(trial.why) and not trial.compiled for trial in trials)
    counts = f"{compiled} compiled, {left_out} left out by arithmetic, of {len(trials)}"
    if fitting:
        report, candidate = fitting[0].report, fitting[0].candidate
        hbm, words = report["hbm"], candidate.overrides(run)
        console.print(
            f"best for {topology} ({counts}): modelled MFU {report['mfu']:.1%}, "
            f"{1e3 * report['step_seconds']:,.4g} ms a step, bound by {report['bound']}, "
            f"{hbm['total'] / GIB:.2f} of {hbm['capacity'] / GIB:.2f} GiB a chip",
            "  " + " ".join(map(quoted, words)) if words else "  the run as it is",
            sep="\n", highlight=False, soft_wrap=True,
        )  # fmt: skip
    else:
        console.print(f"nothing fits {topology} yet ({counts})", highlight=False)
    table = Table("batch", "microbatches", "rules", "mesh", "remat", "why not", box=None)
    for trial in others[:SHOWN]:
        each = trial.candidate
        table.add_row(
            *(f"{each.batch_size:,}", str(each.microbatches), str(each.rules)),
            *(str(each.mesh), each.remat, trial.why),
        )
    if others:
        console.print(table)
    if more := len(others) - SHOWN:
        console.print(*[f"and {more} more; --json has all"] * (more > 0), highlight=False)


def quoted(override: str) -> str:
    """--gin.NAME=VALUE as a shell takes it."""
    return f'"--gin.{override}"' if "'" in override else f"--gin.{override}"


def _nothing(trials: Sequence[Trial], topology: str) -> str:
    sizes = [t.report["hbm"] for t in trials if t.report and t.report["hbm"]["total"]]
    nearest = min(sizes, key=lambda hbm: hbm["total"], default=None)
    said = f"none of {len(trials)} candidates fits {topology}"
    if nearest is None:
        why = next((trial.why for trial in trials if trial.why), "")
        return f"{said}; the first: {why}"
    over = nearest["total"] - nearest["capacity"]
    return (
        f"{said}; the nearest needs {over / GIB:.2f} GiB a chip more than the "
        f"{nearest['capacity'] / GIB:.2f} there are: take more chips, or more --tables."
    )


def _write(file: str, result: Mapping[str, Any]) -> None:
    try:
        Path(file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; give another --json.") from error
