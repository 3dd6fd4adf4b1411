"""How a model knows where a token stands: one config and one module for each kind.

A kind may act in three places, and leaves out those where it doesn't:
    embed(positions)          is added to the stack's input
    rotate(positions)         gives (sin, cos) for queries and keys of every layer
    bias()                    gives what is added to the attention logits of every layer
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.nn.layers import Common, param, truncated_normal
from t5x_lite.nn.lookup import lookup
from t5x_lite.nn.masks import Visibility

Rotation = tuple[Float[Array, "_ T h"], Float[Array, "_ T h"]]  # one row may serve the batch


class PositionModule(nn.Module):
    """A kind of positions that does nothing; the others override what they do."""

    def embed(self, positions: Int[Array, "B T"], width: int) -> Array | None:
        """[B, T, D], added to the token embeddings."""
        return None

    def rotate(self, positions: Int[Array, "B T"]) -> Rotation | None:
        """(sin, cos), each [B, T, H / 2]."""
        return None

    def bias(self) -> "tuple[BucketBias, ...]":
        """What is added to the attention logits: any number of terms."""
        return ()


@dataclasses.dataclass(frozen=True)
class LearnedPositions:
    """A trained vector for each of `max_length` places (GPT-2, BERT)."""

    max_length: int
    standard_deviation: float | int = 0.02
    offset: int | None = None  # rows before the first place's, which no token reads (RoBERTa: 2)

    def __post_init__(self):
        if self.max_length < 1 or self.unused < 0:
            raise UserError(
                f"max_length={self.max_length} must be at least 1 and offset={self.offset} at "
                "least 0."
            )

    @property
    def unused(self) -> int:
        """Rows before the first place's."""
        return self.offset or 0

    def build(self, heads: int, head_dim: int, causal: bool, common: Common, name: str):
        """The module that does it."""
        del heads, head_dim, causal
        return _Learned(self, common, name=name)


class _Learned(PositionModule):
    config: LearnedPositions
    common: Common

    @nn.compact
    def embed(self, positions, width):
        """Rows of the table; beyond its end the last row, which `check_length` prevents."""
        init = truncated_normal(self.config.standard_deviation)
        shape = (self.config.unused + self.config.max_length, width)
        names = ("positions", "embed")
        table = param(self, "embedding", init, names, shape)
        rows = positions + self.config.unused if self.config.unused else positions
        return lookup(table, rows, names, self.common.sharding, self.common.dtype)


@dataclasses.dataclass(frozen=True)
class Sinusoidal:
    """Sines and cosines of position · 10,000^(-2i/D) (Vaswani et al. 2017, §3.5).

    All sines, then all cosines, where the paper has them by turns: the same but for the order of
    the model's dimensions, and the order of its authors' code and of Marian.
    """

    def build(self, heads: int, head_dim: int, causal: bool, common: Common, name: str):
        """The module that does it."""
        del heads, head_dim, causal
        return _Sinusoidal(common, name=name)


class _Sinusoidal(PositionModule):
    common: Common

    def embed(self, positions, width):
        """Computed, not trained; there is one for every position, however large."""
        if width % 2:
            raise UserError(f"sinusoidal positions need an even width, not {width}.")
        exponent = np.arange(0, width, 2) / width
        frequency = jnp.asarray(10_000.0**-exponent, jnp.float32)
        sin, cos = _turn(positions, frequency[None, None, :], 1.0)
        return jnp.concatenate([sin, cos], axis=-1).astype(self.common.dtype)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Queries and keys are rotated by position · theta^(-2i/H) (Su et al. 2021, §3.2.2)."""

    theta: float | int = 10_000.0

    def build(self, heads: int, head_dim: int, causal: bool, common: Common, name: str):
        """The module that does it.

        Raises:
            UserError: an odd head dimension.
        """
        del heads, causal, common
        self.require_even(head_dim)
        return _Rotary(self, head_dim, name=name)

    def require_even(self, head_dim: int) -> None:
        """Raises `UserError` for a head that isn't made of pairs."""
        if head_dim % 2:
            raise UserError(f"rotary positions need an even head_dim, not {head_dim}.")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """[H / 2] radians per position, float32."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        return (1.0 / self.theta**exponent).astype(np.float32)

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class YarnRotary(Rotary):
    """Slow frequencies divided by `factor`, fast ones kept (YaRN: Peng et al. 2023, §3).

    Dimensions that turn more than `fast` times in the original context are kept, those that turn
    less than `slow` times are stretched, and between them is a ramp.

    Attributes:
        factor: how many times longer texts get.
        original_length: of texts before.
        fast: turns from which on a dimension is kept.
        slow: turns down to which it is blended.
        mscale: in the numerator of the amplitude (DeepSeek-V2).
        mscale_all: in its denominator; its square, in the model's config, scales the logits.
        attention_factor: the amplitude, where it doesn't follow from the others.
        truncate: the ramp begins and ends at whole dimensions.
    """

    factor: float | int = 40.0
    original_length: int = 4096
    fast: float | int = 32
    slow: float | int = 1
    mscale: float | int | None = None
    mscale_all: float | int | None = None
    attention_factor: float | int | None = None
    truncate: bool = True

    def frequencies(self, head_dim: int) -> np.ndarray:
        """[H / 2] radians per position, float32."""
        plain = super().frequencies(head_dim)
        turns = self.original_length / (2 * np.pi * np.array([self.fast, self.slow]))
        low, high = head_dim * np.log(turns) / (2 * math.log(self.theta))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
        stretched = np.clip(ramp, 0, 1)
        return (plain * (1 - stretched) + plain / self.factor * stretched).astype(np.float32)

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied by (§3.4; each of q and k has the root of 1/t)."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all:
            return self._sharpening(self.mscale) / self._sharpening(self.mscale_all)
        return self._sharpening(1.0)

    @property
    def logit_gain(self) -> float:
        """What DeepSeek's logits are multiplied by besides."""
        return self._sharpening(self.mscale_all) ** 2 if self.mscale_all else 1.0

    def _sharpening(self, mscale: float | int) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class LinearRotary(Rotary):
    """All frequencies divided by `factor`, for texts as many times longer (Chen et al. 2023, §2.3).

    Gemma 3's global layers (Gemma Team 2025, §2.1).
    """

    factor: float | int = 8.0

    def __post_init__(self):
        if self.factor <= 0:
            raise UserError(f"factor={self.factor} must be positive; 1 changes nothing.")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """[H / 2] radians per position, float32."""
        return super().frequencies(head_dim) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Rotary(Rotary):
    """Slow frequencies divided by `factor`, for longer texts (Llama 3.1: Dubey et al. 2024, §3.4).

    Waves longer than original_length / low_factor are stretched, those shorter than
    original_length / high_factor are not, and those between are blended.
    """

    factor: float | int = 8.0
    low_factor: float | int = 1.0
    high_factor: float | int = 4.0
    original_length: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """[H / 2] radians per position, float32."""
        plain = super().frequencies(head_dim)
        turns = self.original_length * plain / (2 * np.pi)  # in the original context
        kept = (turns - self.low_factor) / (self.high_factor - self.low_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (plain * (kept + (1 - kept) / self.factor)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LongRotary(Rotary):
    """Each frequency divided by a factor of its own (LongRoPE: Ding et al. 2024, §3.2; Phi-3).

    There are two sets of factors. A document that reaches beyond `original_length` uses the long
    ones for all of its tokens, another the short ones.

    `transformers` decides once for a whole batch, by its largest position; here each document of
    each row is decided for by itself, so that it doesn't depend on what stands beside it. The two
    agree where all documents of a batch lie on the same side of `original_length`. They also differ
    where a document crosses it while it is decoded: the `generate` of `transformers` then computes
    the whole cache anew; here earlier keys stay as the short factors turned them. For the same
    result, begin again with the text so far as the prompt. A batch of padded rows should give its
    positions: left out, they count on through the padding, which then seems part of the document.

    Attributes:
        short: one factor a pair of dimensions, H / 2.
        long: the same, of long documents.
        original_length: the longest of the documents that use `short`.
        factor: how many times longer texts get; only the amplitude depends on it.
        attention_factor: the amplitude, where it doesn't follow from `factor`.
    """

    short: tuple[float | int, ...] = ()
    long: tuple[float | int, ...] = ()
    original_length: int = 4096
    factor: float | int = 32.0
    attention_factor: float | int | None = None

    def build(self, heads: int, head_dim: int, causal: bool, common: Common, name: str):
        """The module that does it.

        Raises:
            UserError: an odd head dimension, or factors that aren't half as many.
        """
        del heads, causal, common
        self.require_even(head_dim)
        given = len(self.short), len(self.long)
        if given != (head_dim // 2, head_dim // 2):
            raise UserError(
                f"short and long have {given[0]} and {given[1]} factors; head_dim={head_dim} needs "
                f"{head_dim // 2} of each."
            )
        return _LongRotary(self, head_dim, name=name)

    def scaled(self, head_dim: int, factors: tuple[float | int, ...]) -> np.ndarray:
        """[H / 2] radians per position under one set of factors, float32."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return 1.0 / (np.asarray(factors, np.float32) * np.float32(self.theta) ** exponent)

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied by (§3.3)."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))


class _Rotary(PositionModule):
    config: Rotary
    head_dim: int

    def rotate(self, positions):
        """Angles in float32: bfloat16 can't tell position 256 from 257."""
        frequency = jnp.asarray(self.config.frequencies(self.head_dim))
        return _turn(positions, frequency[None, None, :], self.config.amplitude)


class _LongRotary(PositionModule):
    config: LongRotary
    head_dim: int

    def rotate(self, positions):
        """By the long factors where a token's document reaches beyond the original length."""
        c, size = self.config, self.head_dim
        short, long = (jnp.asarray(c.scaled(size, factors)) for factors in (c.short, c.long))
        far = last_position(positions) >= c.original_length
        frequency = jnp.where(far[:, :, None], long[None, None, :], short[None, None, :])
        return _turn(positions, frequency, c.amplitude)


def _turn(positions: Array, frequency: Array, amplitude: float) -> Rotation:
    angle = positions[:, :, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return (sin, cos) if amplitude == 1.0 else (amplitude * sin, amplitude * cos)


def last_position(positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of the last token of each token's document: positions are consecutive in one."""
    length = positions.shape[1]
    ends = jnp.concatenate(
        [positions[:, 1:] != positions[:, :-1] + 1, jnp.ones_like(positions[:, :1], bool)], axis=1
    )
    slots = jnp.where(ends, jnp.arange(length, dtype=jnp.int32)[None], length)
    return jnp.take_along_axis(positions, jax.lax.cummin(slots, axis=1, reverse=True), axis=1)


def rotate(x: Float[Array, "B T N H"], rotation: Rotation | None) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]) of every head by their position's angles."""
    if rotation is None:
        return x
    sin, cos = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """One trained scalar a head and bucket of distance, shared by all layers (T5, §2.1)."""

    buckets: int = 32
    max_distance: int = 128

    def build(self, heads: int, head_dim: int, causal: bool, common: Common, name: str):
        """The module that does it."""
        del head_dim
        return _RelativeBias(self, heads, not causal, common, name=name)


class _RelativeBias(PositionModule):
    config: RelativeBias
    heads: int
    bidirectional: bool
    common: Common

    @nn.compact
    def bias(self):
        """The table of the buckets' scalars, float32 as the logits they are added to."""
        shape, names = (self.config.buckets, self.heads), ("buckets", "heads")
        init = truncated_normal(self.common.init.stddev(self.config.buckets))
        table = param(self, "embedding", init, names, shape)
        return (BucketBias(table, None, self.config.max_distance, self.bidirectional),)


@flax.struct.dataclass
class BucketBias:
    """A scalar a head and bucket of distance, as the table that any block of it is made from."""

    table: Any  # float32 [buckets, N]
    whole: Any = None  # float32 [B or 1, N, T, S], where it is stored
    max_distance: int = flax.struct.field(pytree_node=False, default=128)
    bidirectional: bool = flax.struct.field(pytree_node=False, default=True)

    def of(self, order_q: Int[Array, "_ T"], order_k: Int[Array, "_ S"]) -> Float[Array, "_ N T S"]:
        """The bias between any queries and keys: [B or 1, N, T, S] of these numbers' distances."""
        distance = order_k[:, None, :] - order_q[:, :, None]
        buckets = self.table.shape[0]
        bucket = relative_bucket(distance, buckets, self.max_distance, self.bidirectional)
        return jnp.moveaxis(self.table[bucket], -1, 1)

    def between(self, sees: Visibility) -> Float[Array, "_ N T S"]:
        """The bias between all queries and keys: stored, or computed now."""
        return self.of(sees.order_q, sees.order_k) if self.whole is None else self.whole

    def stored(self, sees: Visibility) -> "BucketBias":
        """The same, computed once between all queries and keys, for all layers that will ask."""
        return self.replace(whole=self.of(sees.order_q, sees.order_k))

    def bare(self) -> "BucketBias":
        """The same without what is stored."""
        return self.replace(whole=None)


def relative_bucket(
    distance: Int[Array, "*shape"], buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "*shape"]:
    """T5's buckets of key position minus query position (Raffel et al. 2020, §2.1).

    The first half of the buckets are exact distances, the rest grow logarithmically up to
    `max_distance`. Both directions: keys after the query use the upper half. One direction: keys
    after the query all fall into bucket 0.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        behind = jnp.abs(distance)
    else:
        behind = jnp.maximum(-distance, 0)
    # A table from Python's double precision: a float32 logarithm on the device puts distances such
    # as 16, 32 and 64 on either side of their boundary.
    table = jnp.asarray(_bucket_of_distance(buckets, max_distance), distance.dtype)
    return offset + table[jnp.minimum(behind, max_distance)]


def _bucket_of_distance(buckets: int, max_distance: int) -> list[int]:
    exact = buckets // 2
    scale = (buckets - exact) / math.log(max_distance / exact)
    # The tiny shift keeps exact powers, whose logarithms should cancel, on their own side.
    logarithmic = (
        exact + int(math.log(distance / exact) * scale + 1e-9)
        for distance in range(exact, max_distance + 1)
    )
    return [*range(exact), *(min(bucket, buckets - 1) for bucket in logarithmic)]


RotaryConfig = Rotary | LinearRotary | Llama3Rotary | YarnRotary | LongRotary
PositionsConfig = LearnedPositions | Sinusoidal | RotaryConfig | RelativeBias
