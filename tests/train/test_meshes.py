"""The law of all meshes: whatever is split over whichever devices, a run stays the same.

Five steps with dropout on, on eight emulated devices and on one. Losses agree to 1e-5 relative and
not to the bit, because sums over rows, tokens, heads or units are added up in parts, in another
order, and float32's sums depend on it: gradients of a batch (every table), the products over heads
and units (tp), the softmax of a row (sp). What isn't a sum, such as dropout's masks, is the same to
the bit: keys depend on the row and the layer, never on the device.
"""

import functools
import re

import jax
import numpy as np
import pytest

from t5x_lite import losses, optim, schedules
from t5x_lite.nn import parameters
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.layout import check_layout
from t5x_lite.train.state import state_shardings
from t5x_lite.train.step import make_train_step, model_apply

STEPS, LENGTH = 5, 8
RATE = schedules.constant(1e-2)
# As in test_step.py: a small epsilon would blow up rounding where gradients are zero but for it.
OPTIMIZERS = {
    "adamw": optim.AdamW(RATE, epsilon=1e-5),
    "adafactor": optim.Adafactor(RATE, min_factored=4, epsilon=1e-10, weight_decay=0.1),
}
LOSS = losses.CrossEntropy(z_loss=1e-3)
MESHES = {
    "dp": {"replica": 2, "fsdp": 4},
    "fsdp": {},
    "tp": {"tensor": 2},
    "ep": {"expert": 4},
    "sp": {"sequence": 2},
    "pp": {"stage": 2},
}
PRODUCTS = {
    "fsdp_tp": {"tensor": 2, "replica": 2},
    "fsdp_sp": {"sequence": 2},
    "fsdp_ep": {"expert": 2},
    "ep_tp": {"expert": 2, "tensor": 2},
    "tp_sp": {"tensor": 2, "sequence": 2},
    "fsdp_tp_sp": {"tensor": 2, "sequence": 2},
    "fsdp_pp": {"stage": 2},
    "tp_pp": {"tensor": 2, "stage": 2},
    "sp_pp": {"sequence": 2, "stage": 2},
    "ep_pp": {"expert": 2, "stage": 2},
    "fsdp_ep_tp": {"expert": 2, "tensor": 2},
    "fsdp_ep_tp_sp": {"expert": 2, "tensor": 2, "sequence": 2},
    "fsdp_tp_pp": {"tensor": 2, "stage": 2},
    "fsdp_ep_tp_pp": {"expert": 2, "tensor": 2, "stage": 2},
    "fsdp_tp_sp_pp": {"tensor": 2, "sequence": 2, "stage": 2},
}
TABLES = MESHES | PRODUCTS
FAMILIES = ("t5", "bert", "gpt2", "mixtral")
SIX = {
    "t5": ("fsdp_tp", "fsdp_sp", "fsdp_ep", "ep_tp", "tp_sp", "fsdp_tp_sp"),
    "gpt2": ("fsdp_tp", "fsdp_sp", "fsdp_pp", "tp_pp", "tp_sp", "fsdp_tp_pp"),
}
ALWAYS = [(family, table) for family in FAMILIES for table in MESHES]
ALWAYS += [(family, table) for family, tables in SIX.items() for table in tables]
# An encoder-decoder is no pipeline, and is refused as one: see test_layout.py.
ALWAYS.remove(("t5", "pp"))
GRID = [
    pytest.param(family, table, marks=pytest.mark.grid)
    for family in (*FAMILIES, "llama")
    for table in TABLES
    if (family, table) not in ALWAYS and not (family == "t5" and "pp" in table.split("_"))
]


@pytest.fixture(scope="module")
def run(tiny, initial, batch_of):
    """`run(family, table)`: (losses, final state) of five steps; on one device without a table."""

    @functools.cache
    def of(family, table=None, name="adamw"):
        config, optimizer = tiny(family), OPTIMIZERS[name]
        devices = jax.devices()[: None if table else 1]
        sharding = Sharding(MeshConfig(**TABLES.get(table, {})).build(devices), table or "dp")
        check_layout(config, sharding, 8, [LENGTH])
        shapes, shardings = state_shardings(config, optimizer, sharding)
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        state = jax.device_put(state.replace(params=initial(config)), shardings)
        step = make_train_step(
            model_apply(config, sharding), LOSS, optimizer.build(parameters.abstract(config)[1]),
            RATE, sharding=sharding,
        )  # fmt: skip
        step = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
        history = []
        for seed in range(STEPS):
            batch = batch_of(config, seed, LENGTH)
            batch = {n: jax.device_put(x, sharding.batch(x.shape, n)) for n, x in batch.items()}
            state, metrics = step(state, batch, jax.random.key(1))
            history.append(float(metrics["loss"]))
        return np.asarray(history), state

    return of


@pytest.mark.parametrize(("family", "table"), [*ALWAYS, *GRID])
def test_eight_devices_train_as_one_does(run, family, table):
    # One case has Adafactor, whose factors are split in their own way; test_step.py has all.
    name = "adafactor" if (family, table) == ("t5", "fsdp_tp") else "adamw"
    (one, _), (eight, state) = run(family, name=name), run(family, table, name)
    assert len(set(one)) == STEPS
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert_split(state, family, table, name)


def assert_split(state, family, table, name):
    """What each device really holds; a wrong logical name would leave a parameter whole."""
    mesh, parts = MeshConfig(**TABLES[table]).abstract(8).shape, table.split("_")

    def over(part, axis, size):
        return size // mesh[axis] if part in parts else size

    layers, width = over("pp", "stage", 2), over("fsdp", "fsdp", 32)
    units = over("tp", "tensor", 128 if family in ("bert", "gpt2") else 48)
    experts = [over("ep", "expert", 4)] * (family == "mixtral")
    up = "ffn/experts/up/kernel" if experts else "ffn/up/kernel"
    expected = {
        "attention/query/kernel": (layers, width, over("tp", "tensor", 4), 8),
        up: (layers, *experts, width, units),
        "embedder/embedding": (over("tp", "tensor", 104), width),
    }
    if name == "adafactor":
        expected |= {f"{up}/.*v_row": (layers, width), f"{up}/.*v_col": (layers, units)}
        heads = over("tp", "tensor", 4 * 8)  # 4 heads of 8: one axis, split by heads
        expected |= {"attention/query/kernel/.*v_row": (layers, width),
                     "attention/query/kernel/.*v_col": (layers, heads),
                     "attention/out/kernel/.*v_row": (layers, heads),
                     "attention/out/kernel/.*v_col": (layers, width)}  # fmt: skip
    held = {
        optim.path_name(path): {shard.data.shape for shard in leaf.addressable_shards}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    for ending, shape in expected.items():
        found = [shapes for path, shapes in held.items() if re.search(f"{ending}$", path)]
        moments = 3 if name == "adamw" else 1
        assert len(found) >= moments, ending
        assert all(shapes == {shape} for shapes in found), (ending, found)
