"""How a model knows where a token stands: one config and one module for each kind.

A kind may act in three places, and leaves out those where it doesn't:
    embed(positions)          is added to the stack's input
    rotate(positions)         gives (sin, cos) for queries and keys of every layer
    bias(positions_q, positions_k)  is added to the attention logits of every layer
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.nn.layers import Common, param, truncated_normal

Rotation = tuple[Float[Array, "_ T h"], Float[Array, "_ T h"]]  # one row may serve the batch


class PositionModule(nn.Module):
    """A kind of positions that does nothing; the others override what they do."""

    def embed(self, positions: Int[Array, "B T"], width: int) -> Array | None:
        """[B, T, D], added to the token embeddings."""
        return None

    def rotate(self, positions: Int[Array, "B T"]) -> Rotation | None:
        """(sin, cos), each [B, T, H / 2]."""
        return None

    def bias(self, pos_q: Int[Array, "B T"], pos_k: Int[Array, "B S"]) -> Array | None:
        """[B, N, T, S], added to the attention logits."""
        return None


@dataclasses.dataclass(frozen=True)
class LearnedPositions:
    """A trained vector for each of `max_length` places (GPT-2, BERT)."""

    max_length: int
    standard_deviation: float | int = 0.02

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
        shape = (self.config.max_length, width)
        table = param(self, "embedding", init, ("positions", "embed"), shape)
        return jnp.take(table, positions, axis=0, mode="clip").astype(self.common.dtype)


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
        if head_dim % 2:
            raise UserError(f"rotary positions need an even head_dim, not {head_dim}.")
        return _Rotary(self, head_dim, name=name)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """[H / 2] radians per position, float32."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        return (1.0 / self.theta**exponent).astype(np.float32)


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


class _Rotary(PositionModule):
    config: Rotary
    head_dim: int

    def rotate(self, positions):
        """Angles in float32: bfloat16 can't tell position 256 from 257."""
        frequency = jnp.asarray(self.config.frequencies(self.head_dim))
        angle = positions[:, :, None].astype(jnp.float32) * frequency[None, None, :]
        return jnp.sin(angle), jnp.cos(angle)


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
    def bias(self, pos_q, pos_k):
        """Gathers the buckets' scalars, in float32 as the logits they are added to."""
        buckets = self.config.buckets
        shape, names = (buckets, self.heads), ("buckets", "heads")
        init = truncated_normal(self.common.init.stddev(buckets))
        table = param(self, "embedding", init, names, shape)
        distance = pos_k[:, None, :] - pos_q[:, :, None]
        bucket = relative_bucket(distance, buckets, self.config.max_distance, self.bidirectional)
        return jnp.moveaxis(table[bucket], -1, 1)


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


PositionsConfig = LearnedPositions | Rotary | Llama3Rotary | RelativeBias
