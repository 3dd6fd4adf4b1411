"""The rows of one task's split: epoch after epoch, each example once in each, in a new order.

A row is a pure function of (seed, task, number): an index permutation for each epoch, noise seeded
by (seed, task, epoch, example), a plan of which examples share a row.
"""

import functools
import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.data.converters import ROWWISE, SIDES, Row, Segment, Shapes, assemble
from t5x_lite.data.filling import CutPlan, Span
from t5x_lite.data.objectives.base import BEST_FIT, CutAnew, Examples, Sides
from t5x_lite.data.packing import OneEach, Plan, best_fit, kept
from t5x_lite.errors import UserError

MAX_ROWS = 2**32 - 1  # the index permutation works on 32 bits
FORMAT = 3  # of what plans and noise a seed gives: others are other data to a checkpoint
UNUSED = np.random.default_rng(0)  # for examples without noise: a generator takes time to make


class Rows:
    """The rows of a split under an objective, without end or for one pass.

    Args:
      open_examples: gives the examples; called when they are first needed.
      sides: positions of a row.
      shapes: entries of a row.
      packing: "best_fit", or "split" and "none" for one example a row.
      name: the task's; with `seed` it seeds order and noise.
      seed: of order and noise.
      folder: where plans are kept; None for nowhere.
      key: what plans depend on besides, json-able.
    """

    def __init__(
        self,
        open_examples: Callable[[], Examples],
        *,
        sides: Sides,
        shapes: Shapes,
        packing: str,
        name: str,
        seed: int,
        folder: Callable[[], Path | None] = lambda: None,
        key: Callable[[], Mapping[str, Any]] = dict,
    ):
        self._open, self._sides, self.shapes = open_examples, sides, shapes
        self._packing, self.name, self._seed = packing, name, seed
        self._folder, self._key = folder, key
        # A seed that Batches will refuse must not fail here.
        self._noise_key = np.array([seed % 2**64, hash32(0, name)], np.uint64)
        self._plans: dict[int, Plan | OneEach] = {}
        self._firsts = [0]  # of each epoch that was reached, its first row
        self._lock = threading.RLock()  # batches are read ahead by several threads
        self._generators = threading.local()

    @functools.cached_property
    def examples(self) -> Examples:
        """What the rows are made of. Raises UserError where there is none."""
        examples = self._open()
        if not len(examples):
            raise UserError(f"{self.name} has no examples; give more text or a smaller length.")
        return examples

    def plan(self, epoch: int) -> Plan | OneEach:
        """Which examples share the rows of an epoch: one plan for all unless noise decides."""
        epoch = 0 if self.examples.are_sizes_fixed else epoch
        with self._lock:
            if epoch not in self._plans:
                # An epoch's noise is over when the next one is reached: two are enough.
                for old in sorted(self._plans)[:-1]:
                    del self._plans[old]
                self._plans[epoch] = self._make_plan(epoch)
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> Plan | OneEach:
        examples = self.examples
        if self._packing == BEST_FIT:
            room = [self._sides[side] for side in SIDES if side in self._sides]
            key = {"format": FORMAT, "room": room, "packing": self._packing, **self._key()}
            if not examples.are_sizes_fixed:
                key |= {"seed": self._seed, "epoch": epoch}
            noise_of = functools.partial(self._noise, epoch)
            if isinstance(examples, CutAnew):
                make, kind = functools.partial(examples.plan, noise_of, room), CutPlan
            else:
                make, kind = lambda: best_fit(examples.sizes(noise_of), room), Plan
            plan = kept(self._folder(), key, make, kind)
        else:
            plan = OneEach(len(examples))
        if not 0 < len(plan) <= MAX_ROWS:
            raise UserError(f"{self.name} has {len(plan)} rows; between 1 and 2^32-1 work.")
        return plan

    def count(self, epoch: int = 0) -> int:
        """Rows of an epoch."""
        return len(self.plan(epoch))

    @property
    def note(self) -> str:
        """What a user should know of the examples, such as how many are trimmed; "" for nothing."""
        return getattr(self.examples, "note", "")

    @functools.cached_property
    def examples_per_row(self) -> float:
        """On average, in the first epoch: rates count examples, and batches rows."""
        return self.plan(0).examples / self.count(0)

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch and place in it of the n-th row that is asked for."""
        if self.examples.are_sizes_fixed:
            return divmod(number, self.count(0))
        with self._lock:
            while self._firsts[-1] <= number:
                self._reach_next()
        epoch = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return epoch, number - self._firsts[epoch]

    def first_row(self, epoch: int) -> int:
        """How many rows the epochs before one have."""
        if self.examples.are_sizes_fixed:
            return epoch * self.count(0)
        with self._lock:
            while len(self._firsts) <= epoch:
                self._reach_next()
        return self._firsts[epoch]

    def _reach_next(self) -> None:
        self._firsts.append(self._firsts[-1] + self.count(len(self._firsts) - 1))

    def shuffled(self, number: int) -> Row:
        """The n-th row of an endless shuffled run."""
        epoch, place = self.locate(number)
        return self.row(epoch, self._order(epoch)[place])

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as its run
    def _order(self, epoch: int):
        import grain

        seed = hash32(self._seed, f"{self.name}/{epoch}")
        return grain.MapDataset.range(self.count(epoch)).shuffle(seed=seed)

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of the plan, with an epoch's noise."""
        examples, segments = self.examples, []
        for example in self.plan(epoch).members(index):
            noise = self._noise(epoch, example) if examples.is_noisy else UNUSED
            segments += examples.segments(example, noise)
        if len(segments) > 1 and not segments[0].keys().isdisjoint(ROWWISE):
            segments = self._with_one_label(segments, epoch, index)
        return assemble(segments, self.shapes)

    def _with_one_label(self, segments: list[Segment], epoch: int, index: int) -> list[Segment]:
        """One is drawn to come first: the row has its label, and none of the others'."""
        first = int(self._generator(epoch, index, of_row=True).integers(len(segments)))
        plain = [{n: v for n, v in s.items() if n not in ROWWISE} for s in segments]
        return [segments[first], *plain[:first], *plain[first + 1 :]]

    def _noise(self, epoch: int, example: int | Span) -> np.random.Generator:
        if isinstance(example, Span):
            example = example.start
        return self._generator(epoch, example)

    def _generator(self, epoch: int, number: int, of_row: bool = False) -> np.random.Generator:
        """The noise of an example or a row, valid until the thread asks for the next one."""
        # Counter-based, so that it begins anywhere at once (Salmon et al. 2011). A thread has one,
        # which is set to where it should begin: making one takes as long as drawing from it.
        own = self._generators
        if not hasattr(own, "generator"):
            own.generator = np.random.Generator(np.random.Philox(key=self._noise_key))
            own.state = own.generator.bit_generator.state
        own.state["state"]["counter"] = np.array([0, of_row, number, epoch], np.uint64)
        own.generator.bit_generator.state = own.state
        return own.generator


def hash32(seed: int, name: str) -> int:
    """A seed for a name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
