"""Predict masked tokens in their places."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int

from t5x_lite.data.converters import Segment, Shapes, encoder, token_shapes
from t5x_lite.data.objectives.base import (
    ENCODER,
    SPLIT,
    Examples,
    FromPieces,
    Objective,
    Sides,
    check_fraction,
    check_length,
    column,
    pieces_of,
)
from t5x_lite.data.streams import Columns, Piece, Stream
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
    """BERT's masked language model (Devlin et al. 2019 §3.1): `cls + piece + sep` is a segment.

    Attributes:
      density: share of the tokens that are chosen (rounded, at least one); only these have weight.
      masked: share of the chosen that become the mask.
      randomised: share of the chosen that become a random ordinary token; the rest stay.
      packing: "split": documents end to end, cut to fill each row; "best_fit": whole documents,
        several a row; "none": one document, or part of one, a row.
    """

    families: ClassVar[tuple[str, ...]] = (ENCODER,)
    density: float | int = 0.15
    masked: float | int = 0.8
    randomised: float | int = 0.1
    packing: str = SPLIT

    def __post_init__(self):
        self._check_packing(self.packing)
        check_fraction("density", self.density)
        if min(self.masked, self.randomised) < 0 or self.masked + self.randomised > 1:
            raise UserError(
                f"masked={self.masked} and randomised={self.randomised} must be at least 0 and "
                f"at most 1 together; BERT has 0.8 and 0.1."
            )

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        check_length(length, 4, "a masked language model")
        return {"tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        return token_shapes(sides["tokens"])

    def examples(self, store: Columns, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        vocabulary.require("cls_id", "sep_id", "mask_id")
        pieces = pieces_of(Stream(store.column("text")), self.packing, sides["tokens"] - 2)
        before, after = (np.array([i], np.int32) for i in (vocabulary.cls_id, vocabulary.sep_id))

        def make(piece: Piece, noise: np.random.Generator) -> list[Segment]:
            noisy, chosen = mask_tokens(piece.ids, vocabulary, self, noise)
            weights = np.concatenate([[0], chosen, [0]]).astype(np.float32)
            framed = (np.concatenate([before, ids, after]) for ids in (noisy, piece.ids))
            return [encoder(*framed, weights)]

        return FromPieces(pieces, make, lambda sizes: column(np.where(sizes > 0, sizes + 2, 0)))


def mask_tokens(
    ids: Int[np.ndarray, " n"],
    vocabulary: Vocabulary,
    objective: MaskedLM,
    noise: np.random.Generator,
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The noisy ids and which were chosen. Special ids are never chosen."""
    candidates = np.flatnonzero(~np.isin(ids, vocabulary.special_ids))
    count = min(len(candidates), max(1, round(objective.density * len(candidates))))
    chosen = np.sort(noise.choice(candidates, count, replace=False)) if count else candidates
    fate = noise.random(count)
    random_ids = noise.choice(vocabulary.ordinary_ids, count)
    noisy = ids.copy()
    is_masked = fate < objective.masked
    is_random = ~is_masked & (fate < objective.masked + objective.randomised)
    noisy[chosen[is_masked]] = vocabulary.mask_id
    noisy[chosen[is_random]] = random_ids[is_random]
    was_chosen = np.zeros(len(ids), bool)
    was_chosen[chosen] = True
    return noisy, was_chosen
