"""Batches by step: a pure function of (seed, step), read ahead in the background.

Grain's `MapDataset` does the order: an index permutation per epoch, repeat, batch. Noise is seeded
by (seed, task, epoch, index), so no batch depends on which were read before it.
"""

import functools
import hashlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from t5x_lite.data.objectives import Examples, Row, Shapes, empty_row
from t5x_lite.errors import UserError

MAX_SEED = 2**32 - 1  # Grain's limit, and more than anybody counts to
MAX_WINDOWS = 2**32 - 1  # the index permutation works on 32 bits


class Batches:
    """`batches[step]` is a dict of numpy arrays [batch_size, …], steps counted from 0.

    Training batches never end and have no length; evaluation batches have `len`. Nothing is read
    before the first batch, `fingerprint` or `len` is asked for, so `shapes` needs no data.
    """

    def __init__(
        self,
        open_examples: Callable[[], Examples],
        *,
        row_shapes: Shapes,
        batch_size: int,
        name: str,
        seed: int,
        is_endless: bool,
        limit: int | None = None,
        describe: Callable[[], dict[str, Any]] = dict,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1.")
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed={seed} must lie between 0 and {MAX_SEED}.")
        if limit is not None and limit < 1:
            raise UserError(f"batches={limit} must be at least 1, or None for all.")
        self._open, self._describe = open_examples, describe
        self._row_shapes, self._name, self._seed = row_shapes, name, seed
        self.batch_size, self.is_endless, self._limit = batch_size, is_endless, limit

    @property
    def shapes(self) -> Shapes:
        """Name to (shape, dtype) of a batch, without reading data."""
        return {
            name: ((self.batch_size, *shape), dtype)
            for name, (shape, dtype) in self._row_shapes.items()
        }

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides what batch a step gets; json-able. Two equal ones give equal batches."""
        order = {"batch_size": self.batch_size, "seed": self._seed}
        return self._describe() | order | {"rows_per_epoch": len(self._examples)}

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over the split."""
        return len(self._examples)

    def __len__(self) -> int:
        if self.is_endless:
            raise TypeError("training batches never end")
        every = -(-len(self._examples) // self.batch_size)
        return every if self._limit is None else min(every, self._limit)

    def __getitem__(self, step: int) -> Row:
        step = operator.index(step)
        if step < 0 or (not self.is_endless and step >= len(self)):
            raise IndexError(f"step {step}")
        return self.dataset[step]

    def __iter__(self) -> Iterator[Row]:
        return iterate(self, 0)

    @functools.cached_property
    def _examples(self) -> Examples:
        examples = self._open()
        if not 0 < len(examples) <= MAX_WINDOWS:
            raise UserError(f"{self._name} has {len(examples)} rows; between 1 and 2^32-1 work.")
        return examples

    @functools.cached_property
    def dataset(self):
        """The Grain `MapDataset` of batches."""
        import grain

        examples, rows = self._examples, len(self._examples)
        order = grain.MapDataset.range(rows)
        if self.is_endless:
            # The map stands before the shuffle and so sees epoch·rows + shuffled index.
            order = order.map_with_index(_RowAt(examples, rows, self._name, self._seed))
            order = order.shuffle(seed=_hash32(self._seed, self._name)).repeat()
            return order.batch(self.batch_size)
        whole = len(self) * self.batch_size
        row_at = _RowAt(examples, rows, self._name, self._seed, empty_row(self._row_shapes))
        return grain.MapDataset.range(whole).map_with_index(row_at).batch(self.batch_size)


class _RowAt:
    """Row of a place: epoch and index, or padding after the last row where a filler is given."""

    def __init__(
        self, examples: Examples, rows: int, name: str, seed: int, filler: Row | None = None
    ):
        self._examples, self._rows, self._filler = examples, rows, filler
        self._key = (seed, _hash32(0, name))

    def __call__(self, place: int, _: int) -> Row:
        if self._filler is not None and place >= self._rows:
            return self._filler
        epoch, index = divmod(place, self._rows)
        return self._examples.row(index, np.random.default_rng([*self._key, epoch, index]))


def iterate(
    batches: Batches, start_step: int = 0, *, prefetch: int = 8, threads: int = 2
) -> Iterator[Row]:
    """Batches from `start_step` on, `prefetch` rows ahead in background threads. Resuming seeks.

    The order is that of the steps, whatever the number of threads.
    """
    import grain

    if prefetch < 1 or threads < 1:
        raise UserError(f"prefetch={prefetch} and threads={threads} must be at least 1.")
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    remaining = batches.dataset.slice(slice(start_step, None))
    yield from remaining.to_iter_dataset(options)


def _hash32(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
