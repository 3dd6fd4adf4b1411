"""cuDNN's fused attention on GPUs, through `jax.nn.dot_product_attention`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite.nn import mapped
from t5x_lite.nn.masks import Visibility
from t5x_lite.partitioning import Sharding


def cudnn_attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K h"],
    sees: Visibility,
    *,
    scale: float | int,
    sharding: Sharding | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "B T N h"]:
    """As `attend`, without biases, caps and dropout, which `kernels.choose` gives to others.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        sees: which keys each query sees; orders are slots.
        scale: of q·kᵀ.
        sharding: the mesh; rows and heads may be split.
        implementation: "xla" runs the same call anywhere, to test it.
    """
    work = functools.partial(_work, scale=float(scale), implementation=implementation)
    return mapped.by_device(work, sharding, q_BTNH, k_BSKH, v_BSKH, sees.bare())


def _work(q_BTNH, k_BSKH, v_BSKH, context, *, scale, implementation):
    sees, size = context.sees, v_BSKH.shape[-1]
    # One size for all heads; zeros change neither a product nor what is read of the result.
    widest = max(q_BTNH.shape[-1], size)
    q, k, v = (_widened(x, widest) for x in (q_BTNH, k_BSKH, v_BSKH))
    fused = functools.partial(
        jax.nn.dot_product_attention, q, k, v, scale=scale, implementation=implementation
    )
    return _masked(fused, sees, q_BTNH.shape[0])[..., :size]


def _masked(fused: Callable[..., Array], sees: Visibility, rows: int) -> Array:
    """The call with what it knows of masks by name, and the rest as a [B, 1, T, S] mask."""
    # Of windows it knows those that end at the query.
    named = sees.prefix_q is None if sees.causal else sees.window is None
    if not named:
        return fused(mask=None if (mask := sees.mask()) is None else mask[:, None])
    behind = None if sees.window is None else (sees.window - 1, 0)
    fused = functools.partial(fused, is_causal=sees.causal, local_window_size=behind)
    if sees.segments_q is None:
        return fused()
    found = [_lengths(segments, rows) for segments in (sees.segments_q, sees.segments_k)]
    (queries, simple_q), (keys, simple_k) = found

    def padded():
        return fused(query_seq_lengths=queries, key_value_seq_lengths=keys)

    def packed():
        return fused(mask=sees.replace(causal=False, window=None).mask()[:, None])

    # Rows of one document and padding behind it need no mask, only their lengths.
    return jax.lax.cond(simple_q & simple_k, padded, packed)


def _widened(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1])))


def _lengths(segments: Int[Array, "_ T"], rows: int) -> tuple[Int[Array, " B"], Bool[Array, ""]]:
    """Tokens of each row, and whether all rows are one document with padding behind it."""
    segments = jnp.broadcast_to(segments, (rows, segments.shape[1]))
    lengths = jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    whole = (slots < lengths[:, None]).astype(segments.dtype)
    return lengths, jnp.all(segments == whole)
