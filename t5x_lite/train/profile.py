"""Traces of chosen steps: what the devices and the host did, operation by operation."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from t5x_lite import distributed
from t5x_lite.errors import UserError

FOLDER = "profile"
Pause = Callable[[], AbstractContextManager[Any]]


def steps_of(text: str | None, last: int) -> range:
    """The steps of "A:B", both of which belong to them; none of None.

    Args:
        text: as the user gave it.
        last: the step at which the run ends.

    Raises:
        UserError: other text, or steps that the run doesn't have.
    """
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, end = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= end:
        raise UserError(f"--profile_steps {text}: give the first and the last step to trace, such "
                        f"as 10:12; steps count from 1.")  # fmt: skip
    if end > last:
        raise UserError(f"--profile_steps {text}: the run ends at step {last}; give steps up to "
                        f"{last}.")  # fmt: skip
    return range(first, end + 1)


class Profile(AbstractContextManager):
    """Runs a loop's steps and traces some of them; a context, which ends a trace that is cut short.

    Args:
        steps: which ones; of several processes the first one traces.
        model_dir: the run's, whose `FOLDER` the traces go to.
        pause: a context that leaves what happens in it out of the run's timing.
        say: prints a line.
    """

    def __init__(self, steps: range, model_dir: Path, pause: Pause, say: Callable[[str], None]):
        # One process's devices tell of all, which run the same program.
        self._steps = steps if distributed.is_first() else range(0)
        self._folder = model_dir / FOLDER
        self._pause, self._say = pause, say
        self._first: int | None = None  # of the trace under way
        self._done = False

    def run(self, step: int, function: Callable, *args):
        """`function(*args)`, as this step of the loop."""
        if step not in self._steps:
            return function(*args)
        if self._first is None:
            self._start(step, args)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            results = function(*args)
        if step == self._steps[-1]:
            self._stop(step, results)
        return results

    def __exit__(self, kind, *_):
        if self._first is not None:
            self._stop(None, None)
        elif self._steps and not self._done and kind is None:
            first, last = self._steps[0], self._steps[-1]
            self._say(f"--profile_steps {first}:{last}: this run did none of these, none is traced")

    def _start(self, step: int, pending: Any) -> None:
        options = jax.profiler.ProfileOptions()
        # Every Python call would fill the trace, and slow the host down.
        options.python_tracer_level = 0
        jax.block_until_ready(pending)  # the step before isn't to be seen
        with self._pause():
            jax.profiler.start_trace(
                self._folder,
                profiler_options=options,
                create_perfetto_trace=True,
            )
        self._first = step

    def _stop(self, step: int | None, pending: Any) -> None:
        jax.block_until_ready(pending)
        first, self._first, self._done = self._first, None, True
        with self._pause():
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # of the file system, as a RuntimeError of XLA
                raise UserError(f"{self._folder} cannot be written: {distributed.gist(error)}; "
                                f"give another model_dir.") from error  # fmt: skip
        steps = f"steps {first} to {step}" if step else f"steps from {first} on"
        self._say(f"{steps} traced: {self._folder}, for XProf and ui.perfetto.dev; "
                  f"see docs/performance.md")  # fmt: skip
