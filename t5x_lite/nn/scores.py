"""What every path of attention shares: the logits of a block, and the dropout of probabilities.

A path may compute the whole [T, S] score matrix or any block of it, on any part of the batch and of
the heads: both functions give the same numbers for the same query, key and head.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5x_lite.nn.masks import Visibility
from t5x_lite.nn.positions import BucketBias
from t5x_lite.types import KeyArray

Biases = tuple[BucketBias, ...]  # they add up

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive slots come to lie far apart


def logits(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    sees: Visibility,
    bias: Biases,
    scale: float | int,
    soft_cap: float | int | None,
) -> Float[Array, "B K G T S"]:
    """scale · q·kᵀ, capped, plus the biases; float32, and nothing hidden yet.

    `sees` gives the distances that biases depend on; its queries and keys are those of q and k.
    """
    product_BKGTS = jnp.einsum(
        "BKGTH,BKSH->BKGTS", q_BKGTH * scale, k_BKSH, preferred_element_type=jnp.float32
    )
    return adjusted(product_BKGTS, sees, bias, soft_cap)


def adjusted(
    logits_BKGTS: Float[Array, "B K G T S"],
    sees: Visibility,
    bias: Biases,
    soft_cap: float | int | None,
) -> Float[Array, "B K G T S"]:
    """The logits that come of scaled products: capped, plus the biases."""
    if soft_cap is not None:
        logits_BKGTS = soft_cap * jnp.tanh(logits_BKGTS / soft_cap)
    if bias:
        bias_BNTS = functools.reduce(operator.add, (part.between(sees) for part in bias))
        heads, groups = logits_BKGTS.shape[1:3]
        logits_BKGTS += bias_BNTS.reshape(bias_BNTS.shape[0], heads, groups, *bias_BNTS.shape[2:])
    return logits_BKGTS


def by_head(x_BTNH: Float[Array, "*_ T N H"], heads: int) -> Float[Array, "*_ K G T H"]:
    """What queries have, beside the key heads that serve them.

    So products have their axes where the matrix of scores has them: else not these are transposed
    but the matrix, which is much larger.
    """
    *batch, length, queries, size = x_BTNH.shape
    grouped = x_BTNH.reshape(*batch, length, heads, queries // heads, size)
    return jnp.moveaxis(grouped, -4, -2)


def query_keys(
    keys_B: KeyArray, heads_N: Int[Array, " N"], slots_T: Int[Array, " T"]
) -> UInt32[Array, "B N T 2"]:
    """Two words for each query of each head and row: what its dropout draws from.

    Args:
        keys_B: each row's key.
        heads_N: the heads' numbers in the whole model, whatever part of them is computed here.
        slots_T: the queries' places in the whole row.
    """
    fold = jax.random.fold_in
    over_heads = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
    over_queries = jax.vmap(jax.vmap(jax.vmap(fold, (None, 0)), (0, None)), (0, None))
    return jax.random.key_data(over_queries(over_heads(keys_B, heads_N), slots_T))[..., :2]


def dropped(
    probs_BKGTS: Float[Array, "B K G T S"],
    words_BNT2: UInt32[Array, "B N T 2"],
    slots_S: Int[Array, " S"],
    rate: float | int,
) -> Float[Array, "B K G T S"]:
    """Zeroes a share `rate` of the probabilities and scales the rest by 1 / (1 - rate).

    What is dropped depends on the row's key, the head, the query's and the key's slot, and on
    nothing else: not on the block, the device or the kernel that computes it. `words_BNT2` are
    `query_keys`, `slots_S` the keys' places in the whole row.
    """
    keep = kept(words_BNT2, slots_S, rate).reshape(probs_BKGTS.shape)
    return jnp.where(keep, probs_BKGTS / (1 - rate), jnp.zeros((), probs_BKGTS.dtype))


def kept(
    words_BNT2: UInt32[Array, "B N T 2"], slots_S: Int[Array, " S"], rate: float | int
) -> Bool[Array, "B N T S"]:
    """True with probability 1 - rate: a hash of two random words and the key's slot."""
    first, second = (words_BNT2[..., None, n] for n in range(2))
    spread_S = slots_S.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    # Hashed twice, with a word for each: one hash of (word + slot) would give rows whose words lie
    # close together the same pattern, a few slots apart.
    hashed = _mix(_mix(first ^ spread_S[None, None, None, :]) + second)
    return hashed < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection in which every bit of `x` flips each bit of the result with probability 1/2.

    Constants: Wellons 2018, "Prospecting for hash functions" (lowbias32).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
