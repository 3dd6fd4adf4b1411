"""Rebuild what noise took out: T5's span corruption and i.i.d. noise (UL2's is in ul2.py).

The noisy text is read and what is missing is written: by an encoder and a decoder, or by a decoder
alone that sees the noisy text in both directions (a prefix LM). The former's sides end with eos; of
the latter the whole does.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from t5x_lite.data.converters import (
    SIDES,
    Segment,
    Shapes,
    encoder_decoder,
    prefix_decoder,
    token_shapes,
)
from t5x_lite.data.filling import Table, growing
from t5x_lite.data.objectives.base import (
    BEST_FIT,
    BOTH,
    DECODER,
    SPLIT,
    CutAnew,
    Examples,
    FromPieces,
    Objective,
    Sides,
    check_fraction,
    check_length,
    pieces_of,
)
from t5x_lite.data.objectives.noise import (
    BERT,
    BERT_RANDOM,
    DROP,
    MASK,
    SPANS,
    STYLES,
    Mask,
    Places,
    Sizes,
    begins,
    corrupt,
    corrupt_at,
    iid,
    masked,
    most_iid,
    most_noise,
    random_places,
    spans,
)
from t5x_lite.data.streams import Columns, Piece, Stream
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

SizesOfAll = tuple[np.ndarray, np.ndarray]  # inputs, targets, of pieces of 0, 1, … tokens


class Noised(NamedTuple):
    """What is to be done to a piece."""

    noise: Mask | Places
    style: str = SPANS
    mode: int = 0  # which of the objective's kinds of noise it is

    @property
    def is_noise(self) -> Mask:
        """Which tokens are."""
        return self.noise.mask if isinstance(self.noise, Places) else self.noise


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """Base: a piece's noisy form is read, and what it lost is written.

    Attributes:
      family: "encoder-decoder", or "decoder-only" for a prefix LM; set for the model by itself.
      packing: "best_fit": whole documents, several a row, and pieces of long ones; "split":
        documents end to end, cut to the longest windows that fit whatever the noise; "none": one
        document, or part of one, a row.
    """

    families: ClassVar[tuple[str, ...]] = (BOTH, DECODER)
    has_fixed_sizes: ClassVar[bool] = False  # whatever the noise
    reads_sentinels: ClassVar[bool] = True
    family: str = dataclasses.field(default=BOTH, kw_only=True)
    packing: str = dataclasses.field(default=SPLIT, kw_only=True)

    def __post_init__(self):
        self._check_packing(self.packing)
        if self.family not in self.families:
            raise UserError(f"family={self.family!r} must be one of {', '.join(self.families)}.")

    # What a kind of noise says of itself. Sizes leave out end marks and the mode's text.

    def _extremes(self, n: int) -> list[Sizes]:
        """Sizes of what n tokens become, such that no others are larger on any side or in all."""
        raise NotImplementedError

    def _draw(self, n: int, most: int, sentinels: int, noise: np.random.Generator) -> Noised:
        """What to do to a piece of n tokens, with no more spans than there are sentinels.

        `most`: tokens of the longest piece.
        """
        raise NotImplementedError

    def _drawn_sizes(
        self, most: int, sentinels: int, noise: np.random.Generator
    ) -> tuple[SizesOfAll, int]:
        """Sizes and mode of what `_draw` gives for 0 … `most` tokens by the same noise."""
        raise NotImplementedError

    def _mean_sizes(self, n: int) -> tuple[float, float]:
        """Those of n tokens, on average."""
        raise NotImplementedError

    def _sentinels(self, n: int, fits: Callable[[Sizes], bool]) -> int:
        """How many are needed for pieces of n tokens, and shorter ones that fit."""
        raise NotImplementedError

    @property
    def _modes(self) -> Sequence[str]:
        """The text before the inputs of each `Noised.mode`; empty: none before any."""
        return ()

    # What follows from it.

    def _positions(self, sizes: Sizes | SizesOfAll, mark: int = 0) -> tuple:
        """On each side, end marks and a mode's text included: numbers, or arrays of them."""
        inputs, targets = sizes
        if self.family == DECODER:
            return (mark + inputs + targets + 1,)
        return targets + 1, mark + inputs + 1

    @property
    def _is_cut_anew(self) -> bool:
        return self.packing == BEST_FIT and not self.has_fixed_sizes

    def _limits(self, n: int, mark: int = 0) -> tuple[int, ...]:
        """The most positions that n tokens take on each side."""
        sides = [self._positions(sizes, mark) for sizes in self._extremes(n)]
        return tuple(max(side) for side in zip(*sides, strict=True))

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        least = max(4, self._limits(2)[-1])
        check_length(length, least, f"the noisy text of {type(self).__name__}")
        if self.family == DECODER:
            return {"tokens": length}
        if self._is_cut_anew:
            # Both sides are full at once if two pieces, as many as mostly share a row, are average.
            inputs, targets = self._mean_sizes(length // 2)
            share = math.ceil(length * (targets + 1) / (inputs + 1))
            return {"tokens": max(share, self._limits(2)[0]), "encoder_tokens": length}
        raw = longest(lambda n: max(self._limits(n)) <= length, length)
        return {"tokens": self._limits(raw)[0], "encoder_tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        if self.family == DECODER:
            return token_shapes(sides["tokens"], "prefix")
        encoder_side = token_shapes(sides["encoder_tokens"], side="encoder_")
        return encoder_side | token_shapes(sides["tokens"])

    def examples(self, store: Columns, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        vocabulary.require("eos_id", *(("bos_id",) if self.family == DECODER else ()))
        mark = max((len(vocabulary.encode(text)) for text in self._modes), default=0)
        room = [sides[side] for side in SIDES if side in sides]

        def fits(sizes: Sizes, mark: int = 0) -> bool:
            return all(n <= r for n, r in zip(self._positions(sizes, mark), room, strict=True))

        check_length(room[-1], self._limits(2, mark)[-1], "the mode and some text")
        # Windows fit whatever the noise; what is cut anew, if its own noise is such that it does.
        some = any if self._is_cut_anew else all
        raw = longest(lambda n: some(fits(sizes, mark) for sizes in self._extremes(n)), max(room))
        self._check_sentinels(self._sentinels(raw, fits), raw, vocabulary)
        maker, stream = _Maker(self, vocabulary, raw), Stream(store.column("text"))
        if self._is_cut_anew:
            return CutAnew(stream, raw, maker.segments, maker.table)
        pieces = pieces_of(stream, self.packing, raw)
        if not self.has_fixed_sizes:
            return FromPieces(pieces, maker.segments)
        table = [self._positions(self._extremes(n)[0]) for n in range(1, raw + 1)]
        table = np.array(table, np.int64)
        return FromPieces(pieces, maker.segments, lambda sizes: table[sizes - 1])

    def _check_sentinels(self, needed: int, raw: int, vocabulary: Vocabulary) -> None:
        given = len(vocabulary.sentinel_ids)
        if needed > given:
            raise UserError(
                f"a window of {raw} tokens needs {needed} sentinels and the vocabulary has "
                f"{given}; raise extra_ids to {needed} or lower the length."
            )


def longest(fits: Callable[[int], bool], length: int) -> int:
    """The most raw tokens that fit on sides of `length` or less, where two do."""
    return bisect.bisect_left(range(3, 2 * length + 1), True, key=lambda n: not fits(n)) + 2


class _Maker:
    """An objective's pieces to segments, and to their sizes by the same draws."""

    def __init__(self, objective: Denoising, vocabulary: Vocabulary, most: int):
        self._objective, self._vocabulary, self._most = objective, vocabulary, most
        self._marks = [np.array(vocabulary.encode(text), np.int32) for text in objective._modes]
        self._sentinels = np.array(vocabulary.sentinel_ids, np.int32)
        self._end = np.array([vocabulary.eos_id], np.int32)

    def segments(self, piece: Piece, noise: np.random.Generator) -> list[Segment]:
        """One."""
        drawn = self._objective._draw(len(piece.ids), self._most, len(self._sentinels), noise)
        inputs, targets = self._noisy(piece.ids, drawn, noise)
        if self._marks:
            inputs = np.concatenate([self._marks[drawn.mode], inputs])
        targets = np.concatenate([targets, self._end])
        if self._objective.family == DECODER:
            return [prefix_decoder(inputs, targets, self._vocabulary.bos_id)]
        inputs = np.concatenate([inputs, self._end])
        return [encoder_decoder(inputs, targets, self._vocabulary.start_id)]

    def _noisy(
        self, ids: np.ndarray, drawn: Noised, noise: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets."""
        if isinstance(drawn.noise, Places):
            return corrupt_at(ids, drawn.noise, self._sentinels)
        if drawn.style == SPANS:
            return corrupt(ids, drawn.is_noise, self._sentinels)
        if drawn.style == DROP:
            return ids[~drawn.is_noise], ids[drawn.is_noise]
        share = BERT_RANDOM if drawn.style == BERT else 0.0
        ordinary = self._vocabulary.ordinary_ids
        mask = int(self._sentinels[0])
        return masked(ids, drawn.is_noise, mask, ordinary, share, noise), ids

    def table(self, noise: np.random.Generator) -> Table:
        """Positions of `segments` of 0, 1, … tokens, without reading them."""
        sizes, mode = self._objective._drawn_sizes(self._most, len(self._sentinels), noise)
        mark = len(self._marks[mode]) if self._marks else 0
        return growing(np.stack(self._objective._positions(sizes, mark), axis=1))


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Denoising):
    """T5's span corruption (Raffel et al. 2020 §3.1.4): spans give way to sentinels.

    Each sentinel and what it stands for is written. In `packing="split"` the raw tokens of a window
    fill the encoder's `length` exactly (with a density above 0.5, the decoder's).

    Attributes:
      density: share of the tokens that are noise.
      mean_span: tokens of a noise span, on average.
    """

    has_fixed_sizes: ClassVar[bool] = True
    corrupts_spans: ClassVar[bool] = True
    density: float | int = 0.15
    mean_span: float | int = 3

    def __post_init__(self):
        super().__post_init__()
        check_fraction("density", self.density)
        check_mean_span(self.mean_span)

    def _extremes(self, n: int) -> list[Sizes]:
        return [span_sizes(n, self.density, self.mean_span)]

    def _draw(self, n: int, most: int, sentinels: int, noise: np.random.Generator) -> Noised:
        return Noised(random_places(n, self.density, self.mean_span, noise))

    def _sentinels(self, n: int, fits: Callable[[Sizes], bool]) -> int:
        return spans(n, self.density, self.mean_span)[1]


def check_mean_span(mean_span: float | int) -> None:
    """Raises UserError for less than a token."""
    if not 1 <= mean_span < math.inf:
        raise UserError(f"mean_span={mean_span} must be at least 1 token; T5 has 3.")


def span_sizes(n: int, density: float | int, mean_span: float | int) -> Sizes:
    """Tokens of inputs and targets, whatever the noise."""
    noise, count = spans(n, density, mean_span)
    return n - noise + count, noise + count


@functools.lru_cache(maxsize=64)
def span_sizes_up_to(most: int, density: float | int, mean_span: float | int) -> SizesOfAll:
    """`span_sizes` of 0 … `most` tokens."""
    sizes = np.array([(0, 0), *(span_sizes(n, density, mean_span) for n in range(1, most + 1))])
    return sizes[:, 0], sizes[:, 1]


def span_corruption_lengths(
    inputs_length: int, density: float | int = 0.15, mean_span: float | int = 3
) -> tuple[int, int]:
    """(raw, targets): the most raw tokens whose corrupted form fits, and its targets' length.

    Both sides count one eos, and neither is longer than `inputs_length`. 512 at 0.15 and 3 gives
    (568, 114), as T5's `random_places_helper` does.
    """

    def fits(raw: int) -> bool:
        return max(span_sizes(raw, density, mean_span)) < inputs_length

    raw = longest(fits, inputs_length)
    return raw, span_sizes(raw, density, mean_span)[1] + 1


@dataclasses.dataclass(frozen=True)
class IidDenoising(Denoising):
    """Every token is noise by itself (Raffel et al. 2020 §3.3.1 and §3.3.2).

    Noise beyond four standard deviations (once in 30,000 times) is drawn anew, so that all fits.
    It is drawn for a whole row, and a shorter piece takes what it needs.

    Attributes:
      style: "spans": each span as one sentinel, and these with their spans as targets (T5's
        baseline); "drop": noise left out, and itself as targets; "mask": every token as the first
        sentinel, and the whole text as targets ("MASS-style"); "bert": the same, but a tenth of
        them random tokens ("BERT-style").
      density: the chance of a token to be noise.
    """

    packing: str = dataclasses.field(default=BEST_FIT, kw_only=True)
    style: str = SPANS
    density: float | int = 0.15

    def __post_init__(self):
        super().__post_init__()
        check_fraction("density", self.density)
        if self.style not in STYLES:
            raise UserError(f"style={self.style!r} is unknown; use {' or '.join(STYLES)}.")

    @property
    def has_fixed_sizes(self) -> bool:
        """As in `Denoising`."""
        return self._is_whole or (self.style == DROP and self.family == DECODER)

    @property
    def corrupts_spans(self) -> bool:
        """As in `Objective`."""
        return self.style == SPANS

    @property
    def _is_whole(self) -> bool:
        """Whether the whole text is asked for."""
        return self.style in (MASK, BERT)

    def _extremes(self, n: int) -> list[Sizes]:
        if self._is_whole:
            return [(n, n)]
        if self.style == DROP:
            most = most_noise(n, self.density)
            return [(n, 0), (n - most, most)]
        most, most_spans = most_iid(n, self.density)
        return [(n, 0), (n - most + 2 * most_spans, most)]

    def _draw(self, n: int, most: int, sentinels: int, noise: np.random.Generator) -> Noised:
        return Noised(self._mask(most, sentinels, noise)[:n], self.style)

    def _mask(self, most: int, sentinels: int, noise: np.random.Generator) -> Mask:
        """Of a piece of `most` tokens. Its beginning is no larger than the whole on any side."""
        while True:
            is_noise = iid(most, self.density, noise)
            if self._is_whole:
                return is_noise
            noisy, count = int(is_noise.sum()), 0
            if self.style == SPANS:
                count, (limit, spans) = int(begins(is_noise).sum()), most_iid(most, self.density)
                limit -= count
                if count > min(spans, sentinels):
                    continue
            else:
                limit = most_noise(most, self.density)
            if noisy <= limit:
                return is_noise

    def _drawn_sizes(
        self, most: int, sentinels: int, noise: np.random.Generator
    ) -> tuple[SizesOfAll, int]:
        mask = self._mask(most, sentinels, noise)
        noisy = np.concatenate([[0], np.cumsum(mask)])
        count = np.concatenate([[0], np.cumsum(begins(mask))]) if self.style == SPANS else 0
        return (np.arange(most + 1) - noisy + count, noisy + count), 0

    def _mean_sizes(self, n: int) -> tuple[float, float]:
        count = n * self.density * (1 - self.density) if self.style == SPANS else 0
        return n * (1 - self.density) + count, n * self.density + count

    def _sentinels(self, n: int, fits: Callable[[Sizes], bool]) -> int:
        return most_iid(n, self.density)[1] if self.style == SPANS else int(self._is_whole)
