"""Meshes and rule tables: what they split, and what they refuse."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from t5x_lite import partitioning
from t5x_lite.errors import UserError
from t5x_lite.partitioning import MESH_AXES, RULES, MeshConfig, Sharding, constrain


def mesh(**axes):
    return MeshConfig(**axes).build()


def test_minus_one_takes_what_remains():
    assert dict(mesh().shape) == dict(zip(MESH_AXES, (1, 8, 1, 1, 1, 1), strict=True))
    assert mesh(tensor=2).shape["fsdp"] == 4
    assert mesh(fsdp=1, tensor=-1).shape["tensor"] == 8
    assert MeshConfig(fsdp=2).build(jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 3}, "mesh fsdp=3 asks for 3 devices"),
        ({"tensor": 3}, "mesh fsdp=-1 × tensor=3 asks for 3 devices"),
        ({"fsdp": 16}, "but there are 8; set one axis to -1 or make the product 8"),
        ({"fsdp": 1}, "mesh 1 asks for 1 devices"),
        ({"fsdp": -1, "tensor": -1}, "at most one is -1"),
        ({"fsdp": 0}, "axes are positive"),
        ({"tensor": -2}, "axes are positive"),
    ],
)
def test_meshes_that_do_not_multiply_out(axes, message):
    with pytest.raises(UserError, match=message):
        mesh(**axes)


def test_specs_follow_the_table():
    names, shape = ("layers", "embed", "heads", "head_dim"), (2, 32, 4, 8)
    expected = {
        "dp": (None, None, None, None),
        "fsdp": (None, ("fsdp",), None, None),
        "tp": (None, None, ("tensor",), None),
        "fsdp_tp": (None, ("fsdp",), ("tensor",), None),
    }
    assert set(expected) == set(RULES)
    for table, spec in expected.items():
        assert Sharding(mesh(tensor=2), table).spec(names, shape) == PartitionSpec(*spec), table


def test_rows_are_split_over_the_data_axes():
    sharding = Sharding(mesh(replica=2, tensor=2), "dp")
    assert sharding.batch((8, 16)).spec == PartitionSpec(("replica", "fsdp"), None)
    assert sharding.batch((8, 16)).shard_shape((8, 16)) == (2, 16)
    assert sharding.replicated().shard_shape((8, 16)) == (8, 16)


def test_names_without_rules_and_wrong_ranks_are_refused():
    sharding = Sharding(mesh(), "fsdp")
    with pytest.raises(UserError, match="unknown logical axis 'embd'; there are layers, embed"):
        sharding.spec(("embd",), (8,))
    with pytest.raises(UserError, match=r"name 1 axes, but the array has shape \(8, 8\)"):
        sharding.spec(("embed",), (8, 8))
    with pytest.raises(UserError, match="no rule table 'ddp'; there are dp, fsdp, tp, fsdp_tp"):
        Sharding(mesh(), "ddp")


def test_a_mesh_axis_cannot_split_two_axes():
    with pytest.raises(UserError, match="'fsdp' uses a mesh axis twice for"):
        Sharding(mesh(), "fsdp").spec(("embed", "embed"), (8, 8))


def test_sizes_that_the_mesh_does_not_divide():
    with pytest.raises(UserError, match="embed=12 doesn't divide by the 8 parts of mesh axes fsdp"):
        Sharding(mesh(), "fsdp").spec(("embed",), (12,))
    with pytest.raises(UserError, match="batch=6 doesn't divide by the 4 parts"):
        Sharding(mesh(tensor=2), "fsdp_tp").batch((6, 16))


def test_every_rule_names_axes_of_the_mesh():
    for table in RULES.values():
        assert set(table) == set(RULES["dp"])
        assert {axis for group in table.values() for axis in group} <= set(MESH_AXES)


def test_constrain_takes_effect():
    sharding = Sharding(mesh(tensor=2), "tp")

    def double(x):
        return constrain(2 * x, ("batch", "length", "act_mlp"), sharding)

    x = jnp.ones((4, 2, 6))
    assert "sharding_constraint" in jax.jit(double).lower(x).as_text()
    laid = jax.jit(double)(x).sharding
    assert laid.shard_shape(x.shape) == (1, 2, 3)
    with pytest.raises(UserError, match="act_mlp=5 doesn't divide"):
        jax.jit(double)(jnp.ones((4, 2, 5)))


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((3, 2, 5))
    single = Sharding(MeshConfig().build(jax.devices()[:1]), "tp")
    assert constrain(x, ("batch", "length", "act_mlp"), None) is x
    assert constrain(x, ("batch", "length", "act_mlp"), single) is x


def test_another_table_is_another_program():
    shared = mesh(tensor=2)
    assert Sharding(shared, "tp") != Sharding(shared, "fsdp")
    assert hash(Sharding(shared, "tp")) == hash(Sharding(mesh(tensor=2), "tp"))
    laid = []
    run = jax.jit(lambda x, s: constrain(x + 1, ("embed", "mlp"), s), static_argnums=1)
    for table in ("tp", "fsdp"):
        out = run(jnp.ones((8, 8)), partitioning.Sharding(shared, table))
        laid.append(out.sharding.shard_shape((8, 8)))
    assert laid == [(8, 4), (2, 8)]
