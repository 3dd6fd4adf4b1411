"""Noise as a mask over a piece's tokens, and what becomes of the tokens under it.

As in T5 (Raffel et al. 2020, §3.3), an objective is a way to draw the mask, and a way to write the
text with the noise taken out and what was taken out.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from t5x_lite.errors import UserError

Ids = Int[np.ndarray, " n"]
Mask = Bool[np.ndarray, " n"]
Sizes = tuple[int, int]  # of inputs and targets, in tokens

# What stands for the noise in the inputs, and what is asked for. In brackets T5's own names.
SPANS = "spans"  # each span gives way to a sentinel; sentinels, each with its span [u_u]
DROP = "drop"  # nothing; the noise alone [d_d]
MASK = "mask"  # the first sentinel for every token; the whole text [m_f], MASS's way
BERT = "bert"  # the same, but 10% random tokens; the whole text [r10s90_f]
STYLES = (SPANS, DROP, MASK, BERT)
_F32 = np.float32
BERT_RANDOM = 0.1  # of BERT's noise: §3.3.1, unlike Devlin et al.'s there is none that stays


class Places(NamedTuple):
    """Spans of noise in `size` tokens, by where they begin and end; none begins at the first."""

    begins: Int[np.ndarray, " spans"]
    ends: Int[np.ndarray, " spans"]
    size: int

    @property
    def mask(self) -> Bool[np.ndarray, " size"]:
        """Which tokens are noise."""
        changes = np.zeros(self.size + 1, np.uint8)
        changes[self.begins] = changes[self.ends] = 1
        return np.bitwise_xor.accumulate(changes)[:-1].view(bool)


@functools.lru_cache(maxsize=2**14)
def spans(raw: int, density: float | int, mean_span: float | int) -> tuple[int, int]:
    """Noise tokens and spans in `raw` tokens; at least one of each, and one token left alone.

    Rounded from float32, as T5 does: 15% of 190 tokens are 29, and not the 28 next to 28.5.
    """
    noise = min(max(round(float(_F32(raw) * _F32(density))), 1), raw - 1)
    count = round(float(_F32(noise) / _F32(mean_span)))
    return noise, min(max(count, 1), noise, raw - noise) if noise else 0


def random_spans(
    n: int, density: float | int, mean_span: float | int, noise: np.random.Generator
) -> Bool[np.ndarray, " n"]:
    """Which of n tokens are noise, as `random_places` has it."""
    return random_places(n, density, mean_span, noise).mask


def random_places(
    n: int, density: float | int, mean_span: float | int, noise: np.random.Generator
) -> Places:
    """Where n tokens are noise: a fixed number of tokens and spans, never the first token.

    Lengths of the spans and of the gaps before them are uniform over the ways to cut, as in T5.
    """
    noisy, count = spans(n, density, mean_span)
    if count == 0:
        return Places(np.zeros(0, np.int64), np.zeros(0, np.int64), n)
    drawn = noise.random(max(n - 2, 0))  # a number for each place between two tokens of a kind
    gaps = _cut(drawn[: n - noisy - 1], count)
    ends = gaps + _cut(drawn[n - noisy - 1 :], count)
    begins = gaps.copy()
    begins[1:] += ends[:-1] - gaps[:-1]
    return Places(begins, ends, n)


def _cut(drawn: np.ndarray, parts: int) -> Int[np.ndarray, " parts"]:
    """Where parts of len(drawn) + 1 tokens end: they are cut where the least numbers are."""
    ends = np.empty(parts, np.int64)
    ends[-1] = len(drawn) + 1
    if parts > 1:
        ends[:-1] = drawn.argpartition(parts - 2)[: parts - 1]  # far faster than `choice`
        ends[:-1] += 1
        ends[:-1].sort()
    return ends


def corrupt_at(
    ids: Int[np.ndarray, " n"], places: Places, sentinels: Int[np.ndarray, " s"]
) -> tuple[Int[np.ndarray, " i"], Int[np.ndarray, " t"]]:
    """`corrupt` of spans that are known by their places, in a third of its time.

    In the inputs a sentinel stands in place of a span's first token, in the targets in place of the
    token before it, which isn't noise.

    Raises:
      UserError: more spans than sentinels.
    """
    count = len(places.begins)
    if count > len(sentinels):
        raise UserError(f"{count} spans but {len(sentinels)} sentinels; raise extra_ids.")
    is_target, own = places.mask, sentinels[:count]
    is_input = ~is_target
    is_input[places.begins] = True
    inputs, targets, before = ids.copy(), ids.copy(), places.begins - 1
    inputs[places.begins], targets[before] = own, own
    is_target[before] = True
    return inputs[is_input], targets[is_target]


def iid(n: int, density: float | int, noise: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """Which of n tokens are noise: each by itself (T5's `iid_noise_mask`); it may be none."""
    return noise.random(n) < density


def random_prefix(n: int, density: float | int, noise: np.random.Generator) -> int:
    """How many of n tokens are given: uniform, and n·(1 - density) on average.

    T5's `random_prefix_noise_mask`: one at least is given and one asked for, if there are two. With
    a density of 0.5, the highest, all of 1 … n-1 are as likely.
    """
    return int(given_at(n, density, noise.random()))


def given_at(n, density: float | int, place: float):
    """How many of n tokens `random_prefix` gives where it draws `place`, from 0 to 1.

    Works on numbers and on arrays of them.
    """
    most, least = np.maximum(n - 1, 0), fewest_given(n, density)
    return least + np.floor(place * (most - least + 1)).astype(np.int64)


def fewest_given(n, density: float | int):
    """The least that `random_prefix` gives. Works on numbers and on arrays of them."""
    most = np.maximum(n - 1, 0)
    least = np.maximum(1, np.rint((1 - 2 * density) * most).astype(np.int64))
    return np.minimum(most, least)


def corrupt(
    ids: Int[np.ndarray, " n"], is_noise: Bool[np.ndarray, " n"], sentinels: Int[np.ndarray, " s"]
) -> tuple[Int[np.ndarray, " i"], Int[np.ndarray, " t"]]:
    """Inputs (each noise span as one sentinel) and targets (each sentinel, then its span).

    T5 writes the targets as `spans_to_sentinels(ids, ~is_noise)`, which is the same where the first
    token isn't noise and the last one is: of other noise it doesn't tell which span is which.

    Raises:
      UserError: more spans than sentinels.
    """
    inputs = spans_to_sentinels(ids, is_noise, sentinels)
    first_of = np.flatnonzero(begins(is_noise)[is_noise])
    count = len(first_of)
    noise_ids = ids[is_noise]
    # np.insert(noise_ids, first_of, sentinels), in a third of its time
    targets = np.empty(len(noise_ids) + count, ids.dtype)
    is_sentinel = np.zeros(len(targets), bool)
    is_sentinel[first_of + np.arange(count)] = True
    targets[is_sentinel], targets[~is_sentinel] = sentinels[:count], noise_ids
    return inputs, targets


def spans_to_sentinels(
    ids: Int[np.ndarray, " n"], is_noise: Bool[np.ndarray, " n"], sentinels: Int[np.ndarray, " s"]
) -> Int[np.ndarray, " i"]:
    """Each span of noise as one sentinel, a new one for each (`noise_span_to_unique_sentinel`).

    Raises:
      UserError: more spans than sentinels.
    """
    firsts = begins(is_noise)
    count = int(firsts.sum())
    if count > len(sentinels):
        raise UserError(f"{count} spans but {len(sentinels)} sentinels; raise extra_ids.")
    ids = ids.copy()
    ids[firsts] = sentinels[:count]
    return ids[firsts | ~is_noise]


def begins(is_noise: Mask) -> Mask:
    """Where spans of noise begin."""
    firsts = is_noise.copy()
    firsts[1:] &= ~is_noise[:-1]
    return firsts


def masked(
    ids: Int[np.ndarray, " n"],
    is_noise: Bool[np.ndarray, " n"],
    mask_id: int,
    ordinary_ids: Int[np.ndarray, " o"],
    random_share: float,
    noise: np.random.Generator,
) -> Int[np.ndarray, " n"]:
    """Each noise token as the mask, or with a chance of `random_share` as any ordinary token."""
    is_random = noise.random(len(ids)) < random_share
    random_ids = noise.choice(ordinary_ids, len(ids)) if random_share else ids
    return np.where(is_noise, np.where(is_random, random_ids, mask_id), ids).astype(np.int32)


def most_iid(n: int, density: float | int) -> tuple[int, int]:
    """What i.i.d. noise in n tokens hardly ever exceeds: tokens and spans together, and spans.

    Four standard deviations above the mean. A token adds 2 where it begins a span and 1 within one,
    so that neighbours are correlated.
    """
    p, q = density, 1 - density
    starts, both = p * q, p * (1 + q)  # means for each token
    spread = 4 * starts + p * p - both**2 + 2 * (p * p * (1 + q) - both**2)
    most = math.ceil(n * both + p * p + 4 * math.sqrt(n * spread))
    most_spans = math.ceil(n * starts + p * p + 4 * math.sqrt(n * starts * (1 - 3 * starts)))
    return min(n + 1, most), min((n + 1) // 2, most_spans)


def most_noise(n: int, density: float | int) -> int:
    """Tokens that i.i.d. noise hardly ever exceeds: four standard deviations above the mean."""
    return min(n, math.ceil(n * density + 4 * math.sqrt(n * density * (1 - density))))
