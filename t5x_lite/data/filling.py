"""Rows filled on every side with pieces of documents, where noise decides how large a piece is.

How much of a text is read and how much is asked for depends on its noise, so that whole documents
and evenly cut ones seldom fill an encoder's side and a decoder's at once. Here the plan also says
where long documents are cut: two pieces, one of which is read more and the other one asked for
more, have the lengths at which both sides are full.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from t5x_lite.data.packing import Plan

# Positions that a piece's first n tokens take on each side, and never fewer than n-1 do.
Table = Int[np.ndarray, "tokens_and_1 sides"]

CHUNK = 2**18  # documents planned at a time: bounds memory, and costs a few rows a chunk
SECTION = 4  # a document longer than so many rows is cut as several are, which mix better
HEADS = 24  # texts to be cut that are looked at for two which fill a row
FULL = 0.006  # of a side: less room isn't looked for
EVEN = 1.25  # times as free as the other side: more is lopsided
LEFT = 0.4  # of a row, left by whole documents for two pieces of long ones
LOSSES = (0.04, 0.03, 0.02, 0.015, 0.01, 0.005)  # of all positions, for whole documents with gaps
USED = 0.98  # of each side's positions: what a plan should reach with the largest of those
TRIED = 2**13  # documents that are planned to find it
UNEVEN = 0.005  # of a row may be lost for what is left of a cut document; else it is cut again
MIN_PART = 16  # one in so many tokens of a row, where there is room
ROOMY = 0.6  # of a row, where three pieces fit
SAMPLE = 64  # pieces drawn to learn how the sides' sizes are related
TRIES = 16  # documents looked at for one that fits on every side


class Span(NamedTuple):
    """A piece: tokens start..stop-1 of the stream of documents."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class CutPlan(Plan):
    """A plan that also says where documents are cut: piece i is cuts[i]..cuts[i + 1] - 1."""

    cuts: np.ndarray  # [examples + 1]

    def members(self, row: int) -> list[Span]:
        """The pieces of a row."""
        pieces = super().members(row)
        return [Span(int(self.cuts[piece]), int(self.cuts[piece + 1])) for piece in pieces]


def fill(
    bounds: Int[np.ndarray, " bounds"],
    table_of: Callable[[int], Table],
    room: Sequence[int],
) -> CutPlan:
    """A plan of rows that are full on every side, as far as documents can be cut.

    A document is cut where its noise makes it larger than a row. With two sides it is cut, too,
    where it would leave room that no others fill, such as much of the decoder's and nothing of the
    encoder's; but no more than it takes to use 98% of the positions of each side.

    Args:
      bounds: where each document begins in the stream, and where the last one ends.
      table_of: sizes of pieces that begin at a place, by their noise.
      room: positions of a row on each side.
    """
    tried = bounds[: TRIED + 1] if len(room) > 1 else bounds
    for loss in LOSSES:
        filler = _filled(tried, table_of, room, loss)
        if len(room) == 1 or filler.used >= USED:
            break
    if len(tried) < len(bounds):
        filler = _filled(bounds, table_of, room, loss)
    return filler.plan(int(bounds[-1]))


def _filled(bounds, table_of, room, loss: float) -> "_Filler":
    filler = _Filler(table_of, room, loss)
    for first in range(0, len(bounds) - 1, CHUNK):
        filler.add(bounds[first : first + CHUNK + 1].tolist())
        filler.finish()
    return filler


def growing(sizes: Int[np.ndarray, "tokens_and_1 sides"]) -> Table:
    """Sizes of 0, 1, … tokens as a `Table`: nothing takes nothing, and none less than the last."""
    sizes = np.maximum.accumulate(sizes)
    sizes[0] = 0
    return sizes


class _Text(NamedTuple):
    """Text that isn't placed yet, and the sizes of its first tokens."""

    start: int
    stop: int
    table: Table

    def fitting(self, gap: Sequence[int]) -> int:
        """The most tokens of it that fit."""
        ends = [np.searchsorted(self.table[:, i], g, side="right") for i, g in enumerate(gap)]
        return min(int(min(ends)) - 1, self.stop - self.start)


class _Filler:
    """Fills one row after the other: with whole documents, then with pieces of long ones."""

    def __init__(self, table_of: Callable[[int], Table], room: Sequence[int], loss: float):
        self._table_of, self._room, self._sides = table_of, np.array(room), list(room)
        self._loss, self._taken = loss, np.zeros(len(room), np.int64)
        self._shelf = _Shelf(room)
        self._waiting: collections.deque[tuple[int, int]] = collections.deque()  # start, stop
        self._heads: list[_Text] = []  # the first of those, with their tables
        self._placed: list[tuple[int, int]] = []  # start, row
        self._rows = 0
        sample = [table_of(place) for place in range(SAMPLE if len(room) > 1 else 1)]
        self._longest = len(sample[0]) - 1
        middle = np.array([table[self._longest // 2] for table in sample]).clip(1)
        # Half of all pieces have sides in such a relation.
        self._low, self._high = np.quantile(middle[:, 0] / middle[:, -1], [0.25, 0.75]).tolist()
        self._least = max(1, self._longest // MIN_PART)

    def add(self, bounds: Sequence[int]) -> None:
        """Documents between bounds, to be whole or cut."""
        whole, lost = [], []
        for start, stop in itertools.pairwise(bounds):
            if stop - start > self._longest:
                self._waiting.extend(_sections(start, stop, SECTION * self._longest))
            elif stop > start:
                sizes = self._table_of(start)[stop - start]
                if (sizes <= self._room).all():
                    whole.append((start, stop, sizes.tolist()))
                    lost.append(self._lost((self._room - sizes).tolist()))
                else:
                    self._waiting.append((start, stop))
        order = np.argsort(lost, kind="stable")
        rows = (bounds[-1] - bounds[0]) / self._longest
        kept = int(np.searchsorted(np.cumsum(np.array(lost)[order]), self._loss * rows, "right"))
        for place, number in enumerate(order.tolist()):
            start, stop, sizes = whole[number]
            if place < kept:
                self._shelf.put(sizes, (start, stop))
            else:
                self._waiting.append((start, stop))

    def _lost(self, gap: Sequence[int]) -> float:
        """The share of a side that stays empty, whatever pieces as they are common go there."""
        if len(gap) == 1:
            return 0.0
        first, last = gap
        high = (first - self._high * last) / self._sides[0]
        low = (last - first / self._low) / self._sides[1]
        return max(high, low, 0.0)

    def finish(self) -> None:
        """Places all that was added."""
        while self._shelf or self._waiting or self._heads:
            gap = self._room.tolist()
            has_parts = bool(self._waiting or self._heads)
            self._take_whole(gap, LEFT if has_parts else 0.0)
            if has_parts:
                self._take_parts(gap)
                self._take_whole(gap, 0.0)
            self._rows += 1

    def plan(self, total: int) -> CutPlan:
        """Of all that was placed."""
        starts, rows = np.array(self._placed, np.int64).reshape(-1, 2).T
        by_place = np.argsort(starts)
        order = np.argsort(rows[by_place], kind="stable")
        counts = np.bincount(rows, minlength=self._rows)
        kind = np.uint32 if len(order) < 2**32 else np.uint64
        return CutPlan(
            order.astype(kind),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64),
            np.append(starts[by_place], total).astype(np.uint64),
        )

    def _take_whole(self, gap: list[int], keep: float) -> None:
        """Whole documents into the row, until less than `keep` of it is free."""
        first = self._rows % len(gap)  # in turn, so that what goes beside them is used up evenly
        lost = None if self._free(gap) == 1 else self._lost
        while self._free(gap) >= keep:
            found = self._shelf.take(gap, first, lost)
            if not found:
                return
            sizes, (start, _) = found
            self._place(start, sizes, gap)
            lost = self._lost
            first = max(range(len(gap)), key=lambda side: gap[side] / self._sides[side])

    def _take_parts(self, gap: list[int]) -> None:
        """Pieces of long texts into the row, until it is full or nothing fits."""
        self._refill()
        if len(gap) > 1 and self._free(gap) > ROOMY:
            self._balance(gap)
        while self._heads and self._free(gap) > FULL:
            text = self._first(gap)
            cut, other, other_cut = text.fitting(gap), None, 0
            if cut < 1:
                return
            lost = self._lost_by(text, cut, gap)
            for candidate in self._heads:
                if lost <= FULL:
                    break
                if candidate is not text:
                    found = self._pair(text, candidate, gap)
                    if found[0] < lost:
                        (lost, cut, other_cut), other = found, candidate
            self._cut(text, cut, gap)
            if other is not None and other_cut:
                self._cut(other, other_cut, gap)
            self._refill()

    def _first(self, gap: list[int]) -> _Text:
        """The text that waits longest, or the one that fits best beside documents of one kind."""
        shares = [have / room for have, room in zip(gap, self._sides, strict=True)]
        if max(shares) < EVEN * min(shares):
            return self._heads[0]
        return min(self._heads, key=lambda text: self._lost_by(text, text.fitting(gap), gap))

    def _balance(self, gap: list[int]) -> None:
        """One more piece of the kind that there is too much of among those to be cut."""
        target = gap[0] / gap[-1]
        sizes = [text.table[self._longest // 2].tolist() for text in self._heads]
        heavy = [first > target * last for first, last in sizes]
        share = sum(heavy) / max(len(heavy), 1)
        if 0.4 <= share <= 0.6 or len(heavy) < HEADS:
            return
        text = self._heads[heavy.index(share > 0.5)]
        self._cut(text, max(1, text.fitting([g // 3 for g in gap])), gap)
        self._refill()

    def _pair(self, text: _Text, other: _Text, gap: list[int]) -> tuple[float, int, int]:
        """Lengths of two pieces that leave the least free, and what they leave."""
        most = text.fitting(gap)
        cuts = np.arange(min(self._least, most), most + 1)
        left = np.array(gap) - text.table[cuts]
        ends = [np.searchsorted(other.table[:, i], left[:, i], "right") for i in range(len(gap))]
        others = np.minimum(np.minimum.reduce(ends) - 1, other.stop - other.start)
        lost = ((left - other.table[others]) / self._room).max(axis=1)
        best = int(lost.argmin())
        return float(lost[best]), int(cuts[best]), int(others[best])

    def _lost_by(self, text: _Text, cut: int, gap: list[int]) -> float:
        return float(((np.array(gap) - text.table[cut]) / self._room).max())

    def _cut(self, text: _Text, cut: int, gap: list[int]) -> None:
        """The first `cut` tokens of a text into the row; the rest waits, or is whole itself."""
        self._heads = [head for head in self._heads if head.start != text.start]
        self._place(text.start, text.table[cut].tolist(), gap)
        start, stop = text.start + cut, text.stop
        if start == stop:
            return
        if stop - start <= self._longest:
            sizes = self._table_of(start)[stop - start]
            if (sizes <= self._room).all() and self._lost((self._room - sizes).tolist()) <= UNEVEN:
                self._shelf.put(sizes.tolist(), (start, stop))
                return
        self._waiting.append((start, stop))

    @property
    def used(self) -> float:
        """The share of positions that are taken, of the side where it is least."""
        return float((self._taken / (max(self._rows, 1) * self._room)).min())

    def _place(self, start: int, sizes: Sequence[int], gap: list[int]) -> None:
        self._taken += np.asarray(sizes)
        self._placed.append((start, self._rows))
        gap[:] = [have - size for have, size in zip(gap, sizes, strict=True)]

    def _refill(self) -> None:
        while len(self._heads) < HEADS and self._waiting:
            start, stop = self._waiting.popleft()
            self._heads.append(_Text(start, stop, self._table_of(start)))

    def _free(self, gap: Sequence[int]) -> float:
        return min(have / room for have, room in zip(gap, self._sides, strict=True))


def _sections(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """As few even parts as have `most` tokens at most."""
    count = -(-(stop - start) // most)
    places = [start + (stop - start) * number // count for number in range(count + 1)]
    return itertools.pairwise(places)


class _Shelf:
    """Whole documents, by which side they take more of and how much of it."""

    def __init__(self, room: Sequence[int]):
        self._room = list(room)
        self._kept: list[dict[int, list]] = [collections.defaultdict(list) for _ in room]
        self._bits = [0 for _ in room]  # bit n is set where a document takes n of that side

    def __bool__(self) -> bool:
        return any(self._bits)

    def put(self, sizes: Sequence[int], document: tuple[int, int]) -> None:
        """Adds a document."""
        shares = [size / room for size, room in zip(sizes, self._room, strict=True)]
        side = shares.index(max(shares))
        self._kept[side][sizes[side]].append((sizes, document))
        self._bits[side] |= 1 << sizes[side]

    def take(
        self, gap: Sequence[int], first: int, lost: Callable[[Sequence[int]], float] | None
    ) -> tuple[Sequence[int], tuple[int, int]] | None:
        """Of the largest that fit the one beside which the least is lost; without `lost` any.

        Args:
          gap: what is free on each side.
          first: the side whose documents are looked at first.
          lost: of a gap.
        """
        best, least = None, 9.0
        for side in (first, *(other for other in range(len(gap)) if other != first)):
            for size, place in self._fitting(side, gap):
                sizes = self._kept[side][size][place][0]
                left = [have - takes for have, takes in zip(gap, sizes, strict=True)]
                score = lost(left) if lost else 0.0
                if score < least:
                    best, least = (side, size, place), score
                if not least:
                    return self._remove(*best)
        return self._remove(*best) if best else None

    def _fitting(self, side: int, gap: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Documents of a side that fit, the largest first: size there and place among its like."""
        bits, tries = self._bits[side] & ((2 << gap[side]) - 1), TRIES
        while bits and tries:
            size = bits.bit_length() - 1
            kept = self._kept[side][size]
            for place in range(len(kept) - 1, max(len(kept) - 1 - tries, -1), -1):
                tries -= 1
                if all(s <= g for s, g in zip(kept[place][0], gap, strict=True)):
                    yield size, place
            bits &= ~(1 << size)

    def _remove(self, side: int, size: int, place: int) -> tuple[Sequence[int], tuple[int, int]]:
        kept = self._kept[side][size]
        found = kept.pop(place)
        if not kept:
            self._bits[side] &= ~(1 << size)
        return found
