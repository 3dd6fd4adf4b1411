"""Several processes as one run: each finds its place, all prove to be alike, none dies unnoticed.

The processes meet in a roll call at the coordinator's address before JAX does: in Python, where a
wait can be bounded and an error can say which process is missing (`jax.distributed` aborts in C++).
The connections stay open. What must be the same everywhere is compared over them, and a process
that ends takes its connection along, so that the others know at once which one it was; JAX's
heartbeats find those that freeze.
"""

import atexit
import collections
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping

from t5x_lite.errors import UserError
from t5x_lite.rollcall import Group, Place, meet

PATIENCE = 300  # seconds for all processes to come: a pod's hosts don't start at the same moment
HEARTBEAT_TIMEOUT = 20  # seconds; JAX's own default is 100
# Seconds: a collective may fail a moment before the group learns, and says, whose death it was.
AFTERMATH = 2
STATUS = {UserError: 2, KeyboardInterrupt: 130}  # as the command line has them; others: 1
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_group: Group | None = None  # this process's; like `jax.distributed`, there is one for a process


def find_place(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """The place of this process in its run; None where it is alone.

    What isn't given comes from the variables of `ENVIRONMENT`, then from JAX's detection of Slurm,
    Open MPI, Cloud TPU (metadata server, GKE, several slices) and Kubernetes.

    Args:
        coordinator: HOST:PORT of process 0.
        processes: how many there are; 1 is no run of several, whatever the cluster.
        process: this one's number, from 0.
        environment: variables.

    Raises:
        UserError: numbers that don't go together, or that are neither given nor detected.
    """
    address, count, number = (environment.get(name) for name in ENVIRONMENT)
    coordinator = coordinator or address
    processes = _integer(ENVIRONMENT[1], count) if processes is None else processes
    process = _integer(ENVIRONMENT[2], number) if process is None else process
    if processes == 1 and process in (None, 0):
        return None
    found, devices = (coordinator, processes, process), None
    if None in found:
        *found, devices = _detect(*found)
    if found == [None, None, None] or found[1] == 1:
        return None
    options = ("--coordinator", "--processes", "--process")
    missing = [name for name, value in zip(options, found, strict=True) if value is None]
    if missing:
        raise UserError(f"several processes need {', '.join(options)}; missing: {missing[0]}.")
    return Place(*found, None if devices is None else tuple(devices))


def _detect(coordinator: str | None, processes: int | None, process: int | None) -> tuple:
    # What jax.distributed.initialize() itself calls; asked here, so that the roll call comes first.
    from jax._src.clusters import ClusterEnv

    try:
        return ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, None, PATIENCE
        )
    except Exception as error:  # of requests, of kubernetes, of a cluster half configured
        raise UserError(
            f"a cluster was detected, but not this process's place in it ({gist(error)}): give "
            f"--coordinator HOST:PORT --processes N --process I, or --processes 1."
        ) from error


def _integer(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"environment variable {name}={value!r} must be an integer.") from error


@contextlib.contextmanager
def joined(place: Place | None, configuration: str = "") -> Iterator[None]:
    """Joins the run of `place` and, when the block ends, leaves it; alone, does nothing.

    Enter it before any use of a device. A block that ends by an error ends the others too.

    Args:
        place: this process's.
        configuration: lines that must be the same in all processes.

    Raises:
        UserError: the coordinator can't be reached, a process didn't come, or configurations
            differ.
    """
    global _group
    if place is None:
        yield
        return
    _group = meet(place, PATIENCE)
    try:
        require_same("configuration", configuration)
        _initialize(place)
        yield
    except (Exception, KeyboardInterrupt) as error:
        # gin raises subclasses of what it lets through.
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 1)
        if status == 1:
            time.sleep(AFTERMATH)
        # At exit JAX would wait for processes that wait for this one.
        atexit.register(_group.exit, status)
        _group.fail(f"{type(error).__name__}: {gist(error)}", status)
        raise
    finally:
        _group.leave()  # also by SystemExit, on which all agree


def _initialize(place: Place) -> None:
    import jax

    # Its own handler of SIGTERM would take the place of the loop's.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=PATIENCE,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )


def is_number(process: int) -> bool:
    """Whether this is that process."""
    return (_group.place.process if _group else 0) == process


def is_first() -> bool:
    """Whether this process is the one that prints, logs and writes records."""
    return is_number(0)


def report(line: str) -> None:
    """Prints a line to stderr, in the first process alone."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def process_count() -> int:
    """How many processes the run has."""
    return 1 if _group is None else _group.place.processes


def notes() -> list[str]:
    """What a user should know of the processes, for a run's first lines."""
    return [f"{count} processes"] if (count := process_count()) > 1 else []


def exchange(text: str) -> list[str]:
    """The text of every process, by number; every process must call it, in the same order."""
    return [text] if _group is None else _group.exchange(text)


def require_same(what: str, text: str) -> None:
    """Raises `UserError`, in every process, where lines of `text` differ between any two.

    Args:
        what: what it is, in one word.
        text: compared line by line.
    """
    digests = exchange(hashlib.sha256(text.encode()).hexdigest())
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    # Texts may be long and processes many: two of them tell.
    texts = exchange(text if is_number(0) or is_number(other) else "")
    here, there = (texts[number].splitlines() for number in (0, other))
    raise UserError(
        f"processes 0 and {other} differ in their {what}: process 0 has {_without(here, there)}; "
        f"process {other} has {_without(there, here)}. Start all with the same."
    )


def _without(lines: list[str], others: list[str]) -> str:
    only = [line.strip() for line in lines if line not in set(others)]
    more = f" and {len(only) - 4} more lines" if len(only) > 4 else ""
    return ", ".join(repr(line) for line in only[:4]) + more if only else "nothing besides"


def gist(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


class StopAgreement:
    """Whether any process was asked to stop: each learns it at the same step.

    Every step, each device contributes its process's answer to a maximum over all devices, which is
    read two steps later, when it is long there: no step waits for it. A signal that arrives at one
    host thus stops all of them after the same update.

    Args:
        mesh: of the steps.
    """

    DELAY = 2  # steps; the loop's host is at most that far ahead of its devices

    def __init__(self, mesh: "jax.sharding.Mesh"):  # noqa: F821 - JAX is imported late
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        whole = NamedSharding(mesh, PartitionSpec())
        self._maximum = jax.jit(jax.numpy.max, out_shardings=whole)
        self._answers: dict[int, jax.Array] = {}
        self._pending: collections.deque[jax.Array] = collections.deque()

    def __call__(self, asked: int) -> int:
        """Hands in this process's number (of a signal; 0 for none); gives that of all, or 0."""
        if process_count() == 1:
            return asked
        self._pending.append(self._maximum(self._answer(asked)))
        return int(self._pending.popleft()) if len(self._pending) > self.DELAY else 0

    def _answer(self, asked: int):
        import jax
        import numpy as np

        if asked not in self._answers:
            self._answers[asked] = jax.make_array_from_callback(
                (self._size,), self._each, lambda _: np.full(1, asked, np.int32)
            )
        return self._answers[asked]
