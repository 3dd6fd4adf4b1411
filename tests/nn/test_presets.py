"""Published sizes: exact parameter counts, and shardings for every parameter."""

import dataclasses
import math

import jax
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.bert import SIZES as BERT_SIZES
from t5x_lite.nn.presets.bert import bert, bert_encoder
from t5x_lite.nn.presets.gpt2 import SIZES as GPT2_SIZES
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import SIZES as LLAMA_SIZES
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.t5 import SIZES_1_0, SIZES_1_1, t5_1_0, t5_1_1
from t5x_lite.partitioning import RULES, MeshConfig, Sharding

# What Hugging Face transformers 5.23 counts on torch's meta device with the published settings
# (T5ForConditionalGeneration, BertForMaskedLM, BertModel, GPT2LMHeadModel, LlamaForCausalLM), tied
# parameters once. T5 1.1's head is its own, as in its checkpoints.
COUNTS = {
    t5_1_0: {
        "small": 60_506_624,
        "base": 222_903_552,
        "large": 737_668_096,
        "3b": 2_851_598_336,
        "11b": 11_307_321_344,
    },
    t5_1_1: {
        "small": 76_961_152,
        "base": 247_577_856,
        "large": 783_150_080,
        "xl": 2_849_757_184,
        "xxl": 11_135_332_352,
    },
    bert: {"base": 109_514_298, "large": 335_174_458},
    bert_encoder: {"base": 109_482_240, "large": 335_141_888},
    gpt2: {
        "small": 124_439_808,
        "medium": 354_823_168,
        "large": 774_030_080,
        "xl": 1_557_611_200,
    },
    llama: {
        "7b": 6_738_415_616,
        "13b": 13_015_864_320,
        "70b": 68_976_648_192,
        "3-8b": 8_030_261_248,
        "3-70b": 70_553_706_496,
        "3.1-8b": 8_030_261_248,
        "3.1-70b": 70_553_706_496,
        "3.1-405b": 405_853_388_800,
        "3.2-1b": 1_235_814_400,
        "3.2-3b": 3_212_749_824,
    },
}
TABLES = {
    t5_1_0: SIZES_1_0, t5_1_1: SIZES_1_1, bert: BERT_SIZES, bert_encoder: BERT_SIZES,
    gpt2: GPT2_SIZES, llama: LLAMA_SIZES,
}  # fmt: skip
PUBLISHED = [(preset, size) for preset, sizes in COUNTS.items() for size in sizes]


def test_every_published_size_is_counted_here():
    for preset, table in TABLES.items():
        assert {*COUNTS[preset], "tiny"} == set(table), preset


@pytest.mark.parametrize(("preset", "size"), PUBLISHED)
def test_published_parameter_counts(preset, size):
    assert parameters.count(preset(size)) == COUNTS[preset][size]


@pytest.mark.parametrize(("preset", "size"), [(gpt2, "small"), (bert, "base"), (t5_1_1, "small")])
def test_unrolled_models_count_the_same(preset, size):
    assert parameters.count(preset(size, scan=False)) == COUNTS[preset][size]


PARTS = {"dp": 1, "fsdp": 2, "tp": 4, "fsdp_tp": 8}


@pytest.mark.parametrize("table", RULES)
@pytest.mark.parametrize(
    "config", [t5_1_1("xxl"), bert("large"), gpt2("large"), llama("70b")], ids=lambda c: c.kind
)
def test_a_device_holds_its_part_of_a_large_model(config, table):
    sharding = Sharding(MeshConfig(fsdp=2, tensor=4).build(), table)
    shapes, axes = parameters.abstract(config)
    names = jax.tree.leaves(axes, is_leaf=parameters.is_axes)
    whole = held = 0
    for leaf, name in zip(jax.tree.leaves(shapes), names, strict=True):
        whole += leaf.size
        held += math.prod(sharding.named(name, leaf.shape).shard_shape(leaf.shape))
    assert held * PARTS[table] == pytest.approx(whole, rel=0.02)  # norms and biases are whole


def test_heads_that_the_mesh_does_not_divide_are_refused():
    # GPT-2 XL has 25 heads.
    shapes, axes = parameters.abstract(gpt2("xl"))
    sharding = Sharding(MeshConfig(tensor=2).build(), "tp")
    kernel = shapes["decoder"]["layers"]["attention"]["query"]["kernel"]
    names = axes["decoder"]["layers"]["attention"]["query"]["kernel"]
    with pytest.raises(UserError, match=r"heads=25 doesn't divide by the 2 parts"):
        sharding.spec(names, kernel.shape)


@pytest.mark.parametrize("preset", COUNTS)
def test_unknown_sizes_and_shapes_name_what_there_is(preset):
    with pytest.raises(UserError, match=r"has no size 'huge'; there are tiny, "):
        preset("huge")
    with pytest.raises(UserError, match=r"has no 'depth'; its shape is width, layers"):
        preset("tiny", depth=3)


def test_an_entry_of_the_shape_can_be_replaced():
    assert llama("7b", layers=16).decoder.layers == 16
    assert dataclasses.replace(gpt2(), scan=False) == gpt2("small", scan=False)
    with pytest.raises(UserError, match=r"width=100 must be a multiple of heads=12"):
        gpt2("small", width=100)
