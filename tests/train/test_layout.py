"""Models and batches that a mesh doesn't divide are refused at start, with the arithmetic."""

import dataclasses

import jax
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn.presets.llama import llama
from t5x_lite.partitioning import MeshConfig, Rules, Sharding
from t5x_lite.train.layout import check_layout, mesh_lines


def sharding(table, devices=8, **axes):
    return Sharding(MeshConfig(**axes).abstract(devices), table)


@pytest.mark.parametrize(
    ("family", "table", "axes", "message"),
    [
        # Heads of queries divide, those of keys don't.
        ("llama", "tp", {"tensor": 4}, r"key/kernel: kv_heads=2 .* tensor=4, 2 / 4 = 0.5; try "
         r"tensor=2, or a kv_heads that is a multiple of 4"),
        ("gpt2", "tp", {"tensor": 8}, r"attention/.*: kv_heads=4 doesn't divide by tensor=8"),
        ("gpt2", "sp", {"sequence": 8, "fsdp": 1}, r"a row: length=12 .* sequence=8, 12 / 8 = 1.5; "
         "try sequence=4"),
        ("gpt2", "fsdp", {"fsdp": 12}, r"attention/.*: embed=32 doesn't divide by fsdp=12"),
        ("mixtral", "ep", {"expert": 8}, r"experts/.*: expert=4 .* expert=8, 4 / 8 = 0.5"),
        ("gpt2", "pp", {"stage": 4}, r"2 layers don't divide by stage=4; try stage=2"),
        ("t5", "pp", {"stage": 2}, "an encoder-decoder can't be pipelined"),
    ],
)  # fmt: skip
def test_what_the_mesh_does_not_divide(tiny, family, table, axes, message):
    size = MeshConfig(**axes).size
    with pytest.raises(UserError, match=message):
        check_layout(tiny(family), sharding(table, size or 8, **axes), 8, [12])


def test_unrolled_layers_have_no_stages(tiny):
    with pytest.raises(UserError, match="only scanned layers are divided among stages"):
        check_layout(tiny("gpt2", scan=False), sharding("pp", stage=2), 8, [12])


def test_rules_that_split_an_axis_by_two_mesh_axes(tiny):
    rules = Rules("fsdp_tp", {"vocab": ("tensor", "fsdp")})
    config = dataclasses.replace(tiny("gpt2"), vocab_multiple=4)  # 100 rows
    with pytest.raises(UserError, match=r"vocab=100 doesn't divide by tensor=2 × fsdp=4, 100 / 8"):
        check_layout(config, sharding(rules, tensor=2), 8, [12])


def test_what_fits_is_silent_and_a_pipeline_says_how_it_runs(tiny):
    for table, axes in (("fsdp_tp", {"tensor": 2}), ("sp", {"sequence": 4}), ("ep", {"expert": 4})):
        assert check_layout(tiny("mixtral"), sharding(table, **axes), 8, [12]) is None
    said = check_layout(tiny("gpt2"), sharding("pp", stage=2), 8, [12])
    assert said.startswith("pipeline of 2 stages × 1 layer")
    # A 70B model on a pod of 1,024: nothing is there but shapes.
    assert check_layout(llama("70b"), sharding("fsdp_tp", 1024, tensor=8), 1024, [4096]) is None


def test_what_is_said_of_a_mesh():
    mesh = MeshConfig(tensor=2, dcn_replica=2)
    built = Sharding(mesh.build(), Rules("fsdp_tp", {"labels": ("tensor",)}))
    assert list(mesh_lines(mesh, built)) == [
        "mesh replica=2 × fsdp=2 × tensor=2: 8 devices (cpu), rules fsdp_tp with labels: tensor",
        "  2 slices of 4 devices: mesh fsdp=-1 × tensor=2 × dcn_replica=2",
        "  replica=2 splits batch",
        "  fsdp=2 splits embed, latent, batch",
        "  tensor=2 splits vocab, heads, kv_heads, mlp, labels, act_heads, act_mlp, act_vocab",
    ]
    one = MeshConfig().build(jax.devices()[:1])
    assert (
        next(mesh_lines(MeshConfig(), Sharding(one))) == "mesh of one: 1 device (cpu), rules fsdp"
    )
