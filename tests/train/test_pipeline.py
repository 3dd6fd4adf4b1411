"""Training in a pipeline: what is printed, where the state lies, and moving it to another mesh."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from t5x_lite import losses, optim, schedules
from t5x_lite.checkpoint import Checkpointer
from t5x_lite.data.objectives import CausalLM
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.describe import describe
from t5x_lite.train.state import (
    TrainState,
    from_tree,
    state_shardings,
    stored_shapes,
    to_tree,
)
from t5x_lite.train.step import make_train_step, model_apply

RATE = schedules.constant(1e-2)
# As in test_step.py: a small epsilon would blow up rounding where gradients are zero but for it.
ADAMW = optim.AdamW(RATE, epsilon=1e-5)
ADAFACTOR = optim.Adafactor(RATE, min_factored=4, epsilon=1e-10)


def on(table, microbatches=None, **axes):
    devices = jax.devices()[: np.prod([1, *axes.values()])]
    return Sharding(MeshConfig(**{"fsdp": 1, **axes}).build(devices), table, microbatches)


PIPED = on("fsdp_pp", 2, stage=2, fsdp=2)


def numbered(config, optimizer, where) -> TrainState:
    """A state without any two numbers alike, on its mesh."""
    shapes, shardings = state_shardings(config, optimizer, where)
    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    values = [
        np.arange(end - leaf.size, end).reshape(leaf.shape).astype(leaf.dtype)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return jax.device_put(tree.unflatten(values), shardings)


def step_of(config, where, microbatches=1):
    transform = ADAMW.build(parameters.abstract(config)[1])
    step = make_train_step(
        model_apply(config, where), losses.CrossEntropy(), transform, RATE, microbatches,
        sharding=where,
    )  # fmt: skip
    return jax.jit(step, out_shardings=(state_shardings(config, ADAMW, where)[1], None))


def test_a_step_of_microbatches_in_microbatches(tiny, initial, batch_of):
    config = tiny("gpt2")
    results = []
    for where, microbatches in ((on("dp"), 1), (PIPED, 2)):
        shapes, shardings = state_shardings(config, ADAMW, where)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        state = jax.device_put(zeros.replace(params=initial(config)), shardings)
        batch = {
            name: jax.device_put(value, where.batch(value.shape, name))
            for name, value in batch_of(config).items()
        }
        results.append(step_of(config, where, microbatches)(state, batch, jax.random.key(0)))
    (one, metrics), (piped, piped_metrics) = results
    np.testing.assert_allclose(piped_metrics["loss"], metrics["loss"], rtol=1e-6)
    for own, other in zip(jax.tree.leaves(piped), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)
    assert_layers_lie_on_stages(piped)


def assert_layers_lie_on_stages(state):
    """Of two layers on two stages, parameters and optimizer state."""
    layers = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "/layers/" in optim.path_name(path) and leaf.size > 2  # 2: Adafactor's placeholders
    ]
    assert len(layers) >= 2 * 12  # parameters of a GPT-2 layer, and more
    place = {device.id: int(at[-1]) for at, device in np.ndenumerate(PIPED.mesh.devices)}
    for leaf in layers:
        for shard in leaf.addressable_shards:
            stage = place[shard.device.id]
            assert shard.index[0] == slice(stage, stage + 1, None)


@pytest.mark.parametrize(
    ("optimizer", "first", "second"),
    [(ADAMW, PIPED, on("dp")), (ADAFACTOR, on("fsdp", fsdp=2), PIPED)],
    ids=["out", "in"],
)
def test_checkpoints_go_into_pipelines_and_out(tiny, tmp_path, optimizer, first, second):
    config = tiny("gpt2")
    state = numbered(config, optimizer, first)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, to_tree(state), {})
        checkpoints.wait()
        tree = checkpoints.restore(stored_shapes(config, optimizer, second)).tree
    shapes, shardings = state_shardings(config, optimizer, second)
    restored = from_tree(tree, shapes)
    for own, where, leaf in zip(
        jax.tree.leaves(restored), jax.tree.leaves(shardings), jax.tree.leaves(state), strict=True
    ):
        np.testing.assert_array_equal(own, leaf)
        assert own.sharding.is_equivalent_to(where, own.ndim)
    assert_layers_lie_on_stages(restored if second is PIPED else state)


def dry_run(**change):
    task = Task("none", JsonLines("nowhere.jsonl"), Bytes(), CausalLM(), "nowhere", 0.2)
    run = {"task": task, "optimizer": ADAMW, "batch_size": 64, "length": 128, "rules": "fsdp_pp"}
    run |= {"mesh": MeshConfig(fsdp=4, stage=4)} | change
    file = io.StringIO()
    describe(gpt2("small"), **run, console=Console(file=file, width=200))
    return file.getvalue()


def test_a_dry_run_says_how_a_batch_passes():
    said = dry_run(pipeline_microbatches=16)
    assert "pipeline of 4 stages × 3 layers, 16 microbatches, bubble 16%" in said


def test_what_does_not_fit_is_refused_at_start():
    with pytest.raises(UserError, match=r"^16 rows .* into 8 pipeline microbatches on 4"):
        dry_run(microbatches=4, pipeline_microbatches=8)
    with pytest.raises(UserError, match=r"^12 layers don't divide by stage=8; try stage=6 or 16"):
        dry_run(mesh=MeshConfig(fsdp=1, stage=8))
