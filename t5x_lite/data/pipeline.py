"""Batches by step: a pure function of (seed, step), whoever reads them, read ahead in threads."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from t5x_lite.data.converters import Row, Shapes, empty_row
from t5x_lite.data.mixing import Interleave
from t5x_lite.data.rows import Rows
from t5x_lite.errors import UserError

MAX_SEED = 2**32 - 1  # Grain's limit, and more than anybody counts to
FOR_EVER = 2**62  # rows: Grain wants a length


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the count of rows begins: a run continued with other data starts at another place.

    Attributes:
      step: the first step of the batches.
      cursors: of each task, rows that were used before it.
    """

    step: int = 0
    cursors: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Batches:
    """`batches[step]` is a dict of numpy arrays [batch_size, …], steps counted from 0.

    Training batches never end and have no length; evaluation batches have `len`. Nothing is read
    before the first batch, `fingerprint` or `len` is asked for, so `shapes` needs no data.

    Args:
      tasks: the rows of each task.
      rates: how often an example of each task comes, relative to the others; called once.
      batch_size: rows a batch.
      is_endless: shuffled for ever, or one pass in order over the only task.
      limit: batches of the pass at most.
      seed: of order and noise, for the fingerprint.
      describe: what the rows depend on, json-able.
      origin: where the count begins.
    """

    def __init__(
        self,
        tasks: Sequence[Rows],
        *,
        batch_size: int,
        seed: int,
        is_endless: bool,
        rates: Callable[[], Sequence[float]] = lambda: [1.0],
        limit: int | None = None,
        describe: Callable[[], dict[str, Any]] = dict,
        origin: Origin = Origin(),
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1.")
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed={seed} must lie between 0 and {MAX_SEED}.")
        if limit is not None and limit < 1:
            raise UserError(f"batches={limit} must be at least 1, or None for all.")
        self.tasks, self._rates, self._describe = tasks, rates, describe
        self._seed, self.batch_size, self.is_endless = seed, batch_size, is_endless
        self._limit, self.origin = limit, origin

    @property
    def shapes(self) -> Shapes:
        """Name to (shape, dtype) of a batch, without reading data."""
        return {
            name: ((self.batch_size, *shape), dtype)
            for name, (shape, dtype) in self.tasks[0].shapes.items()
        }

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides what batch a step gets; json-able. Two equal ones give equal batches."""
        order: dict[str, Any] = {"batch_size": self.batch_size, "seed": self._seed}
        if self.origin != Origin():
            order["origin"] = {"step": self.origin.step, "cursors": dict(self.origin.cursors)}
        return self._describe() | order | {"rows_per_epoch": self.rows_per_epoch}

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over the first epoch of every task."""
        return sum(task.count() for task in self.tasks)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the examples, such as how many are trimmed."""
        return [f"{task.name}: {task.note}" for task in self.tasks if task.note]

    def cursors(self, step: int) -> dict[str, dict[str, int]]:
        """How far each task has come before a step: its rows in all, and of which epoch's."""
        rows = (step - self.origin.step) * self.batch_size
        counts = self._interleave.counts(rows)
        position = {}
        for task, count in zip(self.tasks, counts, strict=True):
            number = self.origin.cursors.get(task.name, 0) + count
            epoch, place = task.locate(number)
            of = task.count(epoch)
            position[task.name] = {"rows": number, "epoch": epoch, "row": place, "of": of}
        return position

    def origin_at(self, step: int, cursors: Mapping[str, Mapping[str, int]]) -> Origin:
        """Where these batches go on after others that had come to `cursors` before `step`.

        A task whose rows are as many as before goes on at the very next one. Where a plan or a
        length changed, its rows are others, and it goes on as far into its epoch as it was. A task
        that is new begins.
        """
        rows = {}
        for task in self.tasks:
            if (at := cursors.get(task.name)) is not None:
                share = -(-at["row"] * task.count(at["epoch"]) // at["of"])
                rows[task.name] = task.first_row(at["epoch"]) + share
        return Origin(step, rows)

    @functools.cached_property
    def _interleave(self) -> Interleave:
        weights = [
            rate / task.examples_per_row
            for rate, task in zip(self._rates(), self.tasks, strict=True)
        ]
        return Interleave(tuple(weights))

    def __len__(self) -> int:
        if self.is_endless:
            raise TypeError("training batches never end")
        every = -(-self.tasks[0].count() // self.batch_size)
        return every if self._limit is None else min(every, self._limit)

    def __getitem__(self, step: int) -> Row:
        step = operator.index(step)
        first = self.origin.step
        if step < first or (not self.is_endless and step >= len(self)):
            raise IndexError(f"step {step}")
        return self.dataset()[step - first]

    def __iter__(self) -> Iterator[Row]:
        return iterate(self, 0)

    def row(self, number: int) -> Row:
        """The n-th row of the run, or of the pass; padding after the pass's end."""
        if self.is_endless:
            which, count = self._interleave.locate(number)
            task = self.tasks[which]
            return task.shuffled(self.origin.cursors.get(task.name, 0) + count)
        task = self.tasks[0]
        return task.row(0, number) if number < task.count() else empty_row(task.shapes)

    def dataset(self, rows: Sequence[int] | None = None) -> Any:
        """The Grain `MapDataset` of batches, or of some rows of each: those that one host needs."""
        import grain

        size = self.batch_size
        rows = range(size) if rows is None else rows
        if not rows or not all(0 <= row < size for row in rows):
            raise ValueError(f"rows {rows} of a batch of {size}")
        batches = FOR_EVER // size if self.is_endless else len(self)

        def row(place: int) -> Row:
            step, mine = divmod(place, len(rows))
            return self.row(step * size + rows[mine])

        return grain.MapDataset.range(batches * len(rows)).map(row).batch(len(rows))


def iterate(
    batches: Batches,
    start_step: int = 0,
    *,
    rows: Sequence[int] | None = None,
    prefetch: int = 8,
    threads: int = 1,
) -> Iterator[Row]:
    """Batches from `start_step` on, `prefetch` rows ahead in background threads. Resuming seeks.

    The order is that of the steps, whatever the number of threads. With `rows`, only those of every
    batch are read, in that order: what one of several hosts needs.
    """
    import grain

    if prefetch < 1 or threads < 1:
        raise UserError(f"prefetch={prefetch} and threads={threads} must be at least 1.")
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    first = start_step - batches.origin.step
    remaining = batches.dataset(rows).slice(slice(first, None))
    yield from remaining.to_iter_dataset(options)
