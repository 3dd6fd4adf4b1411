"""softmax(q·kᵀ) · v: one function, and the paths that compute it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.nn import blockwise, cudnn, kernels, masks, ring, scores, sliced, splash
from t5x_lite.partitioning import Sharding
from t5x_lite.types import KeyArray


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K h"],
    sees: masks.Visibility | None = None,
    bias: scores.Biases = (),
    *,
    scale: float | int,
    soft_cap: float | int | None = None,
    dropout: float | int = 0.0,
    dropout_keys: KeyArray | None = None,
    sharding: Sharding | None = None,
    kernel: str = "plain",
    platform: str | None = None,
) -> Float[Array, "B T N h"]:
    """softmax(scale · q·kᵀ + bias, where visible) · v; each key head serves N / K query heads.

    Logits and softmax are float32; the products are in the inputs' dtype. What a query gets that
    sees no key (padding) is finite, and otherwise up to the path.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values, whose heads may have another size.
        sees: which keys each query sees; None: all.
        bias: terms that are added to the logits.
        scale: what query · key is multiplied by.
        soft_cap: scaled logits become cap · tanh(logits / cap), before the bias.
        dropout: the share of probabilities that are zeroed.
        dropout_keys: one key a row, [B]; None: no dropout.
        sharding: the mesh that it is compiled for.
        kernel: of `kernels.KERNELS`.
        platform: what it is compiled for; None: what `sharding`'s devices are.

    Raises:
        UserError: the kernel doesn't run there, or can't do what is asked.
    """
    if sees is None:
        sees = masks.everything(q_BTNH.shape[1], k_BSKH.shape[1])
    keys = dropout_keys if dropout else None
    shape = q_BTNH.shape[0], q_BTNH.shape[2], q_BTNH.shape[1], k_BSKH.shape[1]
    work = kernels.Work.of(
        shape, max(q_BTNH.shape[3], v_BSKH.shape[3]), q_BTNH.dtype, sees, bias,
        soft_cap=soft_cap is not None, dropout=keys is not None,
    )  # fmt: skip
    platform = platform or kernels.platform_of(sharding)
    match kernels.choose(kernel, platform, work, sharding):
        case "ring":
            return ring.ring_attend(
                q_BTNH, k_BSKH, v_BSKH, sees, bias, sharding=sharding, scale=scale,
                soft_cap=soft_cap, dropout=dropout, dropout_keys=keys,
            )  # fmt: skip
        case "sliced" | "blockwise" as name:
            by_parts = {"sliced": sliced.sliced_attend, "blockwise": blockwise.blockwise_attend}
            return by_parts[name](
                q_BTNH, k_BSKH, v_BSKH, sees, bias, scale=scale, soft_cap=soft_cap,
                dropout=dropout, dropout_keys=keys, sharding=sharding,
            )  # fmt: skip
        case "splash":
            return splash.splash_attend(
                q_BTNH, k_BSKH, v_BSKH, sees, scale=scale, soft_cap=soft_cap, sharding=sharding
            )
        case "cudnn":
            return cudnn.cudnn_attend(q_BTNH, k_BSKH, v_BSKH, sees, scale=scale, sharding=sharding)
    return _plain(q_BTNH, k_BSKH, v_BSKH, sees, bias, scale, soft_cap, dropout, keys)


def _plain(q_BTNH, k_BSKH, v_BSKH, sees, bias, scale, soft_cap, dropout, keys):
    """The whole score matrix at once."""
    q_BKGTH = scores.by_head(q_BTNH, k_BSKH.shape[2])
    k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (k_BSKH, v_BSKH))
    logits_BKGTS = scores.logits(q_BKGTH, k_BKSH, sees, bias, scale, soft_cap)
    logits_BKGTS = masks.apply(logits_BKGTS, sees.mask())
    probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    if keys is not None:
        heads, queries, slots = (
            jnp.arange(size, dtype=jnp.int32)
            for size in (q_BTNH.shape[2], q_BTNH.shape[1], k_BSKH.shape[1])
        )
        words = scores.query_keys(keys, heads, queries)
        probs_BKGTS = scores.dropped(probs_BKGTS, words, slots, dropout)
    out_BTKGH = jnp.moveaxis(jnp.einsum("BKGTS,BKSH->BKGTH", probs_BKGTS, v_BKSH), 3, 1)
    return out_BTKGH.reshape(*q_BTNH.shape[:3], v_BSKH.shape[3])
