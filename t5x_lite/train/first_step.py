"""How long a run takes to its first step, and what takes that long."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from t5x_lite.train.executable import load, read
from t5x_lite.train.program import Program

CACHE_HIT = "/jax/compilation_cache/cache_hits"  # what JAX calls it


class FirstStep:
    """Makes a run's step ready, and times what comes before the first one is done.

    It counts from the start of the process where the system says when that was, otherwise from when
    this is made.

    Args:
        executable: a file of `compile --save` to take the step from; None: there is none.

    Raises:
        UserError: a file that can't be read.
    """

    def __init__(self, executable: str | None = None):
        age = process_age()
        self._since = "train was called" if age is None else "the process began"
        self._began = time.perf_counter() - (age or 0.0)
        self._marks = [self._began]
        self._stored = None if executable is None else read(executable)
        self._how = ""

    def ready(self, program: Program, say: Callable[[str], None]) -> jax.stages.Compiled:
        """The program as a function to call: from the file if it is there, or compiled.

        Args:
            program: the run's.
            say: prints a line.
        """
        self._marks.append(time.perf_counter())
        lowered, step = program.lower(), None
        if self._stored is not None:
            step, line = load(self._stored, program, lowered)
            self._stored, self._how = None, "to load the executable"
            say(line)
        if step is None:
            with counted_hits() as hits:
                step = lowered.compile()
            self._how = f"to compile ({'found' if hits else 'not'} in the cache)"
        self._marks.append(time.perf_counter())
        return step

    def done(self, results: Any) -> str:
        """Waits for the first step's results; a line that says what took how long."""
        jax.block_until_ready(results)
        self._marks.append(time.perf_counter())
        setup, ready, first = (b - a for a, b in zip(self._marks, self._marks[1:], strict=False))
        return (
            f"first step done {self._marks[-1] - self._began:.1f} s after {self._since}: "
            f"{setup:.1f} to set up, {ready:.1f} {self._how}, {first:.1f} for its batch and itself"
        )


@contextlib.contextmanager
def counted_hits() -> Iterator[list[str]]:
    """Yields a list that grows with each program found in the persistent compilation cache."""
    hits: list[str] = []

    def listen(event: str, **_):
        if event == CACHE_HIT:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def process_age() -> float | None:
    """Seconds since this process began; None where the system doesn't say (it does on Linux)."""
    try:
        # Fields after the command's name, which may hold anything but ends with a parenthesis.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError, IndexError, ValueError):
        return None
