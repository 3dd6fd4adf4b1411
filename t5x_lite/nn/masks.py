"""What a query may see: as what it is computed from, and as a boolean mask, True where visible."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row without any visible key (padding) gives a finite softmax and gradient.
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


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
    return jnp.where(mask[:, None, None, :, :], logits, jnp.asarray(HIDDEN, logits.dtype))


@flax.struct.dataclass
class Visibility:
    """Which keys each query sees: not the [T, S] mask, but what any block of it is computed from.

    `order` are numbers whose differences are distances; a first axis of 1 serves the whole batch.
    """

    order_q: Any  # int32 [B or 1, T]
    order_k: Any  # int32 [B or 1, S]
    segments_q: Any = None  # int32 [B or 1, T]; None: one document without padding
    segments_k: Any = None  # int32 [B or 1, S]
    prefix_q: Any = None  # int32 [B or 1, T]; what a causal stack reads in both directions
    prefix_k: Any = None  # int32 [B or 1, S]
    whole: Any = None  # bool [B or 1, T, S]: the mask without the window, where it is stored
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    # The orders are the rows' slots 0, 1, …: kernels whose masks are made at compile time ask.
    slotted: bool = flax.struct.field(pytree_node=False, default=False)

    def mask(self) -> Bool[Array, "_ T S"] | None:
        """The mask; None where everything is visible."""
        whole = self._lasting() if self.whole is None else self.whole
        if self.window is None:
            return whole
        return combine(whole, near(self.order_q, self.order_k, self.window))

    def _lasting(self) -> Bool[Array, "_ T S"] | None:
        """What all layers of a stack have in common: all but the window."""
        earlier = causal(self.order_q, self.order_k) if self.causal else None
        if self.causal and self.prefix_q is not None:
            earlier |= prefix(self.prefix_q, self.prefix_k)
        if self.segments_q is None:
            return earlier
        return combine(earlier, same_segment(self.segments_q, self.segments_k))

    def near(self, window: int) -> "Visibility":
        """The same, narrowed to distances below `window`."""
        return self.replace(window=window)

    def stored(self) -> "Visibility":
        """The same with its mask computed once, for all layers that will ask for it."""
        return self.replace(whole=self._lasting())

    def bare(self) -> "Visibility":
        """The same without a stored mask."""
        return self.replace(whole=None)

    def queries(self, start: Int[Array, ""] | int, size: int) -> "Visibility":
        """Of the queries start … start + size - 1, all keys; `start` may be traced."""
        return self._part("q", start, size)

    def keys(self, start: Int[Array, ""] | int, size: int) -> "Visibility":
        """All queries, of the keys start … start + size - 1; `start` may be traced."""
        return self._part("k", start, size)

    def _part(self, side: str, start, size: int) -> "Visibility":
        names = [f"{field}_{side}" for field in ("order", "segments", "prefix")]
        return self.replace(
            whole=None,
            slotted=False,
            **{
                name: jax.lax.dynamic_slice_in_dim(value, start, size, axis=1)
                for name in names
                if (value := getattr(self, name)) is not None
            },
        )


def everything(queries: int, keys: int, **seen: Any) -> Visibility:
    """Every query sees every key, but for what `seen` says of segments."""
    return Visibility(slots(queries), slots(keys), causal=False, slotted=True, **seen)


def slots(length: int) -> Int[Array, "1 T"]:
    """0, 1, …: one row that serves the whole batch."""
    return jnp.arange(length, dtype=jnp.int32)[None]
