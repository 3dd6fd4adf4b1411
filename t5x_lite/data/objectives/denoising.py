"""Rebuild what noise took out: T5's span corruption and i.i.d. noise, UL2's mixture of denoisers.

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
from t5x_lite.data.objectives.base import (
    BEST_FIT,
    BOTH,
    DECODER,
    SPLIT,
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
    Sizes,
    corrupt,
    fewest_given,
    iid,
    masked,
    most_iid,
    most_noise,
    random_prefix,
    random_spans,
    sizes_under,
    spans,
)
from t5x_lite.data.streams import Columns, FineParts, Piece, Stream
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

# A document that doesn't fit a row is cut so many times as fine, so that rows can be filled up.
PARTS = {DECODER: 8, BOTH: 4}


class Noised(NamedTuple):
    """What is to be done to a piece."""

    is_noise: Mask
    style: str = SPANS
    mode: int = 0  # which of the objective's kinds of noise it is


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """Base: a piece's noisy form is read, and what it lost is written.

    Attributes:
      family: "encoder-decoder", or "decoder-only" for a prefix LM; set for the model by itself.
      packing: "split": documents end to end, cut to the longest windows that fit whatever the
        noise; "best_fit": whole documents, several a row; "none": one document, or part of one, a
        row.
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

    def _draw(self, n: int, sentinels: int, noise: np.random.Generator) -> Noised:
        """What to do to a piece of n tokens, with no more spans than there are sentinels."""
        raise NotImplementedError

    def _drawn_sizes(self, n: int, sentinels: int, noise: np.random.Generator) -> tuple[Sizes, int]:
        """Sizes and mode of what `_draw` gives: with the same noise, exactly these."""
        drawn = self._draw(n, sentinels, noise)
        return sizes_under(drawn.is_noise, drawn.style), drawn.mode

    def _sentinels(self, n: int) -> int:
        """How many n tokens need."""
        raise NotImplementedError

    @property
    def _modes(self) -> Sequence[str]:
        """The text before the inputs of each `Noised.mode`; empty: none before any."""
        return ()

    # What follows from it.

    def _positions(self, sizes: Sizes, mark: int = 0) -> tuple[int, ...]:
        """On each side, end marks and a mode's text included."""
        inputs, targets = sizes
        if self.family == DECODER:
            return (mark + inputs + targets + 1,)
        return targets + 1, mark + inputs + 1

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
        maker = _Maker(self, vocabulary)
        room = [sides[side] for side in SIDES if side in sides]

        def fits(n: int) -> bool:
            limits = self._limits(n, maker.longest_mark)
            return all(limit <= most for limit, most in zip(limits, room, strict=True))

        check_length(room[-1], self._limits(2, maker.longest_mark)[-1], "the mode and some text")
        raw = longest(fits, max(room))
        self._check_sentinels(raw, vocabulary)
        stream = Stream(store.column("text"))
        pieces = pieces_of(stream, self.packing, raw)
        if not self.has_fixed_sizes:
            if self.packing == BEST_FIT:
                pieces = FineParts(stream, raw, part=max(raw // PARTS[self.family], 2))
            return FromPieces(pieces, maker.segments, drawn_sizes=maker.drawn_sizes)
        table = [self._positions(self._extremes(n)[0]) for n in range(1, raw + 1)]
        table = np.array(table, np.int64)
        return FromPieces(pieces, maker.segments, lambda sizes: table[sizes - 1])

    def _check_sentinels(self, raw: int, vocabulary: Vocabulary) -> None:
        needed, given = self._sentinels(raw), len(vocabulary.sentinel_ids)
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

    def __init__(self, objective: Denoising, vocabulary: Vocabulary):
        self._objective, self._vocabulary = objective, vocabulary
        self._marks = [np.array(vocabulary.encode(text), np.int32) for text in objective._modes]
        self.longest_mark = max(map(len, self._marks), default=0)
        self._sentinels = np.array(vocabulary.sentinel_ids, np.int32)
        self._end = np.array([vocabulary.eos_id], np.int32)

    def segments(self, piece: Piece, noise: np.random.Generator) -> list[Segment]:
        """One."""
        drawn = self._objective._draw(len(piece.ids), len(self._sentinels), noise)
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
        if drawn.style == SPANS:
            return corrupt(ids, drawn.is_noise, self._sentinels)
        if drawn.style == DROP:
            return ids[~drawn.is_noise], ids[drawn.is_noise]
        share = BERT_RANDOM if drawn.style == BERT else 0.0
        ordinary = self._vocabulary.ordinary_ids
        mask = int(self._sentinels[0])
        return masked(ids, drawn.is_noise, mask, ordinary, share, noise), ids

    def drawn_sizes(self, n: int, noise: np.random.Generator) -> tuple[int, ...]:
        """Positions of `segments` on each side, without reading the piece."""
        sizes, mode = self._objective._drawn_sizes(n, len(self._sentinels), noise)
        return self._objective._positions(sizes, len(self._marks[mode]) if self._marks else 0)


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

    def _draw(self, n: int, sentinels: int, noise: np.random.Generator) -> Noised:
        return Noised(random_spans(n, self.density, self.mean_span, noise))

    def _sentinels(self, n: int) -> int:
        return spans(n, self.density, self.mean_span)[1]


def check_mean_span(mean_span: float | int) -> None:
    """Raises UserError for less than a token."""
    if not 1 <= mean_span < math.inf:
        raise UserError(f"mean_span={mean_span} must be at least 1 token; T5 has 3.")


def span_sizes(n: int, density: float | int, mean_span: float | int) -> Sizes:
    """Tokens of inputs and targets, whatever the noise."""
    noise, count = spans(n, density, mean_span)
    return n - noise + count, noise + count


def span_corruption_lengths(
    inputs_length: int, density: float | int = 0.15, mean_span: float | int = 3
) -> tuple[int, int]:
    """(raw, targets): the most raw tokens whose corrupted form fits, and its targets' length.

    Both sides count one eos, and neither is longer than `inputs_length`. 512 at 0.15 and 3 gives
    (568, 114), as T5's `random_spans_helper` does.
    """

    def fits(raw: int) -> bool:
        return max(span_sizes(raw, density, mean_span)) < inputs_length

    raw = longest(fits, inputs_length)
    return raw, span_sizes(raw, density, mean_span)[1] + 1


@dataclasses.dataclass(frozen=True)
class IidDenoising(Denoising):
    """Every token is noise by itself (Raffel et al. 2020 §3.3.1 and §3.3.2).

    Noise beyond four standard deviations (once in 30,000 times) is drawn anew, so that all fits.

    Attributes:
      style: "spans": each span as one sentinel, and these with their spans as targets (T5's
        baseline); "drop": noise left out, and itself as targets; "mask": every token as the first
        sentinel, and the whole text as targets ("MASS-style"); "bert": the same, but a tenth of
        them random tokens ("BERT-style").
      density: the chance of a token to be noise.
    """

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

    def _draw(self, n: int, sentinels: int, noise: np.random.Generator) -> Noised:
        _, most = self._extremes(n)[-1]
        most_spans = min(most_iid(n, self.density)[1], sentinels) if self.style == SPANS else n
        while True:
            is_noise = iid(n, self.density, noise)
            inputs, targets = sizes_under(is_noise, self.style)
            if targets <= most and (inputs + targets - n) // 2 <= most_spans:
                return Noised(is_noise, self.style)

    def _sentinels(self, n: int) -> int:
        return most_iid(n, self.density)[1] if self.style == SPANS else int(self._is_whole)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One of a mixture of denoisers (Tay et al. 2022 §3.1.2).

    Attributes:
      kind: "R" (regular), "S" (sequential) or "X" (extreme): which mode announces it.
      density: share of the tokens that are asked for, on average.
      mean_span: tokens of a noise span, on average; None: the end of the text, from a uniformly
        drawn place on (a prefix LM, with T5's `random_prefix_noise_mask`).
      rate: how often it is drawn, relative to the others.
    """

    kind: str
    density: float | int
    mean_span: float | int | None
    rate: float | int = 1

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"kind={self.kind!r} is unknown; use {', '.join(KINDS)}.")
        check_fraction("density", self.density)
        if not 0 < self.rate < math.inf:
            raise UserError(f"rate={self.rate} must be positive; leave the denoiser out instead.")
        if self.mean_span is not None:
            check_mean_span(self.mean_span)
        elif self.density > 0.5:
            raise UserError(f"density={self.density} of a prefix LM can be 0.5 at most.")

    def extremes(self, n: int) -> list[Sizes]:
        """As in `Denoising`."""
        if self.mean_span is not None:
            return [span_sizes(n, self.density, self.mean_span)]
        least, most = fewest_given(n, self.density), max(n - 1, 0)
        return [(least, n - least), (most, n - most)]


KINDS = ("R", "S", "X")
TABLE_1 = (
    Denoiser("R", 0.15, 3),
    Denoiser("R", 0.15, 8),
    Denoiser("S", 0.25, None),
    Denoiser("X", 0.5, 3),
    Denoiser("X", 0.5, 8),
    Denoiser("X", 0.15, 64),
    Denoiser("X", 0.5, 64),
)


@dataclasses.dataclass(frozen=True)
class UL2(Denoising):
    """A mixture of denoisers (Tay et al. 2022): each example's is drawn with its noise.

    Attributes:
      denoisers: what is mixed; those of the paper's table 1, all as often.
      modes: what is put before the inputs for "R", "S" and "X", in this order; the paper's are
        ("[NLU]", "[S2S]", "[NLG]"), which a vocabulary may have as tokens and else reads as text.
        Empty: nothing.
    """

    denoisers: Sequence[Denoiser] = TABLE_1
    modes: Sequence[str] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "denoisers", tuple(self.denoisers))
        object.__setattr__(self, "modes", tuple(self.modes))
        if not self.denoisers:
            raise UserError("UL2 has no denoisers; leave them out to have the paper's.")
        if self.modes and (len(self.modes) != len(KINDS) or not all(self.modes)):
            raise UserError(
                f"modes={list(self.modes)} must be one text each for {', '.join(KINDS)}, such as "
                f"['[NLU]', '[S2S]', '[NLG]'], or empty."
            )

    @property
    def _modes(self) -> Sequence[str]:
        return self.modes

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Where each denoiser's part of 0 … 1 ends."""
        rates = np.array([denoiser.rate for denoiser in self.denoisers], np.float64)
        return np.cumsum(rates / rates.sum())

    def _choose(self, noise: np.random.Generator) -> Denoiser:
        place = np.searchsorted(self._ends[:-1], noise.random(), side="right")
        return self.denoisers[int(place)]

    def _extremes(self, n: int) -> list[Sizes]:
        return [sizes for denoiser in self.denoisers for sizes in denoiser.extremes(n)]

    def _draw(self, n: int, sentinels: int, noise: np.random.Generator) -> Noised:
        chosen = self._choose(noise)
        mode = KINDS.index(chosen.kind)
        if chosen.mean_span is None:
            given = random_prefix(n, chosen.density, noise)
            return Noised(np.arange(n) >= given, DROP, mode)
        return Noised(random_spans(n, chosen.density, chosen.mean_span, noise), SPANS, mode)

    def _drawn_sizes(self, n: int, sentinels: int, noise: np.random.Generator) -> tuple[Sizes, int]:
        chosen = self._choose(noise)
        mode = KINDS.index(chosen.kind)
        if chosen.mean_span is None:
            given = random_prefix(n, chosen.density, noise)
            return (given, n - given), mode
        return span_sizes(n, chosen.density, chosen.mean_span), mode

    def _sentinels(self, n: int) -> int:
        counts = (
            spans(n, denoiser.density, denoiser.mean_span)[1]
            for denoiser in self.denoisers
            if denoiser.mean_span is not None
        )
        return max(counts, default=0)
