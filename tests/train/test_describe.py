"""The parameter table: published counts, from shapes alone."""

import io
import time

import jax
import pytest
from rich.console import Console

from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.t5 import t5_1_0, t5_1_1
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.describe import describe


def table(*args):
    file = io.StringIO()
    describe(*args, console=Console(file=file, width=160))
    return file.getvalue().splitlines()


def test_t5_1_1_small_at_once_and_without_memory():
    arrays, began = len(jax.live_arrays()), time.process_time()
    lines = table(t5_1_1("small"))
    assert time.process_time() - began < 2
    assert len(jax.live_arrays()) == arrays
    assert lines[-1] == "total parameters: 76,961,152"
    # The table adds up, and shows each name once.
    counts = [int(line.split()[-1].replace(",", "")) for line in lines[1:-1]]
    assert sum(counts) == 76_961_152
    names = [line.split()[0] for line in lines[1:-1]]
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


def test_split_over_a_mesh():
    sharding = Sharding(MeshConfig(fsdp=4, tensor=2).build(), "fsdp_tp")
    lines = table(llama("7b"), sharding)
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert found["decoder/layers/attention/query/kernel"] == (
        "32 × 4096 × 32 × 128 layers embed heads head_dim - fsdp tensor - 536,870,912"
    )
    assert found["decoder/final_norm/scale"] == "4096 norm - 4,096"
