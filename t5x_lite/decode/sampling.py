"""Choosing the next token: pure functions of logits, and of one key a row.

Each filter takes logits and returns logits in which what it removes is -inf, so filters compose in
any order. `Sampling` holds the order that everybody uses: temperature, then top-k, then top-p.
A setting may be one number, or an array with one number for each row.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5x_lite.errors import UserError
from t5x_lite.types import KeyArray

PerRow = float | int | Float[Array, "*#rows"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the defaults draw from the model's own distribution.

    Attributes:
        temperature: what the logits are divided by; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; None keeps all.
        top_p: only the likeliest tokens that together hold this probability; None keeps all.

    Raises:
        UserError: a value out of range.
    """

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature} must be at least 0; 0 takes the "
                            "likeliest token, 1 samples as the model says.")  # fmt: skip
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1; leave it out to keep all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be more than 0 and at most 1; try 0.95.")

    def filter(self, logits: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
        """The logits to draw from; of no use at temperature 0."""
        logits = apply_temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return logits


GREEDY = Sampling(temperature=0)


def greedy(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The likeliest id; of equals the lowest."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(
    logits_BV: Float[Array, "B V"], keys_B: KeyArray, sampling: Sampling
) -> Int[Array, " B"]:
    """One id a row, int32. Row i depends on its own logits and key, on no other row.

    Args:
        logits_BV: float32. Ids that must never be chosen, such as padding of the vocabulary, have
            -inf or a number far below all others.
        keys_B: one key a row.
        sampling: how to choose.
    """
    if sampling.temperature == 0:
        return greedy(logits_BV)
    logits_BV = sampling.filter(logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def apply_temperature(
    logits: Float[Array, "*rows V"], temperature: PerRow
) -> Float[Array, "*rows V"]:
    """Divides by a temperature above 0: below 1 it sharpens, above 1 it flattens."""
    return logits / _for_rows(temperature, logits, logits.dtype)


def keep_top_k(
    logits: Float[Array, "*rows V"], k: int | Int[Array, "*#rows"]
) -> Float[Array, "*rows V"]:
    """Removes what is less likely than the k-th likeliest token; its equals stay."""
    k = _for_rows(k, logits, jnp.int32)
    return _keep_highest(logits, lambda is_kept: _count(is_kept) >= k)


def keep_top_p(logits: Float[Array, "*rows V"], p: PerRow) -> Float[Array, "*rows V"]:
    """Keeps the fewest likeliest tokens that hold a probability of p (Holtzman et al. 2020, §3.1).

    The token that crosses p stays, so there is always one; so do its equals.
    """
    p = _for_rows(p, logits, logits.dtype)
    probs = jax.nn.softmax(logits, axis=-1)
    return _keep_highest(
        logits, lambda is_kept: jnp.sum(jnp.where(is_kept, probs, 0), -1, keepdims=True) >= p
    )


def _count(is_kept: Bool[Array, "*rows V"]) -> Int[Array, "*rows 1"]:
    return jnp.sum(is_kept, axis=-1, keepdims=True, dtype=jnp.int32)


def _keep_highest(logits: Array, enough: Callable[[Array], Array]) -> Array:
    """Removes all below the highest threshold at which what stays is `enough`.

    The threshold is found bit by bit: 32 sums over the vocabulary, which on every kind of device
    are many times faster than sorting it.
    """
    ordered = _ordered_bits(logits.astype(jnp.float32))

    def settle(bit: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1 << 31) >> bit)
        return jnp.where(enough(ordered >= higher), higher, threshold)

    lowest = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    threshold = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), settle, lowest)
    return jnp.where(ordered >= threshold, logits, -jnp.inf)


def _ordered_bits(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Integers in the order of the floats: negative ones have their bits turned over."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _for_rows(value: float | int | Array, logits: Array, dtype: DTypeLike) -> Array:
    """A number, or one a row, as a last column beside the logits."""
    value = jnp.asarray(value, dtype)
    return jnp.broadcast_to(value[..., None], (*logits.shape[:-1], 1))
