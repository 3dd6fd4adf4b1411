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

TOKENS, WORDS = "tokens", "words"


@dataclasses.dataclass(frozen=True)
class Masked(Objective):
    """What objectives with masks share.

    Attributes:
      density: share of the tokens that are chosen (rounded, at least one); only these have weight.
      masked: share of the chosen that become the mask.
      randomised: share of the chosen that become a random ordinary token; the rest stay.
      choose: "tokens", or whole "words": all tokens of a word or none, as in BERT's whole-word
        checkpoints. A word with more tokens than are left to choose is passed over, so that these
        are a few less than `density` says.
    """

    families: ClassVar[tuple[str, ...]] = (ENCODER,)
    density: float | int = 0.15
    masked: float | int = 0.8
    randomised: float | int = 0.1
    choose: str = TOKENS

    def __post_init__(self):
        check_fraction("density", self.density)
        if min(self.masked, self.randomised) < 0 or self.masked + self.randomised > 1:
            raise UserError(
                f"masked={self.masked} and randomised={self.randomised} must be at least 0 and "
                f"at most 1 together; BERT has 0.8 and 0.1."
            )
        if self.choose not in (TOKENS, WORDS):
            raise UserError(f"choose={self.choose!r} is unknown; use {TOKENS!r} or {WORDS!r}.")


@dataclasses.dataclass(frozen=True)
class MaskedLM(Masked):
    """BERT's masked language model (Devlin et al. 2019 §3.1): `cls + piece + sep` is a segment.

    Attributes:
      packing: "split": documents end to end, cut to fill each row; "best_fit": whole documents,
        several a row; "none": one document, or part of one, a row.
    """

    packing: str = SPLIT

    def __post_init__(self):
        super().__post_init__()
        self._check_packing(self.packing)

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
            parts = np.flatnonzero(np.diff(piece.documents)) + 1
            noisy, chosen = mask_tokens(piece.ids, vocabulary, self, noise, parts)
            weights = np.concatenate([[0], chosen, [0]]).astype(np.float32)
            framed = (np.concatenate([before, ids, after]) for ids in (noisy, piece.ids))
            return [encoder(*framed, weights)]

        return FromPieces(pieces, make, lambda sizes: column(np.where(sizes > 0, sizes + 2, 0)))


def mask_tokens(
    ids: Int[np.ndarray, " n"],
    vocabulary: Vocabulary,
    objective: Masked,
    noise: np.random.Generator,
    parts: Int[np.ndarray, " _"] | tuple[int, ...] = (),
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The noisy ids and which were chosen.

    Special ids are never chosen. At each of `parts` a new text begins, and so a word.
    """
    candidates = np.flatnonzero(~np.isin(ids, vocabulary.special_ids))
    count = min(len(candidates), max(1, round(objective.density * len(candidates))))
    if objective.choose == WORDS:
        starts = vocabulary.word_edges.starts(ids)
        starts[np.asarray(parts, np.int64)] = True
        chosen = choose_words(candidates, np.cumsum(starts)[candidates], count, noise)
    else:
        chosen = np.sort(noise.choice(candidates, count, replace=False)) if count else candidates
    fate = noise.random(len(chosen))
    random_ids = noise.choice(vocabulary.ordinary_ids, len(chosen))
    noisy = ids.copy()
    is_masked = fate < objective.masked
    is_random = ~is_masked & (fate < objective.masked + objective.randomised)
    noisy[chosen[is_masked]] = vocabulary.mask_id
    noisy[chosen[is_random]] = random_ids[is_random]
    was_chosen = np.zeros(len(ids), bool)
    was_chosen[chosen] = True
    return noisy, was_chosen


def choose_words(
    candidates: Int[np.ndarray, " n"],
    words: Int[np.ndarray, " n"],
    count: int,
    noise: np.random.Generator,
) -> Int[np.ndarray, " m"]:
    """At most `count` of the candidates: all those of words that are drawn one after the other.

    Args:
      candidates: places, in order.
      words: the word of each; those of a word stand together.
      count: the most to choose.
      noise: decides the order of the words.
    """
    firsts = np.flatnonzero(np.diff(words, prepend=-1))
    sizes = np.diff(firsts, append=len(words)).tolist()
    order, drawn = noise.permutation(len(firsts)).tolist(), []
    for word in order:
        if sizes[word] <= count:
            drawn.append(word)
            count -= sizes[word]
        if not count:
            break
    is_drawn = np.zeros(len(firsts), bool)
    is_drawn[drawn] = True
    return candidates[np.repeat(is_drawn, sizes)]
