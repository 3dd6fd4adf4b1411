"""How the train state lies over a mesh, and how a checkpoint names it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import optim, schedules
from t5x_lite.checkpoint import Checkpointer
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.restore import restore_or_init
from t5x_lite.train.state import (
    from_tree,
    init_state,
    state_shardings,
    stored_shapes,
    to_tree,
)

RATE = schedules.constant(1e-3)
OPTIMIZERS = {"adamw": optim.AdamW(RATE), "adafactor": optim.Adafactor(RATE, min_factored=4)}


@pytest.fixture(scope="module")
def sharding():
    return Sharding(MeshConfig(fsdp=4, tensor=2).build(), "fsdp_tp")


@functools.cache
def layout(config, name, sharding):
    return state_shardings(config, OPTIMIZERS[name], sharding, True)


def flat(tree):
    return {optim.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_state_is_split_as_its_parameters_are(tiny, sharding, family, name):
    config = tiny(family)
    shapes, shardings = (flat(tree) for tree in layout(config, name, sharding))
    params = {path: leaf for path, leaf in shapes.items() if path.startswith("params/")}
    whole = {path for path in shapes if shardings[path].is_fully_replicated}
    for path in params:
        part = path.removeprefix("params/")
        owned = {p for p in shapes if part in p and shapes[p].shape == shapes[path].shape}
        assert len(owned) >= (4 if name == "adamw" else 2), path  # params, ema, mu, nu
        for other in owned:
            assert shardings[other].is_equivalent_to(shardings[path], len(shapes[path].shape))
    # Nothing but counters, norms and small leaves is whole on every device.
    assert max(np.prod(shapes[path].shape) for path in whole) <= 128, whole
    kernel = "decoder/layers/ffn/down/kernel"
    assert shardings[f"params/{kernel}"].shard_shape((2, 48, 32)) == (2, 24, 8)
    if name == "adafactor":
        factors = {p: x for p, x in shardings.items() if f"/{kernel}/" in p and "/v_" in p}
        found = {p.rsplit("/", 1)[-1]: x.shard_shape(shapes[p].shape) for p, x in factors.items()}
        assert found == {"v_row": (2, 8), "v_col": (2, 24)}  # of "embed" and of "mlp"


def test_arrays_are_split_and_equal_those_of_one_device(tiny, sharding):
    config, optimizer = tiny("llama"), OPTIMIZERS["adafactor"]
    transform = optimizer.build(parameters.abstract(config)[1])
    one = Sharding(MeshConfig().build(jax.devices()[:1]), "dp")

    def begin(sharding):
        _, shardings = layout(config, "adafactor", sharding)
        return jax.jit(lambda: init_state(config, transform, 0, True), out_shardings=shardings)()

    split, single = begin(sharding), begin(one)
    up = split.params["decoder"]["layers"]["ffn"]["up"]["kernel"]
    assert up.shape == (2, 32, 48)
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, 8, 24)}
    assert len({str(shard.index) for shard in up.addressable_shards}) == 8
    held = sum(shard.data.size for leaf in jax.tree.leaves(split) for shard in
               leaf.addressable_shards if shard.device == jax.devices()[0])  # fmt: skip
    assert held < sum(leaf.size for leaf in jax.tree.leaves(single)) / 4
    for path, value in flat(single).items():
        np.testing.assert_array_equal(flat(split)[path], value, err_msg=path)
    # The step begins from zero moments, and an average that is the parameters.
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(single.opt_state))
    assert single.step == 0
    for path, value in flat(single.params).items():
        np.testing.assert_array_equal(flat(single.ema)[path], value)


def test_a_mesh_that_does_not_divide_is_refused(tiny):
    sharding = Sharding(MeshConfig(tensor=8).build(), "tp")
    with pytest.raises(UserError, match="heads=4 doesn't divide by the 8 parts"):
        state_shardings(tiny("gpt2"), OPTIMIZERS["adamw"], sharding)


def filled(shapes):
    """A state of these shapes with different bits everywhere."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.integers(0, 2**31, leaf.shape, np.int32).view(leaf.dtype), shapes
    )


@pytest.mark.parametrize(
    ("family", "name", "scan", "ema"),
    [
        ("llama", "adamw", True, True),
        ("gpt2", "adamw", False, False),
        ("bert", "adafactor", True, False),
        ("t5", "adafactor", False, True),
    ],
)
def test_tree_and_back_is_the_identity(tiny, sharding, family, name, scan, ema):
    config = tiny(family, scan=scan)
    shapes, _ = state_shardings(config, OPTIMIZERS[name], sharding, ema)
    state = filled(shapes)
    tree = to_tree(state)
    # Scanned or not, a checkpoint holds the same tensors.
    stored = flat(stored_shapes(config, OPTIMIZERS[name], sharding, ema))
    found = flat(tree)
    assert {p: (x.shape, x.dtype) for p, x in found.items()} == {
        p: (x.shape, x.dtype) for p, x in stored.items()
    }
    back = from_tree(tree, shapes)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    found = flat(back)
    for path, value in flat(state).items():
        assert np.asarray(found[path]).tobytes() == value.tobytes(), path


def test_paths_are_the_documented_ones(tiny, sharding):
    paths = set(flat(stored_shapes(tiny("t5", scan=False), OPTIMIZERS["adamw"], sharding, True)))
    kernel = "decoder/layers/attention/query/kernel"
    assert {"step", f"params/{kernel}", f"ema/{kernel}"} <= paths
    assert {path for path in paths if kernel in path and path.startswith("opt_state")} == {
        f"opt_state/1/mu/{kernel}", f"opt_state/1/nu/{kernel}"
    }  # fmt: skip
    assert not [path for path in paths if "layers_" in path]
    assert not [path for path in paths if path.startswith(("frozen", "buffers"))]


def test_another_optimizer_s_state_is_one_line_that_names_what_to_do(tiny, sharding, tmp_path):
    """As before kernels of heads were factored as matrices: each head had its own factors."""
    config, run = tiny("t5"), tmp_path / "old" / "checkpoints"
    shapes = stored_shapes(config, OPTIMIZERS["adafactor"], sharding)
    kernel = "opt_state/0/decoder/layers/attention/query/kernel/0"

    def older(path, leaf):
        shape = (2, 4, 32) if optim.path_name(path) == f"{kernel}/v_row" else leaf.shape
        return jnp.zeros(shape, leaf.dtype)

    with Checkpointer(run) as checkpoints:
        checkpoints.save(1, jax.tree_util.tree_map_with_path(older, shapes), {})
        checkpoints.wait()
        options = (config, OPTIMIZERS["adafactor"], sharding, 0, False)
        with pytest.raises(UserError) as error:
            restore_or_init(checkpoints, *options)
        text = str(error.value)
        assert f"{kernel}/v_row is float32[2, 4, 32] in the checkpoint and float32[2, 32]" in text
        assert f"--gin.INIT_FROM=\"'{tmp_path / 'old'}'\"" in text
        assert "\n" not in text
        # Where the model differs too, that is what matters.
        other = (tiny("llama"), *options[1:])
        with pytest.raises(UserError, match="no usable checkpoint"):
            restore_or_init(checkpoints, *other)
