"""Documents as sentences, and the runs of them that pairs of texts are made of.

A corpus is cut once, not anew in every epoch, so that each run of sentences has a number. Where it
is cut lies on disk beside the tokens, eight bytes a sentence, and is looked up there.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Integer

from t5x_lite.data.packing import kept_arrays
from t5x_lite.data.streams import Columns, Documents
from t5x_lite.data.token_store import Tokenizer
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

LINES = r"\n"
END = "\n"
FORMAT = 1  # of what `kept_arrays` keeps
BLOCK = 2**14  # documents cut at a time: bounds memory
SEED = 0  # of which documents have short runs


@dataclasses.dataclass(frozen=True)
class Sentences(Tokenizer):
    """The ids of a record's `text`, sentence by sentence, and how many each sentence has.

    Attributes:
      between: a regular expression of what stands between sentences. Each loses the spaces around
        it and ends with a line's end instead: so the last one of a document, or the first one,
        shows no more than the others. Empty ones are left out.
    """

    fields: ClassVar[tuple[str, ...]] = ("text",)
    between: str = LINES

    def __post_init__(self):
        try:
            re.compile(self.between)
        except re.error as error:
            raise UserError(f"sentences={self.between!r} isn't a pattern: {error}.") from error

    @property
    def columns(self) -> Mapping[str, str | None]:
        """As in `Tokenizer`."""
        return {"text": None, "sentences": "uint32"}

    def tokenize(
        self, records: Sequence[Mapping[str, str]], vocabulary: Vocabulary
    ) -> list[tuple[Any, ...]]:
        """As in `Tokenizer`."""
        split = [self.split(record["text"]) for record in records]
        flat = vocabulary.encode_all([sentence for own in split for sentence in own])
        encoded = iter([np.asarray(ids, np.int64) for ids in flat])
        rows = []
        for own in split:
            ids = [next(encoded) for _ in own]
            rows.append((np.concatenate([np.zeros(0, np.int64), *ids]), [len(i) for i in ids]))
        return rows

    def split(self, text: str) -> list[str]:
        """The sentences of a text."""
        gaps = [match.span() for match in re.finditer(self.between, text)]
        begins, ends = [0, *(end for _, end in gaps)], [*(start for start, _ in gaps), len(text)]
        stripped = (text[a:b].strip() for a, b in zip(begins, ends, strict=True))
        return [f"{sentence}{END}" for sentence in stripped if sentence]


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of consecutive sentences of one document, all documents end to end.

    A sentence longer than half a row is cut evenly, so that any two fit into one.

    Attributes:
      bounds: [sentences + 1] where each begins in the column `text`.
      firsts: [runs] the first sentence of each run.
      stops: [runs] the one after its last.
      documents: [documents + 1] where each begins in the column `text`.
    """

    bounds: Integer[np.ndarray, " _"]
    firsts: Integer[np.ndarray, " runs"]
    stops: Integer[np.ndarray, " runs"]
    documents: Integer[np.ndarray, " _"]

    def __len__(self) -> int:
        return len(self.firsts)

    def cuts(self, run: int) -> Int[np.ndarray, " _"]:
        """Where the sentences of a run begin, and where the last one ends."""
        return self.bounds[int(self.firsts[run]) : int(self.stops[run]) + 1].astype(np.int64)

    def sizes(self) -> Int[np.ndarray, " _"]:
        """[runs] tokens of each."""
        return (self.bounds[self.stops] - self.bounds[self.firsts]).astype(np.int64)

    def begins(self, start: int, stop: int) -> Int[np.ndarray, " _"]:
        """Where sentences begin in what is read from `start` to `stop`, counted from there."""
        inside = slice(_place(self.bounds, start), _place(self.bounds, stop))
        return self.bounds[inside].astype(np.int64) - start

    def siblings(self, run: int) -> range:
        """The runs of the same document."""
        first, last = self._document(int(self.firsts[run]))
        return range(_place(self.firsts, first), _place(self.firsts, last))

    def passage(self, sentence: int, size: int, room: int) -> tuple[int, int]:
        """From where to where to read a text of about `size` tokens that begins at a sentence.

        Of whole sentences of its document, one or more, as near to `size` as they come; earlier
        where too few follow; its last one is cut where it takes more than `room`.
        """
        first, last = self._document(sentence)
        latest = int(self.bounds[last]) - size
        begin = max(first, min(sentence, _place(self.bounds, latest, "right") - 1))
        start = int(self.bounds[begin])
        after = min(max(_place(self.bounds, start + size), begin + 1), last)
        ends = [int(self.bounds[n]) for n in (after - 1, after) if n > begin]
        nearest = min(ends, key=lambda end: abs(end - start - size))
        return start, min(nearest, start + room)

    def _document(self, sentence: int) -> tuple[int, int]:
        """The first sentence of the document that a sentence is of, and of the next one."""
        place = _place(self.documents, int(self.bounds[sentence]), "right")
        begin, end = self.documents[place - 1 : place + 1].tolist()
        return _place(self.bounds, begin), _place(self.bounds, end)


def _place(array: np.ndarray, value: int, side: str = "left") -> int:
    # A number of the array's own type: with another one, all of the file would be converted.
    return int(np.searchsorted(array, array.dtype.type(max(value, 0)), side))


def find_runs(store: Columns, sentences: str, room: int, short: float | int) -> Runs:
    """The runs of a store, cut where nobody did before.

    Args:
      store: records with the columns of `Sentences`.
      sentences: how these were told apart, for people.
      room: tokens of a run, at most.
      short: share of the documents whose runs have a smaller room, of 2 tokens or more.
    """
    text, lengths = store.column("text"), store.column("sentences")
    folder = getattr(store, "folder", None)  # what lies in memory has none
    key = {"runs": FORMAT, "split": getattr(store, "split", ""), "sentences": sentences}
    key |= {"room": room, "short": float(short)}
    made = functools.partial(_cut, lengths, room, short)
    found = kept_arrays(folder, key, ("bounds", "firsts", "stops"), made)
    return Runs(**found, documents=np.asarray(text.offsets))


def _cut(lengths: Documents, room: int, short: float | int) -> dict[str, np.ndarray]:
    """All that `Runs` has but the documents."""
    bounds, firsts, stops = (
        [np.zeros(1, np.int64)],
        [np.zeros(0, np.int64)],
        [np.zeros(0, np.int64)],
    )
    sentences = tokens = 0
    documents = len(lengths.offsets) - 1
    for start in range(0, documents, BLOCK):
        offsets = lengths.offsets[start : start + BLOCK + 1].astype(np.int64)
        noise = np.random.default_rng([SEED, start])
        rooms = np.full(len(offsets) - 1, room)
        is_short = noise.random(len(rooms)) < short
        rooms[is_short] = noise.integers(2, room + 1, int(is_short.sum()))
        sizes = lengths.slice(int(offsets[0]), int(offsets[-1])).astype(np.int64)
        sizes, counts = _halved(sizes, offsets - offsets[0], room // 2)
        ends = np.cumsum(sizes)
        begins = _first_sentences(ends, counts, rooms)
        after = np.append(begins, len(ends))[1:]
        is_pair = ends[after - 1] - ends[begins] + sizes[begins] > 1  # one token is none
        bounds.append(tokens + ends)
        firsts.append(sentences + begins[is_pair])
        stops.append(sentences + after[is_pair])
        sentences, tokens = sentences + len(sizes), tokens + int(sizes.sum())
    arrays = {"bounds": bounds, "firsts": firsts, "stops": stops}
    return {name: np.concatenate(parts).astype(np.uint64) for name, parts in arrays.items()}


def _halved(
    sizes: Int[np.ndarray, " n"], offsets: Int[np.ndarray, " _"], most: int
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " _"]]:
    """Sizes without 0, those above `most` cut evenly, and how many of them each document has."""
    parts = -(-sizes // most)
    owner = np.repeat(np.arange(len(sizes)), parts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    cut = sizes[owner] // parts[owner] + (place < sizes[owner] % parts[owner])
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(parts)])
    return cut, np.diff(before[offsets])


def _first_sentences(
    ends: Int[np.ndarray, " n"], counts: Int[np.ndarray, " documents"], rooms: np.ndarray
) -> Int[np.ndarray, " runs"]:
    """The first sentence of each run: as many as fit, but two where a document has them."""
    numbers = np.arange(len(ends))
    owner = np.repeat(np.arange(len(counts)), counts)
    stop = np.cumsum(counts)  # of each document
    starts = ends - np.diff(ends, prepend=0)
    after = np.searchsorted(ends, starts + rooms[owner], side="right")
    after = np.minimum(np.maximum(after, numbers + 2), stop[owner])
    # All documents at once, run after run: sequential only within the one that has the most.
    heads, found = (stop - counts)[counts > 0], []
    while len(heads):
        found.append(heads)
        heads = after[heads][after[heads] < stop[owner[heads]]]
    firsts = np.sort(np.concatenate(found)) if found else numbers
    # A last sentence that would be alone takes one from the run before, where that has three.
    own = np.diff(firsts, append=len(ends))
    alone = np.flatnonzero((own == 1) & (np.roll(own, 1) > 2))
    same = owner[firsts[alone]] == owner[firsts[alone] - 1]
    alone = alone[same & (alone > 0)]
    firsts[alone] -= 1
    return firsts
