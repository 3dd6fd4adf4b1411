"""UL2's mixture of denoisers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from t5x_lite.data.objectives.base import BEST_FIT, check_fraction
from t5x_lite.data.objectives.denoising import (
    Denoising,
    Noised,
    SizesOfAll,
    check_mean_span,
    longest,
    span_sizes,
    span_sizes_up_to,
)
from t5x_lite.data.objectives.noise import (
    DROP,
    SPANS,
    Sizes,
    fewest_given,
    given_at,
    random_places,
    random_prefix,
    spans,
)
from t5x_lite.errors import UserError


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
        least, most = int(fewest_given(n, self.density)), max(n - 1, 0)
        return [(least, n - least), (most, n - most)]

    def sentinels(self, n: int, fits: Callable[[Sizes], bool]) -> int:
        """How many the longest piece of up to n tokens needs that fits."""
        if self.mean_span is None:
            return 0
        raw = longest(lambda n: fits(span_sizes(n, self.density, self.mean_span)), n)
        return spans(min(raw, n), self.density, self.mean_span)[1]


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

    An encoder's and a decoder's side are as long as the average example needs. So a document that
    much is asked of fits a row if it isn't long, and rows hold some of those beside others.

    Attributes:
      denoisers: what is mixed; those of the paper's table 1, all as often.
      modes: what is put before the inputs for "R", "S" and "X", in this order; the paper's are
        ("[NLU]", "[S2S]", "[NLG]"), which a vocabulary may have as tokens and else reads as text.
        Empty: nothing.
    """

    packing: str = dataclasses.field(default=BEST_FIT, kw_only=True)
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

    def _draw(self, n: int, most: int, sentinels: int, noise: np.random.Generator) -> Noised:
        chosen = self._choose(noise)
        mode = KINDS.index(chosen.kind)
        if chosen.mean_span is None:
            given = random_prefix(n, chosen.density, noise)
            return Noised(np.arange(n) >= given, DROP, mode)
        return Noised(random_places(n, chosen.density, chosen.mean_span, noise), SPANS, mode)

    def _drawn_sizes(
        self, most: int, sentinels: int, noise: np.random.Generator
    ) -> tuple[SizesOfAll, int]:
        chosen = self._choose(noise)
        mode = KINDS.index(chosen.kind)
        if chosen.mean_span is not None:
            return span_sizes_up_to(most, chosen.density, chosen.mean_span), mode
        n = np.arange(most + 1)
        given = given_at(n, chosen.density, noise.random())
        return (given, n - given), mode

    def _mean_sizes(self, n: int) -> tuple[float, float]:
        means = np.array([np.mean(denoiser.extremes(n), axis=0) for denoiser in self.denoisers])
        inputs, targets = np.diff(self._ends, prepend=0) @ means
        return float(inputs), float(targets)

    def _sentinels(self, n: int, fits: Callable[[Sizes], bool]) -> int:
        return max((denoiser.sentinels(n, fits) for denoiser in self.denoisers), default=0)
