"""Continue a text whose beginning is read in both directions: the prefix LM."""

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np

from t5x_lite.data.converters import Segment, Shapes, encoder_decoder, token_shapes
from t5x_lite.data.filling import Table, growing
from t5x_lite.data.objectives.base import (
    BEST_FIT,
    BOTH,
    DECODER,
    CutAnew,
    Examples,
    FromPieces,
    Objective,
    Sides,
    check_length,
    column,
    pieces_of,
)
from t5x_lite.data.objectives.causal import next_tokens
from t5x_lite.data.objectives.noise import given_at, random_prefix
from t5x_lite.data.streams import Columns, Piece, Stream
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
    """Read a text's beginning, write the rest (Liu et al. 2018; Raffel et al. 2020 §3.2.1).

    Of n tokens 1 … n-1 are given, all as likely. The rest alone bears loss; it ends with eos where
    its document does. A decoder alone reads `bos + given` as a prefix that sees itself in both
    directions; with an encoder, that reads `given + eos`.

    Attributes:
      density: share of the tokens that are asked for, on average: 0.5, the most, is T5's; with
        less, at least a part of 1 - 2·density is given.
      family: "decoder-only" or "encoder-decoder"; set for the model by itself.
      packing: "best_fit": whole documents, several a row; "split": documents end to end, cut every
        `length` tokens: parts of several documents in a decoder's row are split each, and an
        encoder and a decoder share one window, so that half of their rows is empty; "none": one
        document, or part of one, a row.
    """

    families: ClassVar[tuple[str, ...]] = (DECODER, BOTH)
    density: float | int = 0.5
    family: str = dataclasses.field(default=DECODER, kw_only=True)
    packing: str = dataclasses.field(default=BEST_FIT, kw_only=True)

    def __post_init__(self):
        self._check_packing(self.packing)
        if self.family not in self.families:
            raise UserError(f"family={self.family!r} must be one of {', '.join(self.families)}.")
        if not 0 < self.density <= 0.5:
            raise UserError(f"density={self.density} must be above 0 and at most 0.5, T5's.")

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        check_length(length, 2, "a prefix language model")
        if self.family == DECODER:
            return {"tokens": length}
        # As much is asked for as is given, or less: so both sides are full at once.
        share = self.density / (1 - self.density) if self.packing == BEST_FIT else 1
        return {"tokens": max(2, math.ceil(length * share)), "encoder_tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        if self.family == DECODER:
            return token_shapes(sides["tokens"], "prefix")
        encoder_side = token_shapes(sides["encoder_tokens"], side="encoder_")
        return encoder_side | token_shapes(sides["tokens"])

    def examples(self, store: Columns, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        if self.family == DECODER:
            return self._of_a_decoder(store, vocabulary, sides)
        vocabulary.require("eos_id")
        end = np.array([vocabulary.eos_id], np.int32)

        def make(piece: Piece, noise: np.random.Generator) -> list[Segment]:
            given = random_prefix(len(piece.ids), self.density, noise)
            inputs = np.concatenate([piece.ids[:given], end])
            return [encoder_decoder(inputs, piece.ids[given:], vocabulary.start_id)]

        stream = Stream(store.column("text"), (), (vocabulary.eos_id,))
        if self.packing == BEST_FIT:
            longest = sum(sides.values()) - 1  # which fits if it is given as much as fits
            return CutAnew(stream, longest, make, functools.partial(self._table, longest))
        width = min(sides.values())  # all but one of the tokens, and the end mark
        return FromPieces(pieces_of(stream, self.packing, width), make)

    def _table(self, longest: int, noise: np.random.Generator) -> Table:
        n = np.arange(longest + 1)
        given = given_at(n, self.density, noise.random())
        return growing(np.stack([n - given, given + 1], axis=1))

    def _of_a_decoder(self, store: Columns, vocabulary: Vocabulary, sides: Sides) -> Examples:
        vocabulary.require("bos_id", "eos_id")
        stream = Stream(store.column("text"), (vocabulary.bos_id,), (vocabulary.eos_id,))

        def make(piece: Piece, noise: np.random.Generator) -> list[Segment]:
            segments = next_tokens(piece, vocabulary.bos_id)
            return [self._with_prefix(segment, noise) for segment in segments]

        return FromPieces(pieces_of(stream, self.packing, sides["tokens"], overlap=1), make, column)

    def _with_prefix(self, segment: Segment, noise: np.random.Generator) -> Segment:
        """The given targets bear no loss; their inputs and the first other one's are the prefix."""
        given = random_prefix(int(segment["weights"].sum()), self.density, noise)
        weights, prefix = segment["weights"].copy(), np.zeros(len(segment["tokens"]), np.int32)
        weights[:given], prefix[: given + 1] = 0, 1
        return segment | {"weights": weights, "prefix": prefix}
