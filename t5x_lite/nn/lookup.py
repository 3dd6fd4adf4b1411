"""Rows of a table that is split over devices, without gathering the table or anybody's tokens.

Left to itself the compiler gathers one or the other. Here each device looks up, in the part of the
table that it holds, what the tokens of its neighbours need:

- columns split over devices that have other rows of the batch (fsdp): ids are gathered, four bytes
  a token, and the columns found are sent to where the tokens are, all to all;
- rows split (a vocabulary over "tensor"): ids of other devices' rows give zeros, and one sum puts
  the parts together (Shoeybi et al. 2019, §3).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from t5x_lite.partitioning import Sharding


def lookup(
    table_VD: Float[Array, "V D"],
    ids_BT: Int[Array, "_ T"],
    names: Sequence[str],
    sharding: Sharding | None,
    dtype: str,
) -> Float[Array, "_ T D"]:
    """table[ids] in `dtype`; an id beyond the table's ends reads its first or last row.

    Args:
        table_VD: a parameter.
        ids_BT: [B, T], or [1, T] for all rows of the batch.
        names: logical names of the table's axes.
        sharding: the mesh.
        dtype: of the result.
    """
    ids_BT = jnp.clip(ids_BT, 0, table_VD.shape[0] - 1)
    if sharding is None or sharding.mesh.size == 1:
        return table_VD[ids_BT].astype(dtype)
    rows, columns = (sharding.axes(name) for name in names)
    batch = sharding.axes("batch") if ids_BT.shape[0] > 1 else ()
    length = sharding.axes("length")
    apart = {*rows, *length}.isdisjoint(columns) and {*batch, *length}.isdisjoint(rows)
    if not apart or not (set(columns) <= set(batch) or set(columns).isdisjoint(batch)):
        return table_VD[ids_BT].astype(dtype)  # rules that no table of `PARTS` gives

    sent = bool(columns) and set(columns) <= set(batch)

    def own(table_VD: Array, ids_BT: Array) -> Array:
        if sent:
            ids_BT = jax.lax.all_gather(ids_BT, columns, axis=0, tiled=True)
        found_BTD = _own_rows(table_VD, ids_BT, rows, dtype)
        if sent:
            return jax.lax.all_to_all(found_BTD, columns, split_axis=0, concat_axis=2, tiled=True)
        if columns:
            return jax.lax.all_gather(found_BTD, columns, axis=2, tiled=True)
        return found_BTD

    tokens = PartitionSpec(batch or None, length or None)
    ins = PartitionSpec(rows or None, columns or None), tokens
    # With the check the gradient of a sum needs no other sum; but it takes a gathered array for one
    # that differs from device to device.
    return sharding.shard_map(own, ins, tokens, check_vma=sent or not columns)(table_VD, ids_BT)


def _own_rows(table_VD: Array, ids_BT: Array, rows: tuple[str, ...], dtype: str) -> Array:
    """What a table whose rows are split over the mesh axes `rows` has for these ids."""
    if not rows:
        return table_VD[ids_BT].astype(dtype)
    size = table_VD.shape[0]
    place_BT = ids_BT - size * jax.lax.axis_index(rows)
    here_BT = (place_BT >= 0) & (place_BT < size)
    found_BTD = table_VD[jnp.clip(place_BT, 0, size - 1)].astype(dtype)
    return jax.lax.psum(jnp.where(here_BT[:, :, None], found_BTD, 0), rows)
