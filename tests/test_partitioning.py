"""Meshes and rule tables: what they split, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from t5x_lite import partitioning
from t5x_lite.errors import UserError
from t5x_lite.partitioning import (
    DATA_AXES,
    LOGICAL_AXES,
    MESH_AXES,
    PARTS,
    MeshConfig,
    Rules,
    Sharding,
    batch_axes,
    constrain,
)


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
        ({"dcn_replica": -1}, "parts across slices .* are positive"),
        ({"dcn_replica": 3}, "mesh fsdp=-1 × dcn_replica=3 asks for 3 devices or a multiple, but"),
        ({"fsdp": 8, "dcn_fsdp": 2}, "mesh fsdp=8 × dcn_fsdp=2 asks for 16 devices, but there"),
    ],
)
def test_meshes_that_do_not_multiply_out(axes, message):
    with pytest.raises(UserError, match=message):
        mesh(**axes)


def test_a_slice_is_a_block_of_the_mesh():
    """Emulated: devices 0 … 3 are the first slice, 4 … 7 the second."""
    built = mesh(tensor=2, dcn_replica=2)
    assert dict(built.shape) | {"replica": 2, "fsdp": 2, "tensor": 2} == dict(built.shape)
    ids = np.vectorize(lambda device: device.id)(built.devices).reshape(2, 2, 2)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2))
    # An axis may lie in slices and across them: its first half in one, its second in the other.
    built = mesh(tensor=2, dcn_fsdp=2)
    assert built.shape["fsdp"] == 4
    ids = np.vectorize(lambda device: device.id)(built.devices).reshape(4, 2)
    np.testing.assert_array_equal(ids // 4, [[0, 0], [0, 0], [1, 1], [1, 1]])


def test_slices_of_tpus_are_what_the_devices_say(tpu):
    chips = tpu("v5e:2x2", num_slices=2)
    mixed = [chip for pair in zip(chips[4:], chips[:4], strict=True) for chip in pair]
    for axes in ({"dcn_replica": 2}, {"dcn_fsdp": 2}):
        built = MeshConfig(tensor=2, **axes).build(mixed)
        found = np.vectorize(lambda chip: chip.slice_index)(built.devices)
        assert found.ravel().tolist() == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match=r"has 1 parts .* the 8 devices form 2; set dcn_replica=2"):
        MeshConfig(tensor=2).build(chips)
    with pytest.raises(UserError, match="has 4 parts across slices"):
        MeshConfig(dcn_replica=4).build(chips)


def test_parts_that_talk_most_are_neighbours(tpu):
    """Of an axis of two devices on a torus, both are one step apart."""
    built = MeshConfig(fsdp=-1, tensor=2).build(tpu("v5e:4x4"))
    coords = np.asarray([chip.coords for chip in built.devices.ravel()]).reshape(8, 2, 3)
    assert set(np.abs(coords[:, 0] - coords[:, 1]).sum(axis=-1)) == {1}


def test_the_busiest_axis_has_the_nearest_devices():
    """Stages send each other one activation a microbatch, tensor parts several a layer."""
    built = mesh(fsdp=1, tensor=2, stage=4)
    ids = np.vectorize(lambda device: device.id)(built.devices).reshape(2, 4)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(4, 2).T)


NAMES, SHAPE = ("layers", "embed", "heads", "head_dim"), (2, 32, 4, 8)


@pytest.mark.parametrize(
    ("table", "axes", "spec"),
    [
        ("dp", {}, (None, None, None, None)),
        ("fsdp", {}, (None, ("fsdp",), None, None)),
        ("tp", {"tensor": 2}, (None, None, ("tensor",), None)),
        ("fsdp_tp", {"tensor": 2}, (None, ("fsdp",), ("tensor",), None)),
        ("tp_fsdp", {"tensor": 2}, (None, ("fsdp",), ("tensor",), None)),
        ("sp", {"sequence": 2}, (None, None, None, None)),
        ("ep", {"expert": 2}, (None, None, None, None)),
        ("pp", {"stage": 2}, (("stage",), None, None, None)),
        ("fsdp_tp_pp", {"tensor": 2, "stage": 2}, (("stage",), ("fsdp",), ("tensor",), None)),
    ],
)
def test_specs_follow_the_table(table, axes, spec):
    assert Sharding(mesh(**axes), table).spec(NAMES, SHAPE) == PartitionSpec(*spec)


def test_experts_are_split_by_ep_and_within_by_the_others():
    names, shape = ("expert", "embed", "mlp"), (4, 8, 16)
    sharding = Sharding(mesh(fsdp=2, expert=2, tensor=2), "fsdp_ep_tp")
    assert sharding.spec(names, shape) == PartitionSpec(("expert",), ("fsdp",), ("tensor",))
    assert sharding.named(names, shape).shard_shape(shape) == (2, 4, 8)


def test_rows_are_split_over_the_data_axes():
    sharding = Sharding(mesh(replica=2, tensor=2), "tp")
    assert DATA_AXES == ("replica", "fsdp", "expert")
    assert sharding.batch((8, 16)).spec == PartitionSpec(DATA_AXES, None)
    assert sharding.batch((8, 16)).shard_shape((8, 16)) == (2, 16)
    assert sharding.replicated().shard_shape((8, 16)) == (8, 16)
    assert sharding.parts("batch") == 4


def test_tokens_of_a_row_are_split_by_sp():
    sharding = Sharding(mesh(fsdp=2, sequence=4), "dp_sp")
    assert sharding.parts("length") == 4
    assert sharding.batch((8, 16)).shard_shape((8, 16)) == (4, 4)
    assert sharding.batch((8, 16, 3), "encoder_features").shard_shape((8, 16, 3)) == (4, 4, 3)
    assert sharding.batch((8,), "labels").shard_shape((8,)) == (4,)
    assert sharding.batch((8, 2), "spans").shard_shape((8, 2)) == (4, 2)
    assert batch_axes("tokens", 3) == ("batch", "length", None)
    with pytest.raises(UserError, match="length=6 doesn't divide by the 4 parts"):
        sharding.batch((8, 6))


def test_names_without_rules_and_wrong_ranks_are_refused():
    sharding = Sharding(mesh(), "fsdp")
    with pytest.raises(UserError, match="unknown logical axis 'embd'; there are layers, embed"):
        sharding.spec(("embd",), (8,))
    with pytest.raises(UserError, match=r"name 1 axes, but the array has shape \(8, 8\)"):
        sharding.spec(("embed",), (8, 8))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("ddp", "no rule table 'ddp': 'ddp' is none of its parts dp, fsdp, tp, ep, sp, pp"),
        ("fsdp-tp", "'fsdp-tp' is none of its parts"),
        ("", "no rule table ''"),
        ("tp_tp", "names a part twice"),
    ],
)
def test_unknown_tables_are_refused(table, message):
    with pytest.raises(UserError, match=message):
        Sharding(mesh(), table)


@pytest.mark.parametrize(("axis", "part"), [("tensor", "tp"), ("sequence", "sp"), ("stage", "pp")])
def test_an_axis_that_the_table_makes_no_use_of_is_refused(axis, part):
    with pytest.raises(
        UserError, match=f"its 2 devices would do the same work 2 times; .*'{part}'"
    ):
        Sharding(mesh(**{axis: 2}), "fsdp_ep")
    assert Sharding(mesh(**{axis: 2}), f"fsdp_{part}").mesh.shape[axis] == 2


def test_a_table_can_be_changed():
    rules = Rules("fsdp_tp", {"vocab": ("tensor", "fsdp"), "embed": ()})
    sharding = Sharding(mesh(tensor=2), rules)
    assert sharding.spec(("vocab", "embed"), (16, 8)) == PartitionSpec(("tensor", "fsdp"), None)
    assert str(rules) == "fsdp_tp with vocab: tensor·fsdp, embed: -"
    assert hash(sharding) == hash(Sharding(mesh(tensor=2), Rules("fsdp_tp", rules.changes)))
    assert sharding != Sharding(mesh(tensor=2), "fsdp_tp")
    with pytest.raises(
        UserError, match="the rule for 'vocab' names 'model', which is no mesh axis"
    ):
        Rules("fsdp", {"vocab": ("model",)})
    with pytest.raises(UserError, match="change 'vocabulary', which is no logical axis; there are"):
        Rules("fsdp", {"vocabulary": ("tensor",)})
    with pytest.raises(UserError, match="no rule table 'ddp'"):
        Rules("ddp")


def test_a_mesh_axis_cannot_split_two_axes():
    with pytest.raises(UserError, match="'fsdp' uses a mesh axis twice for"):
        Sharding(mesh(), "fsdp").spec(("embed", "embed"), (8, 8))


def test_sizes_that_the_mesh_does_not_divide():
    with pytest.raises(UserError, match="embed=12 doesn't divide by the 8 parts of mesh axes fsdp"):
        Sharding(mesh(), "fsdp").spec(("embed",), (12,))
    with pytest.raises(UserError, match="batch=6 doesn't divide by the 4 parts"):
        Sharding(mesh(tensor=2), "fsdp_tp").batch((6, 16))


def test_every_part_names_axes_of_models_and_of_meshes():
    for part in PARTS.values():
        assert set(part) <= set(LOGICAL_AXES)
        assert {axis for group in part.values() for axis in group} <= set(MESH_AXES)


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
    shared = mesh(replica=2)
    assert Sharding(shared, "dp") != Sharding(shared, "fsdp")
    assert hash(Sharding(shared, "dp")) == hash(Sharding(mesh(replica=2), "dp"))
    laid = []
    run = jax.jit(lambda x, s: constrain(x + 1, ("embed", "mlp"), s), static_argnums=1)
    for table in ("dp", "fsdp"):
        out = run(jnp.ones((8, 8)), partitioning.Sharding(shared, table))
        laid.append(out.sharding.shard_shape((8, 8)))
    assert laid == [(8, 8), (2, 8)]
