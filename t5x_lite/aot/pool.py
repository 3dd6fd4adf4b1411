"""Several `compile` commands at once, within this host's memory; none outlives the search."""

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.aot.candidates import GIB, Trial
from t5x_lite.errors import UserError

LEAST_MEMORY = 3 * GIB  # of a compiler that is started


class Pool(contextlib.AbstractContextManager):
    """Compilers that work at once; a context that leaves none behind, nor their files.

    Args:
        command: words that compile the run.
        run: whose overrides are added.
        workers: how many at once.
        memory: bytes of this host that each may take.
    """

    def __init__(
        self, command: Sequence[str], run: Mapping[str, Any], workers: int, memory: float | int
    ):
        self._command, self._run = list(command), run
        self._workers, self._memory = workers, memory
        self._running: dict[int, tuple[Trial, subprocess.Popen]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._stack.enter_context(_terminated())
        self._stack.callback(self._end_all)
        return self

    def __exit__(self, *_):
        self._stack.close()

    @property
    def running(self) -> list[Trial]:
        """What compilers are at work on."""
        return [trial for trial, _ in self._running.values()]

    @property
    def vacant(self) -> bool:
        """Whether another one can start."""
        return len(self._running) < self._workers

    def start(self, number: int, trial: Trial) -> None:
        """Starts one, under a number of its own."""
        overrides = [f"--gin.{text}" for text in trial.candidate.overrides(self._run)]
        words = [*self._command, *overrides, "--json", str(self._folder / f"{number}.json")]
        with (self._folder / f"{number}.log").open("wb") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
            )  # fmt: skip
        self._running[number] = trial, process

    def look(self) -> list[Trial]:
        """Those that have ended since; ends those that take too much memory."""
        ended = []
        for number, (trial, process) in list(self._running.items()):
            if process.poll() is None:
                size = resident_bytes(process.pid)
                if size <= self._memory:
                    continue
                process.kill()
                process.wait()
                trial.why = (f"its compiler took {size / GIB:.1f} GiB of this host; fewer "
                             f"--workers or more --worker_memory")  # fmt: skip
            else:
                self._read(number, trial, process.returncode)
            del self._running[number]
            trial.compiled = True
            ended.append(trial)
        return ended

    def _read(self, number: int, trial: Trial, status: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            trial.report = json.loads((self._folder / f"{number}.json").read_text("utf-8"))
        if trial.report and not trial.report["fits"]:
            hbm = trial.report["hbm"]
            needs = hbm["total"] and f"{hbm['total'] / GIB:.2f}"
            trial.why = f"needs {needs or 'more than the'} of {hbm['capacity'] / GIB:.2f} GiB"
        elif status != 0 or trial.report is None:
            trial.report = None
            lines = (self._folder / f"{number}.log").read_text("utf-8", "replace").splitlines()
            # The error itself: gin and Python indent what they say around it.
            said = [line for line in lines if line.strip() and not line.startswith(" ")]
            why = said[-1] if said else f"it ended with status {status}"
            trial.why = why.removeprefix("t5x_lite: error: ")

    def _end_all(self) -> None:
        for _, process in self._running.values():
            process.kill()
        for _, process in self._running.values():
            process.wait()
        self._running.clear()


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM leaves the block as Ctrl-C does, instead of ending the process at once."""

    def leave(number, _):
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def resident_bytes(process: int) -> int:
    """Memory that a process takes; 0 where the system doesn't say (it does on Linux)."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def share(workers: int | None, worker_memory: float | int | None) -> tuple[int, float]:
    """How many compilers, and bytes for each."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} must be at least 1.")
    free = free_bytes()
    cores = os.cpu_count() or 1
    memory = float(LEAST_MEMORY if worker_memory is None else worker_memory * GIB)
    count = workers or max(1, min(cores, int(free // memory)))
    return count, memory if worker_memory is not None else 0.9 * free / count


def free_bytes() -> float:
    """Memory that this host has to spare; infinite where it doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return float(found[0]) * 1024 if found else math.inf
