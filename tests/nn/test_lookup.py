"""Rows of a table split over devices are those of the whole table, and so is its gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.lookup import lookup
from t5x_lite.partitioning import MeshConfig, Rules, Sharding

V, D, B, T = 12, 8, 4, 6
NAMES = ("vocab", "embed")
LAYOUTS = {
    "dp": {"replica": 2},
    "fsdp": {"replica": 2, "fsdp": 2},
    "tp": {"tensor": 4},
    "fsdp_tp_sp": {"fsdp": 2, "tensor": 2, "sequence": 2},
    "fsdp_ep_sp": {"fsdp": 2, "expert": 2, "sequence": 2},
}


def split(table, axes):
    axes = {"fsdp": 1, **axes}
    count = int(np.prod(list(axes.values())))
    return Sharding(MeshConfig(**axes).build(jax.devices()[:count]), table)


def run(sharding, ids, dtype="float32"):
    """(compiled text, rows, gradient of the table)."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((V, D)), jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, D)), dtype)

    def both(table, ids):
        rows, back = jax.vjp(lambda t: lookup(t, ids, NAMES, sharding, dtype), table)
        return rows, back(cotangent[: ids.shape[0]])[0]

    if sharding is None:
        return None, *jax.jit(both)(table, ids)
    where = sharding.named(NAMES, table.shape)
    tokens = sharding.batch(ids.shape) if ids.shape[0] > 1 else None
    jitted = jax.jit(both, out_shardings=(None, where))
    table, ids = jax.device_put(table, where), jax.device_put(ids, tokens)
    return jitted.lower(table, ids).compile().as_text(), *jitted(table, ids)


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize(("table", "axes"), LAYOUTS.items())
def test_split_tables_give_the_same_rows_and_gradients(table, axes, rows):
    """Of tokens, and of one row of positions for all; ids repeat, and two lie outside."""
    ids = np.random.default_rng(2).integers(0, V, (rows, T)).astype(np.int32)
    ids[0, :2] = -3, V + 1
    _, found, gradient = run(split(table, axes), jnp.asarray(ids))
    _, expected, whole = run(None, jnp.asarray(ids))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, whole, rtol=1e-6, atol=1e-6)
    assert np.any(np.asarray(whole)[0])
    assert np.any(np.asarray(whole)[-1])


@pytest.mark.parametrize(("table", "axes"), LAYOUTS.items())
def test_neither_table_nor_vectors_are_gathered(table, axes):
    """Ids are, where columns are split; vectors go to where their tokens are."""
    text, *_ = run(split(table, axes), jnp.zeros((B, T), jnp.int32))
    found = set(re.findall(r"= \(?(\w+)\[[^=]*? (all-gather|all-to-all|all-reduce)\(", text))
    gathered = {dtype for dtype, kind in found if kind == "all-gather"}
    assert gathered == ({"s32"} if "fsdp" in table else set())
    assert (("f32", "all-to-all") in found) == ("fsdp" in table)


def test_bfloat16():
    ids = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, T)), jnp.int32)
    found = run(split("fsdp_tp_sp", LAYOUTS["fsdp_tp_sp"]), ids, "bfloat16")[1]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, run(None, ids, "bfloat16")[1])


def test_other_rules_leave_it_to_the_compiler():
    """Rows of the table over an axis that splits the batch: the sum would mix tokens."""
    rules = Rules("fsdp_tp", {"vocab": ("tensor", "replica")})
    sharding = split(rules, {"replica": 2, "fsdp": 2, "tensor": 2})
    ids = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, T)), jnp.int32)
    np.testing.assert_array_equal(run(sharding, ids)[1], run(None, ids)[1])
