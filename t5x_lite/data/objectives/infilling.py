"""Predict a text's middle from both sides: documents with their middle moved to the end."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from t5x_lite.data.converters import Segment, Shapes, token_shapes
from t5x_lite.data.objectives.base import (
    BEST_FIT,
    DECODER,
    NONE,
    Examples,
    NoiseOf,
    Objective,
    Sides,
    check_length,
    column,
)
from t5x_lite.data.streams import Columns, RoomyParts, Stream
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

Ids = Int[np.ndarray, " n"]
MARKS = 4  # positions that it takes to infill part of a document: three sentinels and an end
PSM, SPM = "psm", "spm"


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle(Objective):
    """Fill in the middle (Bavarian et al. 2022), as a decoder's next-token prediction.

    A document is cut at two uniformly drawn places between its tokens (the paper's between its
    characters: a middle begins and ends where tokens do) and becomes, in the paper's orders

        PSM   bos <prefix> prefix <suffix> suffix <middle> middle eos
        SPM   bos <prefix> <suffix> suffix <middle> prefix middle eos

    or stays as it is. All tokens bear loss. A document longer than a row is first cut into parts,
    no more than without infilling, and each that leaves room for the marks is treated so
    ("context-level" infilling, §3.2): no infilled text is ever cut.

    Attributes:
      rate: how many of the documents become this, 0.5 in most of the paper.
      spm: share of them in the order SPM.
      sentinels: what stands for <prefix>, <suffix> and <middle>: sentinels, or special tokens of an
        imported vocabulary, such as StarCoder's "<fim_prefix>", "<fim_suffix>", "<fim_middle>".
      packing: "best_fit": whole documents, several a row; "none": one document, or part of one, a
        row.
    """

    families: ClassVar[tuple[str, ...]] = (DECODER,)
    packings: ClassVar[tuple[str, ...]] = (BEST_FIT, NONE)
    reads_sentinels: ClassVar[bool] = True
    rate: float | int = 0.5
    spm: float | int = 0.5
    sentinels: Sequence[str] = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
    packing: str = BEST_FIT

    def __post_init__(self):
        self._check_packing(self.packing)
        object.__setattr__(self, "sentinels", tuple(self.sentinels))
        if not 0 < self.rate <= 1:
            raise UserError(f"rate={self.rate} must be above 0 and at most 1; the paper has 0.5.")
        if not 0 <= self.spm <= 1:
            raise UserError(f"spm={self.spm} must lie between 0 and 1; the paper has 0.5.")
        if len(set(self.sentinels)) != 3 or len(self.sentinels) != 3:
            raise UserError(
                f"sentinels={list(self.sentinels)} must be three different names: of what comes "
                f"before the prefix, the suffix and the middle."
            )

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        check_length(length, MARKS + 3, "three parts and their marks")
        return {"tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        return token_shapes(sides["tokens"])

    def examples(self, store: Columns, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        vocabulary.require("bos_id", "eos_id")
        marks = np.array([special_id(vocabulary, name) for name in self.sentinels], np.int32)
        if len({*marks.tolist()} - {vocabulary.bos_id, vocabulary.eos_id}) < 3:
            raise UserError(f"sentinels={list(self.sentinels)} must be ids of their own: {marks}.")
        stream = Stream(store.column("text"), (vocabulary.bos_id,), (vocabulary.eos_id,))
        parts = RoomyParts(stream, sides["tokens"], overlap=1, room=MARKS)
        return _Infilled(self, parts, marks, vocabulary)


def special_id(vocabulary: Vocabulary, name: str) -> int:
    """The id of a sentinel or of a special token. Raises UserError where there is none."""
    for sentinel in vocabulary.sentinel_ids:
        if vocabulary.piece(sentinel) == name:
            return int(sentinel)
    ids = vocabulary.encode(name)
    if len(ids) == 1 and vocabulary.piece(ids[0]) == name:
        return int(ids[0])
    raise UserError(
        f"the vocabulary ({vocabulary.size} ids, {len(vocabulary.sentinel_ids)} of them sentinels) "
        f"has no token {name!r}; name others, or raise extra_ids and name <extra_id_0> …"
    )


class _Infilled:
    """`Examples` of one document, or part of one, each."""

    def __init__(
        self, objective: FillInTheMiddle, parts: RoomyParts, marks: Ids, vocabulary: Vocabulary
    ):
        self._objective, self._parts, self._marks = objective, parts, marks
        self._bos, self._eos = vocabulary.bos_id, vocabulary.eos_id
        self.are_sizes_fixed, self.is_noisy = objective.rate == 1, True

    def __len__(self) -> int:
        return len(self._parts)

    def _can_be(self, size):
        """Whether there is a text, and room for the marks; `size` is a number or an array."""
        return (size > MARKS) & (size <= self._parts.width)

    def _is_infilled(self, size: int, noise: np.random.Generator) -> bool:
        """Drawn first of all, where it can be."""
        return self._can_be(size) and noise.random() < self._objective.rate

    def segments(self, index: int, noise: np.random.Generator) -> list[Segment]:
        """As in `Examples`."""
        ids = self._parts.read(index).ids
        is_end = self._parts.is_end(index)
        if self._is_infilled(infilled_size(len(ids) - 1, is_end), noise):
            text = ids[1:-1] if is_end else ids[1:]
            order = SPM if noise.random() < self._objective.spm else PSM
            first, second = sorted(noise.integers(0, len(text), 2, endpoint=True).tolist())
            moved = infill(text, first, second, self._marks, order)
            ids = np.concatenate([[self._bos], moved, [self._eos]]).astype(np.int32)
        weights = np.ones(len(ids) - 1, np.float32)
        return [{"tokens": ids[:-1], "targets": ids[1:], "weights": weights}]

    def sizes(self, noise_of: NoiseOf) -> np.ndarray:
        """As in `Examples`; of the noise only whether a document is infilled matters."""
        plain = self._parts.sizes()
        infilled = infilled_size(plain, self._parts.ends())
        chosen = self._can_be(infilled)
        if not self.are_sizes_fixed:
            for index in np.flatnonzero(chosen).tolist():
                chosen[index] = self._is_infilled(int(infilled[index]), noise_of(index))
        return column(np.where(chosen, infilled, plain))


def infilled_size(size, is_end):
    """Positions of an infilled part that takes `size` as it is; its document's eos is one of them.

    Works on numbers and on arrays of them.
    """
    return size + MARKS - is_end


def infill(
    text: Ids, first: int, second: int, marks: Int[np.ndarray, " 3"], order: str
) -> Int[np.ndarray, " m"]:
    """The text with its tokens first … second-1 at the end, and marks before the three parts."""
    before, middle, after = text[:first], text[first:second], text[second:]
    prefix_mark, suffix_mark, middle_mark = marks
    if order == SPM:
        parts = [[prefix_mark, suffix_mark], after, [middle_mark], before, middle]
    else:
        parts = [[prefix_mark], before, [suffix_mark], after, [middle_mark], middle]
    return np.concatenate(parts).astype(np.int32)


def restore(ids: Ids, marks: Int[np.ndarray, " 3"]) -> Int[np.ndarray, " m"]:
    """The text that `infill` was given; ids without marks as they are.

    Raises:
      UserError: some of the marks, or in another order.
    """
    places = [np.flatnonzero(ids == mark).tolist() for mark in marks]
    if not any(places):
        return ids
    flat = [place for found in places for place in found]
    if [len(found) for found in places] != [1, 1, 1] or sorted(flat) != flat or flat[0] != 0:
        raise UserError(f"sentinels at {places} aren't those of an infilled text.")
    _, suffix, middle = flat
    before, after, rest = ids[1:suffix], ids[suffix + 1 : middle], ids[middle + 1 :]
    if suffix == 1:  # SPM, or PSM without any prefix: the same
        return np.concatenate([rest, after])
    return np.concatenate([before, rest, after])
