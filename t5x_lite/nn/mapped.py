"""Attention on each device's rows and heads, where the compiler can't divide the work itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
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
    # Orders have one row for the whole batch; a table of biases has its heads last.
    per_row, keys = jax.tree.map(
        lambda leaf: PartitionSpec(rows if leaf.shape[0] > 1 else None), (sees, dropout_keys)
    )
    tables = jax.tree.map(lambda leaf: PartitionSpec(*(None,) * (leaf.ndim - 1), heads), bias)
    mesh = sharding.mesh
    own = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return jax.shard_map(
        work,
        mesh=mesh,
        in_specs=(each, each, each, Context(per_row, tables, keys, PartitionSpec(heads))),
        out_specs=each,
        axis_names={axis for axis, kind in own if kind != AxisType.Manual},
        check_vma=False,  # loops begin with constants, which are the same on all devices
    )(q_BTNH, k_BSKH, v_BSKH, context)
