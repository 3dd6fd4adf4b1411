"""The key/value cache of decoding: an argument and a result, never hidden state."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_lite.nn.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """Each section's keys and values, [L, B, S, K, H], and what stands in the S slots.

    A call writes its T tokens into slots index … index + T - 1 of every row. Rows of different
    length are padded on the right with segment 0, which nothing looks at; `positions`, not slots,
    say where a token stands. The caller bounds the calls: a full cache overwrites its last slots.
    """

    layers: Any
    segments_BS: Any
    positions_BS: Any
    memory_segments_BS: Any
    index: Any


def init_cache(
    config: ModelConfig, batch: int, slots: int, memory_slots: int | None = None
) -> Cache:
    """An empty cache for `batch` rows of up to `slots` tokens.

    Args:
        config: a model with a decoder.
        batch: B, rows.
        slots: S, tokens a row, prompt included.
        memory_slots: encoder tokens a row, for encoder-decoders.
    """

    def empty_section(section):
        layer = section.block.init_cache(batch, slots, memory_slots, config.dtype)
        return jax.tree.map(lambda x: jnp.zeros((section.repeats, *x.shape), x.dtype), layer)

    layers = {section.name: empty_section(section) for section in config.decoder.sections}
    reads = config.kind == "encoder-decoder"
    memory = jnp.zeros((batch, memory_slots), jnp.int32) if reads else None
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(layers, empty, empty, memory, jnp.zeros((), jnp.int32))


def write_slots(
    cache: Cache, segments_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]
) -> Cache:
    """Records the T new tokens' segments and positions; the stack then moves the index."""
    update = jax.lax.dynamic_update_slice_in_dim
    return cache.replace(
        segments_BS=update(cache.segments_BS, segments_BT, cache.index, axis=1),
        positions_BS=update(cache.positions_BS, positions_BT, cache.index, axis=1),
    )
