"""Documents as one long row of tokens, and the pieces that objectives work on."""

import bisect
import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Documents(Protocol):
    """Tokenised documents by number."""

    offsets: np.ndarray  # [documents + 1] where each begins, end to end

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Token ids start..stop-1 of all documents end to end."""
        ...


@runtime_checkable
class Columns(Protocol):
    """The columns of tokenised records, as `token_store.TokenStore` has them."""

    def column(self, name: str) -> Documents:
        """One of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens in a row, and the document that each belongs to."""

    ids: np.ndarray  # [n] int32
    find_documents: Callable[[], np.ndarray]  # [n] int64; not all objectives ask

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """[n] the document of each token."""
        return self.find_documents()


class Stream:
    """Documents end to end in store order, each as `before + tokens + after`.

    Offsets are looked up where they lie, so memory doesn't grow with the corpus.
    """

    def __init__(
        self, documents: Documents, before: tuple[int, ...] = (), after: tuple[int, ...] = ()
    ):
        self._documents = documents
        self._before = np.array(before, np.int32)
        self._after = np.array(after, np.int32)
        self._frame = len(before) + len(after)
        self._length = self._start(self.documents)

    @property
    def documents(self) -> int:
        """How many."""
        return len(self._documents.offsets) - 1

    def __len__(self) -> int:
        return self._length

    def bounds(self) -> np.ndarray:
        """[documents + 1] int64: where each begins, and where the last one ends."""
        offsets = self._documents.offsets
        return offsets.astype(np.int64) + np.arange(len(offsets)) * self._frame

    def _start(self, document: int) -> int:
        return int(self._documents.offsets[document]) + document * self._frame

    def read(self, start: int, stop: int) -> Piece:
        """Tokens start..stop-1, fewer where the stream ends before."""
        stop = min(stop, len(self))
        if start >= stop:
            return Piece(np.zeros(0, np.int32), lambda: np.zeros(0, np.int64))
        if not self._frame:
            ids = self._documents.slice(start, stop)
            return Piece(ids, lambda: self._owners(start, stop)[0])
        numbers, begins, lengths = self._owners(start, stop)
        first = int(numbers[0])
        here = start - self._start(first)
        rows = [
            self._framed(a, b, here if n == 0 else 0, length + (here if n == 0 else 0))
            for n, (a, b, length) in enumerate(
                zip(begins[:-1], begins[1:], lengths.tolist(), strict=True)
            )
        ]
        return Piece(np.concatenate(rows), lambda: numbers)

    def _owners(self, start: int, stop: int) -> tuple[np.ndarray, list[int], np.ndarray]:
        """The document of each token, where the documents begin, and how much of each is there."""
        # "right" steps over empty documents, which begin where the next one does
        if self._frame:
            places = range(self.documents + 1)
            first = bisect.bisect_right(places, start, key=self._start) - 1
            last = bisect.bisect_left(places, stop, lo=first, key=self._start)
        else:
            offsets = self._documents.offsets
            first = int(np.searchsorted(offsets, start, side="right")) - 1
            last = int(np.searchsorted(offsets, stop, side="left"))
        begins = self._documents.offsets[first : last + 1].tolist()
        frames = np.arange(first, last + 1) * self._frame
        lengths = np.diff(np.clip(np.array(begins) + frames, start, stop))
        return np.repeat(np.arange(first, last), lengths), begins, lengths

    def read_document(self, document: int, start: int, stop: int) -> Piece:
        """Tokens start..stop-1 of one document, its frame included."""
        begin, end = self._documents.offsets[document : document + 2].tolist()
        ids = self._framed(begin, end, start, min(stop, end - begin + self._frame))
        return Piece(ids, lambda: np.full(len(ids), document))

    def _framed(self, begin: int, end: int, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the document that lies from begin to end, frame included."""
        before, length = len(self._before), end - begin
        inner = slice(max(start - before, 0), max(min(stop - before, length), 0))
        parts = [self._before[start:stop]] if start < before else []
        if inner.start < inner.stop:
            parts.append(self._documents.slice(begin + inner.start, begin + inner.stop))
        if stop > before + length:
            past = before + length
            parts.append(self._after[max(start - past, 0) : stop - past])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else self._before[:0]


@runtime_checkable
class Pieces(Protocol):
    """What an objective makes one example of."""

    def __len__(self) -> int: ...

    def sizes(self) -> np.ndarray:
        """[pieces] int64: positions that each takes, the overlap left out."""
        ...

    def read(self, index: int) -> Piece:
        """Piece `index`."""
        ...


@dataclasses.dataclass(frozen=True)
class Windows:
    """The stream cut every `width` tokens, whatever documents lie there (concat and split).

    `overlap` tokens of the next window are read too: what the last one predicts.
    """

    stream: Stream
    width: int
    overlap: int = 0

    def __len__(self) -> int:
        return -(-max(len(self.stream) - self.overlap, 0) // self.width)

    def sizes(self) -> np.ndarray:
        """As in `Pieces`."""
        sizes = np.full(len(self), self.width, np.int64)
        if len(sizes):
            sizes[-1] = len(self.stream) - self.overlap - self.width * (len(self) - 1)
        return sizes

    def read(self, index: int) -> Piece:
        """As in `Pieces`."""
        start = index * self.width
        return self.stream.read(start, start + self.width + self.overlap)


@dataclasses.dataclass(frozen=True)
class Documentwise:
    """Documents by themselves; only one longer than `width` is cut, every `width` tokens."""

    stream: Stream
    width: int
    overlap: int = 0

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        """[documents + 1]: the number of each document's first piece."""
        counts = -(-self._totals // self.width)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    @functools.cached_property
    def _totals(self) -> np.ndarray:
        lengths = np.diff(self.stream._documents.offsets).astype(np.int64) + self.stream._frame
        return np.maximum(lengths - self.overlap, 0)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def sizes(self) -> np.ndarray:
        """As in `Pieces`."""
        owner = np.repeat(np.arange(len(self._totals)), np.diff(self._firsts))
        place = np.arange(len(self)) - self._firsts[owner]
        return np.minimum(self._totals[owner] - place * self.width, self.width)

    def read(self, index: int) -> Piece:
        """As in `Pieces`."""
        document = int(np.searchsorted(self._firsts, index, side="right")) - 1
        start = (index - int(self._firsts[document])) * self.width
        return self.stream.read_document(document, start, start + self.width + self.overlap)


@dataclasses.dataclass(frozen=True)
class RoomyParts(Documentwise):
    """`Documentwise`, but parts of a cut document are shorter by `room` where these are no more."""

    room: int = 0

    @functools.cached_property
    def _steps(self) -> np.ndarray:
        """[documents] every how many tokens each is cut."""
        counts = np.maximum(np.diff(self._firsts), 1)
        return np.maximum(-(-self._totals // counts), self.width - self.room)

    def sizes(self) -> np.ndarray:
        """As in `Pieces`."""
        owner = np.repeat(np.arange(len(self._totals)), np.diff(self._firsts))
        step, place = self._steps[owner], np.arange(len(self)) - self._firsts[owner]
        return np.minimum(self._totals[owner] - place * step, step)

    def read(self, index: int) -> Piece:
        """As in `Pieces`."""
        document = self._document(index)
        step = int(self._steps[document])
        start = (index - int(self._firsts[document])) * step
        return self.stream.read_document(document, start, start + step + self.overlap)

    def ends(self) -> np.ndarray:
        """[pieces] whether each is the last of its document."""
        ends = np.zeros(len(self), bool)
        ends[self._firsts[1:][np.diff(self._firsts) > 0] - 1] = True
        return ends

    def is_end(self, index: int) -> bool:
        """Whether a piece is the last of its document."""
        return int(self._firsts[self._document(index) + 1]) == index + 1

    def _document(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1
