"""Where a curation runs: on this machine, on Slurm or on Ray, by datatrove's executors.

All run the same stages, each of so many tasks, one stage after the other. datatrove marks each
task that is done in the stage's folder, and skips it the next time.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.data.curate.words import needs_extra
from t5x_lite.errors import UserError

POLL_SECONDS = 0.2
PRELOADED = ["datatrove.executor", "datatrove.pipeline.dedup", "t5x_lite.data.curate"]
Advance = Callable[[int, int], None]  # tasks done, documents read


class Stage(NamedTuple):
    """Steps that run as so many tasks; `folder/log` is datatrove's."""

    name: str
    steps: tuple[Any, ...]
    tasks: int
    folder: Path

    @property
    def log(self) -> Path:
        """Where datatrove writes logs and marks what is done."""
        return self.folder / "log"

    @property
    def running(self) -> Path:
        """Where each task of this machine that runs leaves its process's number."""
        return self.folder / "running"

    def done(self) -> int:
        """Tasks that are done."""
        return sum(1 for _ in (self.log / "completions").glob("*"))

    def read(self) -> int:
        """Documents that its tasks have read, about."""
        # a file that is just being written may be empty
        counts = [file.read_text() for file in (self.folder / "progress").glob("*")]
        return sum(int(count) for count in counts if count)


# Shows a stage's progress: (name, tasks) gives a function to call with what is done so far.
Progress = Callable[[str, int], contextlib.AbstractContextManager[Advance]]


@dataclasses.dataclass(frozen=True)
class Executor:
    """Base of the executors.

    `tasks`: in how many the input is cut at most; a task is what is redone after a kill, and a rule
    over all documents opens a file for each.
    """

    tasks: int = dataclasses.field(default=500, kw_only=True)

    def __post_init__(self):
        if self.tasks < 1:
            raise UserError(f"{type(self).__name__}.tasks={self.tasks} must be 1 or more.")

    def run(self, stages: list[Stage], progress: Progress) -> bool:
        """Runs what isn't done yet. False where that has only been submitted."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Local(Executor):
    """Processes on this machine; None: as many as it has cores."""

    workers: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.workers is not None and self.workers < 1:
            raise UserError(f"Local.workers={self.workers} must be 1 or more.")

    def run(self, stages: list[Stage], progress: Progress) -> bool:
        """As in `Executor`."""
        import multiprocess
        from datatrove.executor import LocalPipelineExecutor

        # Also for what datatrove starts by the default way: a fork of a process with JAX's threads
        # may never return. Workers are forked from a process that has imported what they need.
        multiprocess.set_start_method("forkserver", force=True)
        multiprocess.set_forkserver_preload(PRELOADED)
        workers = self.workers or os.cpu_count() or 1
        for stage in stages:
            if stage.done() == stage.tasks:
                continue
            with progress(stage.name, stage.tasks) as advance, _watched(stage, advance), _silent():
                executor = LocalPipelineExecutor(
                    list(stage.steps),
                    tasks=stage.tasks,
                    workers=min(workers, stage.tasks),
                    logging_dir=str(stage.log),
                )
                executor._launch_run_for_rank = _Launch(executor, stage.running)
                executor.run()
        return True


class _Launch:
    """A method of datatrove's executor, called without what it logs to the standard error (the
    tasks' files have that too), and with the process's number in `running` as long as it lasts.

    An object of this module reaches other processes by pickling, as a subclass of an optional
    package's class, made in a function, would not.
    """

    def __init__(self, executor: Any, running: Path):
        self._executor, self._running = executor, running

    def __call__(self, rank: int, *args: Any, **options: Any) -> Any:
        file = self._running / str(rank)
        file.write_text(str(os.getpid()))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                launch = type(self._executor)._launch_run_for_rank
                return launch(self._executor, rank, *args, **options)
        finally:
            file.unlink()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """datatrove logs to the standard error of the moment in which its logger is set up."""
    from datatrove.utils.logging import setup_default_logger

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            setup_default_logger()
            yield
    finally:
        setup_default_logger()


@contextlib.contextmanager
def _watched(stage: Stage, advance: Advance) -> Iterator[None]:
    """Shows what is done while the block runs, and ends it where a worker is killed.

    datatrove's pool of processes waits forever for the task of a worker that the system has killed,
    which it does when memory runs out.
    """
    shutil.rmtree(stage.running, ignore_errors=True)
    stage.running.mkdir(parents=True)
    stop, killed = threading.Event(), threading.Event()
    # A job in the background is started with SIGINT ignored: nothing would end the wait then.
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if is_main else None

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            advance(stage.done(), stage.read())
            if any(map(_was_killed, stage.running.iterdir())):
                killed.set()
                # the one thing that a thread waiting for a pool listens to
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not killed.is_set():
            raise
        raise UserError(
            f"a worker was killed, perhaps because memory ran out, while {stage.name}; bind "
            f"Local.workers to fewer, and run the same command again."
        ) from None
    finally:
        stop.set()
        thread.join()
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _was_killed(running: Path) -> bool:
    """Whether the process of a task is gone, and the task's file isn't."""
    try:
        number = running.read_text()
        if not number:  # is just being written
            return False
        os.kill(int(number), 0)
    except FileNotFoundError:  # done since
        return False
    except ProcessLookupError:
        return running.exists()
    return False


@dataclasses.dataclass(frozen=True)
class Slurm(Executor):
    """Jobs of a Slurm cluster, one array for each stage, each waiting for the one before.

    Submits and returns; the last job writes the report. Input and output must be seen from all
    machines, at the same paths. Don't submit again before the jobs have ended.

    Attributes:
      partition, time: of `sbatch`; the time ("10:00:00") is a task's.
      workers: tasks of a stage that run at once; None: all.
      memory: GB of a task.
      environment: a command that makes t5x_lite and datatrove known in a job, such as
        "source /shared/venv/bin/activate".
      options: further ones of `sbatch`, by name.
    """

    partition: str
    time: str
    workers: int | None = None
    memory: int = 4
    qos: str | None = None
    environment: str | None = None
    options: dict[str, str] = dataclasses.field(default_factory=dict)

    def run(self, stages: list[Stage], progress: Progress) -> bool:
        """As in `Executor`."""
        executor = None
        for stage in stages:
            executor = self.executor(stage, depends=executor)
        try:
            executor.run()
        except FileNotFoundError as error:
            raise UserError("there is no sbatch here; run this on a login node.") from error
        return all(stage.done() == stage.tasks for stage in stages)

    def executor(self, stage: Stage, depends: Any = None) -> Any:
        """datatrove's executor of a stage."""
        from datatrove.executor import SlurmPipelineExecutor

        return SlurmPipelineExecutor(
            list(stage.steps),
            tasks=stage.tasks,
            time=self.time,
            partition=self.partition,
            workers=self.workers or -1,
            mem_per_cpu_gb=self.memory,
            qos=self.qos,
            env_command=self.environment,
            sbatch_args=dict(self.options),
            job_name=f"curate {stage.name}".replace(" ", "-").replace(":", ""),
            logging_dir=str(stage.log),
            depends=depends,
        )


@dataclasses.dataclass(frozen=True)
class Ray(Executor):
    """Tasks of a Ray cluster (needs `ray`). The output's folder must be seen from all machines.

    Attributes:
      address: of the cluster; None: what the environment says, or this machine.
      workers: tasks of a stage that run at once; None: all.
      memory: GB of a task.
    """

    address: str | None = None
    workers: int | None = None
    memory: float | int = 4

    def run(self, stages: list[Stage], progress: Progress) -> bool:
        """As in `Executor`."""
        try:
            import ray
        except ImportError as error:
            raise UserError("the executor Ray needs ray: pip install ray.") from error
        ray.init(address=self.address, ignore_reinit_error=True, log_to_driver=False)
        for stage in stages:
            with progress(stage.name, stage.tasks), _silent():
                self.executor(stage).run()
            # datatrove logs that tasks have failed, and goes on
            if (done := stage.done()) < stage.tasks:
                raise UserError(
                    f"{stage.tasks - done} of {stage.tasks} tasks of {stage.name} failed; "
                    f"{stage.log}/logs say why."
                )
        return True

    def executor(self, stage: Stage) -> Any:
        """datatrove's executor of a stage."""
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(
            list(stage.steps),
            tasks=stage.tasks,
            workers=self.workers or -1,
            mem_per_cpu_gb=self.memory,
            logging_dir=str(stage.log),
        )


def check_installed() -> None:
    """Raises UserError where datatrove isn't."""
    with needs_extra("curate"):
        import datatrove  # noqa: F401
