"""The documents of a split as one long row of tokens, read anywhere in it."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Documents(Protocol):
    """Tokenised documents by number."""

    lengths: np.ndarray  # [documents] tokens of each

    def read(self, first: int, last: int) -> list[np.ndarray]:
        """Token ids of documents first..last-1."""
        ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """What lies between two places of a stream: ids, and the document that each belongs to."""

    ids: np.ndarray  # [n] int32
    documents: np.ndarray  # [n] int64


class Stream:
    """Documents end to end in store order, each as `before + tokens + after`."""

    def __init__(
        self, documents: Documents, before: tuple[int, ...] = (), after: tuple[int, ...] = ()
    ):
        self._documents = documents
        self._before = np.array(before, np.int32)
        self._after = np.array(after, np.int32)
        lengths = documents.lengths.astype(np.int64) + len(before) + len(after)
        # [documents + 1]: where each begins, and where the last ends
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Piece:
        """Tokens start..stop-1, fewer where the stream ends before."""
        stop = min(stop, len(self))
        if start >= stop:
            return Piece(np.zeros(0, np.int32), np.zeros(0, np.int64))
        # "right" steps over empty documents, which begin where the next one does
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        rows = [
            np.concatenate([self._before, row, self._after])
            for row in self._documents.read(first, last)
        ]
        cut = slice(start - self._starts[first], stop - self._starts[first])
        numbers = np.repeat(np.arange(first, last), [len(row) for row in rows])
        return Piece(np.concatenate(rows)[cut], numbers[cut])
