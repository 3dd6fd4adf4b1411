"""How a sweep shows itself: a live table on a terminal, a line for each change anywhere else."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from t5x_lite.scaling import records
from t5x_lite.scaling.pool import DONE, FAILED, RUNNING, WAITING, Job
from t5x_lite.scaling.sweep import RUNS, Run

_STYLES = {DONE: "green", FAILED: "red", RUNNING: "bold"}
_EVERY = 3.0  # seconds between readings of the logs


class Watch:
    """Shows jobs and the logs of their runs. Use as a context manager.

    Args:
      out: the sweep's folder.
      runs: of the sweep.
      jobs: of the pool; the state of the others is read from the folder.
      console: where to; standard output by default.
      workers: how many run at once, for the time that is left.
    """

    def __init__(
        self,
        out: Path,
        runs: Sequence[Run],
        jobs: Sequence[Job],
        console: Console | None = None,
        workers: int = 1,
    ):
        self._out, self._runs, self._workers = out, runs, workers
        self._jobs = {job.name: job for job in jobs}
        self._console = console or Console()
        self._read, self._rows = 0.0, {}
        self._said: dict[str, tuple[str, int]] = {}
        self._live: Live | None = None

    def __enter__(self):
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live is not None:
            self._read = 0.0
            self.update()
            self._live.stop()
            self._live = None

    def update(self) -> None:
        """Reads the logs, once in a while, and shows what is new."""
        if self._live is None:
            self._say()
        elif time.monotonic() - self._read >= _EVERY:
            self._read = time.monotonic()
            self._live.update(self.table(), refresh=True)

    def table(self) -> Group:
        """The runs, a row each, and what is left in all."""
        table = Table("run", box=None, pad_edge=False)
        for name in ("N", "D", "C", "step", "loss"):
            table.add_column(name, justify="right")
        table.add_column("state")
        table.add_column("ETA", justify="right")
        left = 0.0
        for run in self._runs:
            newest = records.progress(self._out / RUNS / run.name)
            state = self._state(run, newest)
            seconds = _left(run, newest) if state == RUNNING else None
            left += seconds or 0.0
            job = self._jobs.get(run.name)
            note = state if job is None or not job.why or state == DONE else f"{state}: {job.why}"
            known = run.facts
            table.add_row(
                run.name, short(known["n"]), short(known["d"]), f"{known['c']:.2e}",
                f"{newest.get('step', 0)}/{known['steps']}", _loss(newest),
                Text(note, style=_STYLES.get(state, "dim")), _clock(seconds),
            )  # fmt: skip
        return Group(table, Text(self._summary(), style="dim"))

    def _state(self, run: Run, newest: Mapping[str, Any]) -> str:
        if (job := self._jobs.get(run.name)) is not None:
            return job.state
        finished = newest.get("step", 0) >= run.facts["steps"] and records.LOSS in newest
        return DONE if finished else "begun" if newest else WAITING

    def _summary(self) -> str:
        """`7 of 21 done, 1 failed, 2 running; 0:14:05 left` at the speed of what has run."""
        count = dict.fromkeys((DONE, FAILED, RUNNING), 0)
        spent = work = todo = 0.0
        for run in self._runs:
            newest = records.progress(self._out / RUNS / run.name)
            state = self._state(run, newest)
            count[state] = count.get(state, 0) + 1
            done = run.facts["step_flops"] * newest.get("step", 0)
            spent, work = spent + newest.get("seconds", 0.0), work + done
            todo += run.facts["c"] - done if state in (RUNNING, WAITING) else 0.0
        parts = [f"{count[DONE]} of {len(self._runs)} done"]
        parts += [f"{count[name]} {name}" for name in (FAILED, RUNNING) if count[name]]
        text = ", ".join(parts)
        if not (todo and work):
            return text
        return f"{text}; {_clock(todo * spent / work / self._workers)} left"

    def _say(self) -> None:
        for run in self._runs:
            job = self._jobs.get(run.name)
            if job is None or self._said.get(run.name) == (job.state, job.tries):
                continue
            first = run.name not in self._said
            self._said[run.name] = (job.state, job.tries)
            if first and job.state in (WAITING, DONE):
                continue
            newest = records.progress(self._out / RUNS / run.name)
            loss = f", held-out loss {_loss(newest)}" if job.state == DONE else ""
            why = f": {job.why}" if job.why and job.state != DONE else ""
            again = "again " if job.state == WAITING else ""
            self._console.print(
                f"{run.name}: {again}{job.state}{loss}{why}", markup=False, highlight=False,
                soft_wrap=True,
            )  # fmt: skip


def short(number: float | int) -> str:
    """12.3M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _loss(newest: Mapping[str, Any]) -> str:
    value = newest.get(records.LOSS, newest.get("loss"))
    return "" if value is None else f"{value:.4f}"


def _left(run: Run, newest: Mapping[str, Any]) -> float | None:
    step, seconds = newest.get("step", 0), newest.get("seconds", 0.0)
    return (run.facts["steps"] - step) * seconds / step if step and seconds else None


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
