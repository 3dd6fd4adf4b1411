"""What every objective is: text fields → columns of ids → examples → segments of rows.

Pieces and records are addressed by index and noise is given as a generator, so an example is a pure
function of (store, index, noise).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from t5x_lite.data.converters import SIDES, Segment, Shapes, sizes_of
from t5x_lite.data.filling import CutPlan, Span, Table, fill
from t5x_lite.data.streams import Columns, Documentwise, Piece, Pieces, Stream, Windows
from t5x_lite.data.token_store import Tokenizer
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

DECODER, ENCODER, BOTH = "decoder-only", "encoder-only", "encoder-decoder"
SPLIT, BEST_FIT, NONE = "split", "best_fit", "none"
NoiseOf = Callable[[int], np.random.Generator]  # the noise of an example, by its index
Sides = Mapping[str, int]  # positions of a row: "tokens", and of an encoder-decoder both


@runtime_checkable
class Examples(Protocol):
    """One split's examples under one objective.

    `is_noisy`: whether they draw from their noise; `are_sizes_fixed`: whatever that is.
    """

    is_noisy: bool
    are_sizes_fixed: bool

    def __len__(self) -> int:
        """Examples in an epoch."""
        ...

    def segments(self, index: int, noise: np.random.Generator) -> list[Segment]:
        """Example `index`, mostly one segment; the same noise gives the same."""
        ...


@runtime_checkable
class SizedExamples(Examples, Protocol):
    """Examples that are the same text in every epoch; of the others, `CutAnew`, plans say."""

    def sizes(self, noise_of: NoiseOf) -> np.ndarray:
        """[examples, sides] positions of each, in the order of `converters.SIDES`."""
        ...


@dataclasses.dataclass(frozen=True)
class PlainText(Tokenizer):
    """The ids of a record's `text`."""

    fields: ClassVar[tuple[str, ...]] = ("text",)

    @property
    def columns(self) -> Mapping[str, str | None]:
        """As in `Tokenizer`."""
        return {"text": None}

    def tokenize(
        self, records: Sequence[Mapping[str, str]], vocabulary: Vocabulary
    ) -> list[tuple[Any, ...]]:
        """As in `Tokenizer`."""
        return [(ids,) for ids in vocabulary.encode_all([record["text"] for record in records])]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base of the objectives.

    `families` are the kinds of model (`ModelConfig.kind`) that can learn it. One that several can
    has a field `family`, which `for_family` sets.

    `answers`: what a task's metrics compare, a `kind` of task_metrics.py; None: nothing.

    For what writes prompts: `reads_sentinels`, whether sentinels stand for something in what the
    model reads; `corrupts_spans`, whether they always do, for what it is to write.
    """

    families: ClassVar[tuple[str, ...]]
    packings: ClassVar[tuple[str, ...]] = (SPLIT, BEST_FIT, NONE)
    answers: ClassVar[str | None] = None
    reads_sentinels: ClassVar[bool] = False
    corrupts_spans: ClassVar[bool] = False

    def for_family(self, kind: str) -> "Objective":
        """The same for models of a kind. Raises UserError where they can't learn it."""
        if kind not in self.families:
            raise UserError(
                f"objective {type(self).__name__} is for {' and '.join(self.families)} models, and "
                f"this one is {kind}; choose another task or model file."
            )
        names = {field.name for field in dataclasses.fields(self)}
        return dataclasses.replace(self, family=kind) if "family" in names else self

    @property
    def reads_prefix(self) -> bool:
        """Whether a decoder sees what it is given in both directions (`Batch`'s `prefix`)."""
        return "prefix" in self.shapes(dict.fromkeys(SIDES, 1))

    @property
    def tokenizer(self) -> Tokenizer:
        """How a record becomes ids."""
        return PlainText()

    def sides(self, length: int) -> Sides:
        """Positions of a row on each side. Raises UserError where `length` is too small."""
        raise NotImplementedError

    def shapes(self, sides: Sides) -> Shapes:
        """Shape and dtype of every entry of a row."""
        raise NotImplementedError

    def examples(self, store: Columns, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """One split's examples. Raises UserError where the vocabulary lacks an id it needs."""
        raise NotImplementedError

    def _check_packing(self, packing: str) -> None:
        if packing not in self.packings:
            raise UserError(
                f"{type(self).__name__}.packing={packing!r} is unknown; use "
                f"{' or '.join(map(repr, self.packings))}."
            )


def pieces_of(stream: Stream, packing: str, width: int, overlap: int = 0) -> Pieces:
    """Windows of the stream, or documents by themselves."""
    cut = Windows if packing == SPLIT else Documentwise
    return cut(stream, width, overlap)


class FromPieces:
    """Examples that a function makes of pieces.

    Args:
      pieces: what to make them of.
      make: a piece and its noise to segments.
      side_sizes: sizes of pieces, [n], to positions on each side, [n, sides]; None where these
        depend on the noise: then making every example tells.
      is_noisy: whether `make` draws from the noise.
    """

    def __init__(
        self,
        pieces: Pieces,
        make: Callable[[Piece, np.random.Generator], list[Segment]],
        side_sizes: Callable[[np.ndarray], np.ndarray] | None = None,
        is_noisy: bool = True,
    ):
        self._pieces, self._make = pieces, make
        self._side_sizes = side_sizes
        self.are_sizes_fixed, self.is_noisy = side_sizes is not None, is_noisy

    def __len__(self) -> int:
        return len(self._pieces)

    def segments(self, index: int, noise: np.random.Generator) -> list[Segment]:
        """As in `Examples`."""
        return self._make(self._pieces.read(index), noise)

    def sizes(self, noise_of: NoiseOf) -> np.ndarray:
        """As in `SizedExamples`."""
        if self._side_sizes is not None:
            return self._side_sizes(self._pieces.sizes())
        return measured_sizes(self, noise_of)


class CutAnew:
    """Examples whose sizes their noise decides, cut from a stream anew in each epoch.

    A plan says where; an example is named by its `Span`, and its noise by where it begins.

    Args:
      stream: the documents.
      longest: tokens that no example has more of.
      make: a piece and its noise to segments.
      table_of: noise to the sizes of what `make` gives by it, for pieces of 0 … `longest` tokens.
    """

    is_noisy, are_sizes_fixed = True, False

    def __init__(
        self,
        stream: Stream,
        longest: int,
        make: Callable[[Piece, np.random.Generator], list[Segment]],
        table_of: Callable[[np.random.Generator], Table],
    ):
        self._stream, self._longest, self._make, self._table_of = stream, longest, make, table_of

    def __len__(self) -> int:
        """As many as there would be if each was as long as can be."""
        return len(Documentwise(self._stream, self._longest))

    def segments(self, index: Span, noise: np.random.Generator) -> list[Segment]:
        """As in `Examples`."""
        return self._make(self._stream.read(*index), noise)

    def plan(self, noise_of: NoiseOf, room: Sequence[int]) -> CutPlan:
        """Where the documents are cut, and which pieces share a row."""
        return fill(self._stream.bounds(), lambda place: self._table_of(noise_of(place)), room)


def measured_sizes(examples: Examples, noise_of: NoiseOf) -> np.ndarray:
    """[examples, sides] by making every one: for objectives whose noise decides."""
    rows = []
    for index in range(len(examples)):
        sizes = sizes_of(examples.segments(index, noise_of(index)))
        rows.append([sizes[side] for side in SIDES if side in sizes] or [0])
    width = max((len(row) for row in rows), default=1)
    return np.array([row if len(row) == width else [0] * width for row in rows], np.int64)


def column(sizes: np.ndarray) -> np.ndarray:
    """Sizes of a single side, [n] → [n, 1]."""
    return np.expand_dims(sizes, 1)


def check_length(length: int, least: int, what: str) -> None:
    """Raises UserError where a row is too short."""
    if length < least:
        raise UserError(f"length={length} is too small for {what}; give at least {least}.")


def check_fraction(name: str, value: float | int) -> None:
    """Raises UserError for what isn't between 0 and 1."""
    if not (math.isfinite(value) and 0 < value < 1):
        raise UserError(f"{name}={value} must lie between 0 and 1, without them; try 0.15.")
