"""The parameter table: published counts, from shapes alone."""

import io
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from t5x_lite import losses, optim, schedules
from t5x_lite.data.objectives import CausalLM
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.t5 import t5_1_0, t5_1_1
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.activations import stored_bytes
from t5x_lite.train.describe import describe, print_parameters
from t5x_lite.train.state import state_shardings
from t5x_lite.train.step import model_apply


def table(config, **run):
    file = io.StringIO()
    describe(config, **run, console=Console(file=file, width=200))
    return file.getvalue().splitlines()


def test_t5_1_1_small_at_once_and_without_memory():
    arrays, began = len(jax.live_arrays()), time.process_time()
    lines = table(t5_1_1("small"))
    assert time.process_time() - began < 2
    assert len(jax.live_arrays()) == arrays
    assert lines[-1] == "total parameters: 76,961,152"
    # The table adds up, and shows each name once.
    lines = lines[1 : lines.index("mesh fsdp=8: 8 devices, rules fsdp")]
    counts = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert sum(counts) == 76_961_152
    names = [line.split()[0] for line in lines]
    assert len(set(names)) == len(names)
    assert "decoder/layers/attention/query/kernel" in names


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (t5_1_0("base"), "222,903,552"),
        (t5_1_1("xxl"), "11,135,332,352"),
        (bert("base"), "109,514,298"),  # 30,522 ids, of 30,592 physical rows
        (gpt2("small"), "124,439,808"),
        (llama("7b"), "6,738,415,616"),
        (llama("7b", scan=False), "6,738,415,616"),
    ],
)
def test_published_counts(config, total):
    assert table(config)[-1] == f"total parameters: {total}"


def flat(lines):
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.split()}


def test_split_over_a_mesh():
    sharding = Sharding(MeshConfig(fsdp=4, tensor=2).build(), "fsdp_tp")
    file = io.StringIO()
    print_parameters(llama("7b"), sharding, Console(file=file, width=200))
    found = flat(file.getvalue().splitlines())
    assert found["decoder/layers/attention/query/kernel"] == (
        "32 × 4096 × 32 × 128 layers embed heads head_dim - fsdp tensor - 268,435,456 536,870,912"
    )
    assert found["decoder/final_norm/scale"] == "4096 norm - 16,384 4,096"


RATE = schedules.constant(1e-3)


def run_of(config, **change):
    """The lines of a dry run of this model, on text that isn't there."""
    task = Task("none", JsonLines("nowhere.jsonl"), Bytes(), CausalLM(), "nowhere", 0.2)
    run = {"task": task, "optimizer": optim.AdamW(RATE), "batch_size": 64, "length": 128} | change
    return table(config, **run)


def test_a_pod_that_is_not_there_and_data_that_is_not_there():
    mesh = MeshConfig(fsdp=-1, tensor=8, dcn_replica=2)
    lines = run_of(
        llama("7b", dtype="bfloat16", remat="minimal"), mesh=mesh, rules="fsdp_tp", devices=256
    )
    assert "mesh replica=2 × fsdp=16 × tensor=8: 256 devices, rules fsdp_tp" in lines
    found = {line.strip().split("  ")[0]: line.split("  ") for line in lines}
    each = 6_738_415_616 * 4 / 16 / 8 / 2**20  # norms alone are whole
    size = {name: line[-1].split() for name, line in found.items()}
    assert {size[name][1] for name in ("parameters", "optimizer state", "gradients")} == {"MiB"}
    assert float(size["parameters"][0]) == pytest.approx(each, rel=0.006)
    assert float(size["optimizer state"][0]) == pytest.approx(2 * each, rel=0.006)
    assert size["gradients"] == size["parameters"]


def test_a_mesh_without_a_rest_needs_no_devices():
    lines = run_of(gpt2("small"), mesh=MeshConfig(fsdp=64), ema_decay=0.9)
    assert "mesh fsdp=64: 64 devices, rules fsdp" in lines
    assert "average" in flat(lines)
    # The number that is here matters only where an axis is -1.
    assert "mesh fsdp=8: 8 devices, rules fsdp" in run_of(gpt2("small"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 60}, "batch_size=60 doesn't divide"),
        ({"mesh": MeshConfig(tensor=8), "rules": "tp"}, "kv_heads=12 doesn't divide by tensor=8"),
        ({"mesh": MeshConfig(tensor=2)}, "mesh axis tensor=2 under rules 'fsdp'"),
        ({"mesh": MeshConfig(tensor=3), "devices": 8}, "mesh fsdp=-1 × tensor=3 asks for 3"),
        ({"length": 2000, "mesh": MeshConfig(sequence=64), "rules": "sp", "devices": 64},
         "length=2000 doesn't divide by sequence=64, 2000 / 64 = 31.25; try sequence=16"),
    ],
)  # fmt: skip
def test_what_a_run_would_refuse_a_dry_run_refuses(change, message):
    with pytest.raises(UserError, match=message):
        run_of(gpt2("small"), **change)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_bytes_of_a_device_are_what_a_device_holds(tiny, name):
    config = tiny("llama")
    optimizer = {
        "adamw": optim.AdamW(RATE), "adafactor": optim.Adafactor(RATE, min_factored=4)
    }[name]  # fmt: skip
    sharding = Sharding(MeshConfig(tensor=2).build(), "fsdp_tp")
    shapes, shardings = state_shardings(config, optimizer, sharding)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = jax.device_put(zeros, shardings)
    here = jax.devices()[3]

    def held(tree):
        shards = (s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == here)

    mesh = MeshConfig(tensor=2)
    found = flat(table(config, optimizer=optimizer, mesh=mesh, rules="fsdp_tp"))
    assert found["parameters"] == f"{held(state.params) / 1024:.1f} KiB"
    assert found["optimizer"] == f"state {held(state.opt_state) / 1024:.1f} KiB"
    # Factors are split as well: each is a part of what it would be, but for those of the norms.
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert held(state.opt_state) < 0.5 * whole


SHAPES = {
    name: ((8, 128), np.dtype(dtype))
    for name, dtype in (("tokens", "int32"), ("targets", "int32"), ("weights", "float32"))
}


def stored(remat="none", table="dp", microbatches=1, **axes):
    config = gpt2("tiny", width=128, layers=4, heads=4, vocab_size=256, dropout=0.1, remat=remat)
    sharding = Sharding(MeshConfig(**axes).abstract(8), table)
    return stored_bytes(config, losses.CrossEntropy(), SHAPES, sharding, microbatches)


def test_activations_are_divided_as_the_mesh_says():
    whole = stored(fsdp=8)
    assert stored(fsdp=8, remat="minimal") < whole / 3
    assert stored(fsdp=8, remat="full") < stored(fsdp=8, remat="minimal") / 3
    assert stored(fsdp=4, replica=2) == whole
    halves = stored(fsdp=4, tensor=2, table="tp")  # twice the rows, about half of each
    assert whole < halves < 1.5 * whole


def test_half_the_rows_keep_half_the_bytes():
    """Parameters, which the backward pass reads too, don't count; nor are four rows four heads."""
    mesh = {"table": "fsdp_tp", "fsdp": 2, "tensor": 4}
    assert 2 * stored(**mesh, microbatches=2) == stored(**mesh) > 0


def test_activations_are_what_a_compiled_step_needs(tiny):
    """Memory of the compiler's own for one device's rows: what is kept, and what it works with."""
    config = gpt2("tiny", width=128, layers=4, heads=4, vocab_size=256, dropout=0.1)
    params, apply = parameters.abstract(config)[0], model_apply(config)
    rows = {n: jax.ShapeDtypeStruct((1, *s[1:]), d) for n, (s, d) in SHAPES.items()}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

    def loss(params, rows, keys):
        return losses.CrossEntropy()(apply, params, None, rows, keys).terms["cross_entropy"]

    memory = jax.jit(jax.grad(loss)).lower(params, rows, keys).compile().memory_analysis()
    assert 0.7 < stored(fsdp=8) / memory.temp_size_in_bytes < 1.0
