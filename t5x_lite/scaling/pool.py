"""Several commands at once on this machine: started in order, retried, stopped without a loss.

Knows nothing of what they do. A command ends with 0 where it is done, with 2 where only its user
can mend it (the exit status of `t5x_lite`), and with anything else where another try may help.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from t5x_lite.errors import UserError

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"
REFUSED = 2
LOCK = ".lock"
LEAST_FREE = 64 * 2**20  # bytes: below that the disk counts as full
_PAUSE = 0.2  # seconds between looks


@dataclasses.dataclass
class Job:
    """A command, and how far it is.

    Attributes:
      name: of the job.
      command: words.
      log: where its output goes, appended.
      cost: how long it takes, in any unit; long ones start first.
      kin: jobs of equal kin can use what the first of them has compiled.
      after: a job that has to be done before.
      prepare: called before every start.
      has_compiled: whether what its kin can use is there.
      ended: the state of a job that has ended with status 0.
      state: WAITING, RUNNING, DONE, FAILED or STOPPED.
      tries: starts so far.
      why: of a failure, the last line of its output.
    """

    name: str
    command: Sequence[str]
    log: Path
    cost: float | int = 0
    kin: str = ""
    after: str | None = None
    prepare: Callable[[], None] = lambda: None
    has_compiled: Callable[[], bool] = lambda: True
    ended: Callable[[], str] = lambda: DONE
    state: str = WAITING
    tries: int = 0
    why: str = ""


def run(
    jobs: Sequence[Job],
    *,
    workers: int,
    environment: Mapping[str, str],
    retries: int = 2,
    watch: Callable[[], None] = lambda: None,
) -> int:
    """Runs all jobs, their states kept up to date; `watch` is called every while.

    Ctrl-C and SIGTERM ask the running ones to stop and wait for them; a second one ends them.

    Args:
      jobs: those that are DONE are skipped.
      workers: how many run at once.
      environment: variables of the commands.
      retries: how often one that fails is started again.
      watch: shows the jobs.

    Returns:
      the number of the signal that stopped it, or 0.

    Raises:
      UserError: the disk is full; what was running has been asked to stop.
    """
    running: dict[str, subprocess.Popen] = {}
    with _signals() as received:
        try:
            while True:
                _reap(jobs, running, retries)
                if received:
                    _stop(jobs, running, received, watch)
                    return received[0]
                _check_disk(jobs)
                while len(running) < workers and (job := _next(jobs)) is not None:
                    running[job.name] = _start(job, environment)
                watch()
                if not running:
                    return 0
                time.sleep(_PAUSE)
        except BaseException:
            _stop(jobs, running, received or [signal.SIGTERM], watch)
            raise


def _next(jobs: Sequence[Job]) -> Job | None:
    """The longest job that may start; none whose kin is compiling, or that waits for another."""
    states = {job.name: job.state for job in jobs}
    compiling = {job.kin for job in jobs if job.state == RUNNING and not job.has_compiled()}
    for job in jobs:
        if job.state == WAITING and job.after and states.get(job.after) in (FAILED, STOPPED):
            job.state, job.why = FAILED, f"it begins where {job.after} saved, which {FAILED}"
    ready = [
        job
        for job in jobs
        if job.state == WAITING
        and (job.after is None or states.get(job.after, DONE) == DONE)
        and (not job.kin or job.kin not in compiling)
    ]
    return max(ready, key=lambda job: job.cost, default=None)


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
    job.prepare()
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches this process alone, which passes it on.
            process = subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=dict(environment), start_new_session=True, close_fds=False,
            )  # fmt: skip
    except OSError as error:
        raise UserError(f"{error.filename or job.log}: {error.strerror}.") from error
    job.state, job.tries = RUNNING, job.tries + 1
    return process


def _reap(jobs: Sequence[Job], running: dict[str, subprocess.Popen], retries: int) -> None:
    for job in jobs:
        if job.name not in running or (status := running[job.name].poll()) is None:
            continue
        del running[job.name]
        job.state = job.ended() if status == 0 else FAILED
        if job.state == FAILED:
            job.why = _last_line(job.log) or f"it ended with status {status}"
            if status != REFUSED and job.tries <= retries:
                job.state = WAITING


def _stop(jobs, running, received: list[int], watch) -> None:
    """Asks the running jobs to end, as `received[0]` asked us, and waits for them."""
    asked = len(received)
    _signal(running, signal.SIGTERM)
    while running:
        if len(received) > asked:
            _signal(running, signal.SIGKILL)
        for job in jobs:
            if job.name in running and running[job.name].poll() is not None:
                stopped = running.pop(job.name).returncode != 0
                job.state = STOPPED if stopped else job.ended()
        watch()
        time.sleep(_PAUSE)


def _signal(running: Mapping[str, subprocess.Popen], number: int) -> None:
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _check_disk(jobs: Sequence[Job]) -> None:
    failed = [job for job in jobs if job.state == FAILED or (job.state == WAITING and job.tries)]
    if not failed:
        return
    place = failed[0].log.parent
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE:
        raise UserError(
            f"the disk of {place} is full ({free / 2**20:.0f} MiB are free), so {failed[0].name} "
            f"stopped: free some space; the same command goes on."
        )


def _last_line(log: Path) -> str:
    try:
        text = log.read_bytes()[-4096:].decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list that grows by the number of each signal that asks to stop."""
    received: list[int] = []
    previous = {}
    with contextlib.suppress(ValueError):  # Python delivers signals to the main thread alone
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda n, _: received.append(n))
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second pool out of a folder while this one, or a process that it left, is alive.

    Raises:
      UserError: one is.
    """
    with _lock_file(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by process {file.read().strip()}, or by runs that it left "
                f"behind; wait for them or end them."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock_file(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    os.set_inheritable(file.fileno(), True)  # children hold the lock too
    return file
