"""Predict the next token."""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from t5x_lite.data.converters import Segment, Shapes, token_shapes
from t5x_lite.data.objectives.base import (
    DECODER,
    SPLIT,
    Examples,
    FromPieces,
    Objective,
    Sides,
    check_length,
    column,
    pieces_of,
)
from t5x_lite.data.streams import Columns, Piece, Stream
from t5x_lite.data.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Predict the next token of `bos + document + eos`.

    A bos is never a target that counts, every other token is one once an epoch; documents are
    segments with positions of their own.

    Attributes:
      packing: "split": documents end to end, cut every `length` tokens (window i holds
        stream[iL : iL+L], its targets are one later); "best_fit": whole documents, of which only
        one that is longer than a row is cut; "none": one document, or part of one, a row.
    """

    families: ClassVar[tuple[str, ...]] = (DECODER,)
    packing: str = SPLIT

    def __post_init__(self):
        self._check_packing(self.packing)

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        check_length(length, 2, "a causal language model")
        return {"tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        return token_shapes(sides["tokens"])

    def examples(self, store: Columns, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        vocabulary.require("bos_id", "eos_id")
        stream = Stream(store.column("text"), (vocabulary.bos_id,), (vocabulary.eos_id,))
        pieces = pieces_of(stream, self.packing, sides["tokens"], overlap=1)

        def make(piece: Piece, noise: np.random.Generator) -> list[Segment]:
            del noise
            return next_tokens(piece, vocabulary.bos_id)

        return FromPieces(pieces, make, column, is_noisy=False)


def next_tokens(piece: Piece, bos_id: int) -> list[Segment]:
    """One segment for each document's part of a piece that is one token longer than its row."""
    targets, documents = piece.ids[1:], piece.documents[:-1]
    if piece.documents[0] == piece.documents[-1]:
        weights = np.ones(len(targets), np.float32)
        return [{"tokens": piece.ids[:-1], "targets": targets, "weights": weights}]
    # A model whose bos is also its eos (GPT-2's) must still learn to end: ask for the document.
    begins = (targets == bos_id) & (piece.documents[1:] != documents)
    weights = (~begins).astype(np.float32)
    cuts = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
    return [
        {"tokens": piece.ids[a:b], "targets": targets[a:b], "weights": weights[a:b]}
        for a, b in itertools.pairwise(cuts)
        if b > a
    ]
