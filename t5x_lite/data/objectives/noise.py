"""Noise as a mask over a piece's tokens, and what becomes of the tokens under it.

As in T5 (Raffel et al. 2020, §3.3), an objective is a way to draw the mask, and a way to write the
text with the noise taken out and what was taken out.
"""

import math

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
    """Which of n tokens are noise: a fixed number of tokens and spans, never the first token.

    Lengths of the spans and of the gaps before them are uniform over the ways to cut, as in T5.
    """
    noisy, count = spans(n, density, mean_span)
    if count == 0:
        return np.zeros(n, bool)
    runs = np.empty(2 * count, np.int64)
    runs[0::2] = _random_cut(n - noisy, count, noise)
    runs[1::2] = _random_cut(noisy, count, noise)
    return np.repeat(np.arange(2 * count) % 2 == 1, runs)


def _random_cut(total: int, parts: int, noise: np.random.Generator) -> np.ndarray:
    ends = np.zeros(parts + 1, np.int64)
    ends[1:-1] = noise.choice(total - 1, parts - 1, replace=False, shuffle=False) + 1
    ends[1:-1].sort()
    ends[-1] = total
    return ends[1:] - ends[:-1]


def iid(n: int, density: float | int, noise: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """Which of n tokens are noise: each by itself (T5's `iid_noise_mask`); it may be none."""
    return noise.random(n) < density


def random_prefix(n: int, density: float | int, noise: np.random.Generator) -> int:
    """How many of n tokens are given: uniform, and n·(1 - density) on average.

    T5's `random_prefix_noise_mask`: one at least is given and one asked for, if there are two. With
    a density of 0.5, the highest, all of 1 … n-1 are as likely.
    """
    return int(noise.integers(fewest_given(n, density), max(n - 1, 0), endpoint=True))


def fewest_given(n: int, density: float | int) -> int:
    """The least that `random_prefix` gives."""
    most = max(n - 1, 0)
    return min(most, max(1, round((1 - 2 * density) * most)))


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
    first_of = np.flatnonzero(_begins(is_noise)[is_noise])
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
    begins = _begins(is_noise)
    count = int(begins.sum())
    if count > len(sentinels):
        raise UserError(f"{count} spans but {len(sentinels)} sentinels; raise extra_ids.")
    ids = ids.copy()
    ids[begins] = sentinels[:count]
    return ids[begins | ~is_noise]


def _begins(is_noise: Mask) -> Mask:
    begins = is_noise.copy()
    begins[1:] &= ~is_noise[:-1]
    return begins


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


def sizes_under(is_noise: Mask, style: str) -> Sizes:
    """Tokens of the inputs and targets that a style makes of a masked piece."""
    n = len(is_noise)
    if style in (MASK, BERT):
        return n, n
    count, noisy = int(_begins(is_noise).sum()) if style == SPANS else 0, int(is_noise.sum())
    return n - noisy + count, noisy + count


def most_iid(n: int, density: float | int) -> tuple[int, int]:
    """What i.i.d. noise in n tokens hardly ever exceeds: tokens and spans together, and spans.

    Four standard deviations above the mean. A token adds 2 where it begins a span and 1 within one,
    so that neighbours are correlated.
    """
    p, q = density, 1 - density
    begins, both = p * q, p * (1 + q)  # means for each token
    spread = 4 * begins + p * p - both**2 + 2 * (p * p * (1 + q) - both**2)
    most = math.ceil(n * both + p * p + 4 * math.sqrt(n * spread))
    most_spans = math.ceil(n * begins + p * p + 4 * math.sqrt(n * begins * (1 - 3 * begins)))
    return min(n + 1, most), min((n + 1) // 2, most_spans)


def most_noise(n: int, density: float | int) -> int:
    """Tokens that i.i.d. noise hardly ever exceeds: four standard deviations above the mean."""
    return min(n, math.ceil(n * density + 4 * math.sqrt(n * density * (1 - density))))
