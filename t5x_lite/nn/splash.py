"""Splash attention: the Pallas kernels for TPUs that JAX keeps, for our masks and meshes.

The mask is known when the program is compiled, but for the segments: blocks that it hides are left
out of the kernel's grid. Scores live in a core's own memory, a block at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.nn import mapped
from t5x_lite.nn.masks import Visibility
from t5x_lite.partitioning import Sharding

_LANES = 128  # a TPU register's width: blocks are multiples of it
BLOCK = 512


def splash_attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K h"],
    sees: Visibility,
    *,
    scale: float | int,
    soft_cap: float | int | None = None,
    sharding: Sharding | None = None,
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B T N h"]:
    """As `attend`, without biases, prefixes and dropout, which `kernels.choose` gives to others.

    Args:
        q_BTNH: queries, of any length: they are padded to blocks.
        k_BSKH: keys.
        v_BSKH: values.
        sees: which keys each query sees; orders are slots.
        scale: of q·kᵀ.
        soft_cap: logits become cap · tanh(logits / cap).
        sharding: the mesh; rows and heads may be split.
        block: the largest size of a block, a multiple of 128.
        interpret: run Pallas's interpreter instead of a TPU.
    """
    cap = None if soft_cap is None else float(soft_cap)
    work = functools.partial(_work, scale=scale, soft_cap=cap, block=block, interpret=interpret)
    return mapped.by_device(work, sharding, q_BTNH, k_BSKH, v_BSKH, sees.bare())


def _work(q_BTNH, k_BSKH, v_BSKH, context, *, scale, soft_cap, block, interpret):
    queries, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    blocks = _size(queries, block), _size(keys, block)
    q_BNTH = _heads_first((q_BTNH * scale).astype(q_BTNH.dtype), blocks[0])
    k_BKSH, v_BKSH = (_heads_first(x, blocks[1]) for x in (k_BSKH, v_BSKH))
    shape = q_BNTH.shape[2], k_BKSH.shape[2]
    kernel = _kernel(context.sees, q_BNTH.shape[1], shape, blocks, soft_cap, interpret)
    ids = _segments(context.sees, q_BTNH.shape[0], queries, keys, shape)
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, ids)
    return jnp.moveaxis(out_BNTH, 1, 2)[:, :queries].astype(v_BSKH.dtype)


def _size(length: int, block: int) -> int:
    """Of the fewest blocks that hold `length` slots, none larger than `block`."""
    each = -(-length // -(-length // block))
    return -(-each // _LANES) * _LANES


def _heads_first(x_BTNH: Array, block: int) -> Array:
    """[B, T, N, H] → [B, N, T', H], T' being the next multiple of a block."""
    padding = -x_BTNH.shape[1] % block
    return jnp.moveaxis(jnp.pad(x_BTNH, ((0, 0), (0, padding), (0, 0), (0, 0))), 1, 2)


def _kernel(sees: Visibility, heads: int, shape, blocks, soft_cap, interpret: bool):
    """The kernel of one row, [N, T, H] and keys and values [K, S, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    behind = None if sees.window is None else sees.window - 1
    if sees.causal and behind is None:
        mask = splash_attention_mask.CausalMask(shape)
    elif sees.causal or behind is not None:
        mask = splash_attention_mask.LocalMask(shape, (behind, 0 if sees.causal else behind), 0)
    else:
        mask = splash_attention_mask.FullMask(shape)
    block_q, block_kv = blocks
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    # Fewer heads of keys than of queries are served, too: this is the general kernel.
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1,
        q_seq_shards=1, attn_logits_soft_cap=soft_cap, interpret=interpret,
    )  # fmt: skip


def _segments(sees: Visibility, rows: int, queries: int, keys: int, shape):
    """Segments of padded rows; None where the mask alone hides what pads the blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    # The last queries, real ones, see no later key under a causal mask of as many keys.
    if sees.segments_q is None and (keys == shape[1] or (sees.causal and queries == keys)):
        return None
    seg_q = _numbers(sees.segments_q, rows, queries)
    seg_k = _numbers(sees.segments_k, rows, keys)
    # Nothing sees a key without a segment: padding of the row, or of the block.
    seg_k = jnp.where(seg_k > 0, seg_k, -1)
    pad = functools.partial(jnp.pad, constant_values=-1)
    return splash_attention_kernel.SegmentIds(
        jnp.pad(seg_q, ((0, 0), (0, shape[0] - queries))),
        pad(seg_k, ((0, 0), (0, shape[1] - keys))),
    )


def _numbers(segments: Array | None, rows: int, length: int) -> Array:
    if segments is None:
        return jnp.ones((rows, length), jnp.int32)
    return jnp.broadcast_to(segments, (rows, length))
