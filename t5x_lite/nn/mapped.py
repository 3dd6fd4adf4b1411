"""Attention on each device's rows and heads, where the compiler can't divide the work itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from t5x_lite.nn.online import Context
from t5x_lite.partitioning import Sharding


def by_device(
    work: Callable[[Array, Array, Array, Context], Array],
    sharding: Sharding | None,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K h"],
    sees: Any,
    bias: Any = (),
    dropout_keys: Any = None,
) -> Float[Array, "B T N h"]:
    """`work(q, k, v, context)` with the parts of each array that a device holds.

    A Pallas kernel runs on one device. Blocks are skipped by a device's own rows; the compiler
    would have all devices agree on each block first.
    """
    heads_N = jnp.arange(q_BTNH.shape[2], dtype=jnp.int32)
    context = Context(sees, bias, dropout_keys, heads_N)
    if sharding is None or sharding.mesh.size == 1:
        return work(q_BTNH, k_BSKH, v_BSKH, context)
    rows, heads = (sharding.axes(name) or None for name in ("batch", "act_heads"))
    each = PartitionSpec(rows, None, heads)
    run = sharding.shard_map(work, (each, each, each, specs_of(context, sharding)), each)
    return run(q_BTNH, k_BSKH, v_BSKH, context)


def specs_of(context: Context, sharding: Sharding) -> Context:
    """The PartitionSpecs of a context's arrays, whose rows and slots are whole."""
    rows, heads = (sharding.axes(name) or None for name in ("batch", "act_heads"))
    # Orders have one row for the whole batch; a table of biases has its heads last.
    sees, keys = jax.tree.map(
        lambda leaf: PartitionSpec(rows if leaf.shape[0] > 1 else None),
        (context.sees, context.dropout_keys),
    )
    bias = jax.tree.map(lambda leaf: PartitionSpec(*(None,) * (leaf.ndim - 1), heads), context.bias)
    return Context(sees, bias, keys, PartitionSpec(heads))
