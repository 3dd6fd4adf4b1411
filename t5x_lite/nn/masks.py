"""Boolean attention masks, True where a query may look, and the one place that adds them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row without any visible key (padding) gives a finite softmax and gradient.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def causal(pos_q: Int[Array, "B T"], pos_k: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Keys at or before the query."""
    return pos_k[:, None, :] <= pos_q[:, :, None]


def prefix(prefix_q: Int[Array, "B T"], prefix_k: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Queries and keys that both belong to a prefix, where looking ahead is allowed."""
    return (prefix_q[:, :, None] > 0) & (prefix_k[:, None, :] > 0)


def same_segment(seg_q: Int[Array, "B T"], seg_k: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Keys of the query's own document; padding (segment 0) sees and is seen by nothing."""
    return (seg_q[:, :, None] == seg_k[:, None, :]) & (seg_k[:, None, :] > 0)


def near(pos_q: Int[Array, "B T"], pos_k: Int[Array, "B S"], window: int) -> Bool[Array, "B T S"]:
    """Keys at a distance below `window`, before or after the query."""
    return jnp.abs(pos_q[:, :, None] - pos_k[:, None, :]) < window


def add(*biases: Float[Array, "_ N T S"] | None) -> Float[Array, "_ N T S"] | None:
    """The sum of those that are given."""
    given = [bias for bias in biases if bias is not None]
    return sum(given[1:], given[0]) if given else None


def combine(*masks: Bool[Array, "_ T S"] | None) -> Bool[Array, "_ T S"] | None:
    """The conjunction of those that are given."""
    given = [mask for mask in masks if mask is not None]
    result = given[0] if given else None
    for mask in given[1:]:
        result = result & mask
    return result


def apply(
    logits: Float[Array, "B K G T S"], mask: Bool[Array, "_ T S"] | None
) -> Float[Array, "B K G T S"]:
    """Hides what the mask hides from the softmax over S."""
    if mask is None:
        return logits
    return jnp.where(mask[:, None, None, :, :], logits, jnp.asarray(_HIDDEN, logits.dtype))
