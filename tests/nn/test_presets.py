"""Published sizes: exact parameter counts, and shardings for every parameter."""

import dataclasses
import math

import jax
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.albert import SIZES as ALBERT_SIZES
from t5x_lite.nn.presets.albert import albert, albert_encoder
from t5x_lite.nn.presets.bart import SIZES as BART_SIZES
from t5x_lite.nn.presets.bart import bart
from t5x_lite.nn.presets.bert import SIZES as BERT_SIZES
from t5x_lite.nn.presets.bert import bert, bert_encoder
from t5x_lite.nn.presets.deepseek import SIZES_V2, SIZES_V3, deepseek_v2, deepseek_v3
from t5x_lite.nn.presets.distilbert import SIZES as DISTILBERT_SIZES
from t5x_lite.nn.presets.distilbert import distilbert, distilbert_encoder
from t5x_lite.nn.presets.gemma2 import SIZES as GEMMA2_SIZES
from t5x_lite.nn.presets.gemma2 import gemma2
from t5x_lite.nn.presets.gemma3 import SIZES as GEMMA3_SIZES
from t5x_lite.nn.presets.gemma3 import gemma3
from t5x_lite.nn.presets.gpt2 import SIZES as GPT2_SIZES
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.gpt3 import SIZES as GPT3_SIZES
from t5x_lite.nn.presets.gpt3 import gpt3
from t5x_lite.nn.presets.llama import SIZES as LLAMA_SIZES
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.mixtral import SIZES as MIXTRAL_SIZES
from t5x_lite.nn.presets.mixtral import mixtral
from t5x_lite.nn.presets.mobilebert import SIZES as MOBILEBERT_SIZES
from t5x_lite.nn.presets.mobilebert import mobilebert, mobilebert_encoder
from t5x_lite.nn.presets.modernbert import SIZES as MODERNBERT_SIZES
from t5x_lite.nn.presets.modernbert import modernbert, modernbert_encoder
from t5x_lite.nn.presets.phi3 import SIZES as PHI3_SIZES
from t5x_lite.nn.presets.phi3 import phi3
from t5x_lite.nn.presets.qwen3 import SIZES as QWEN3_SIZES
from t5x_lite.nn.presets.qwen3 import qwen3
from t5x_lite.nn.presets.roberta import SIZES as ROBERTA_SIZES
from t5x_lite.nn.presets.roberta import roberta, roberta_encoder
from t5x_lite.nn.presets.t5 import (
    BYT5_SIZES,
    MT5_SIZES,
    SIZES_1_0,
    SIZES_1_1,
    UMT5_SIZES,
    byt5,
    flan_t5,
    mt5,
    t5_1_0,
    t5_1_1,
    umt5,
)
from t5x_lite.nn.presets.tinybert import SIZES as TINYBERT_SIZES
from t5x_lite.nn.presets.tinybert import tinybert, tinybert_encoder
from t5x_lite.nn.presets.transformer import SIZES as TRANSFORMER_SIZES
from t5x_lite.nn.presets.transformer import transformer
from t5x_lite.partitioning import MeshConfig, Sharding

# What Hugging Face transformers 5.23 counts on torch's meta device with the published settings
# (T5ForConditionalGeneration, BertForMaskedLM, BertModel, GPT2LMHeadModel, and of later decoders
# their ForCausalLM), tied parameters once. Heads of T5 1.1 and its heirs are their own, as in their
# checkpoints. GPT-3 has no reference: those are what its table's shapes give here.
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
    mt5: {
        "small": 300_176_768,
        "base": 582_401_280,
        "large": 1_229_581_312,
        "xl": 3_742_619_648,
        "xxl": 12_921_057_280,
    },
    byt5: {
        "small": 299_637_760,
        "base": 581_653_248,
        "large": 1_228_183_552,
        "xl": 3_737_801_728,
        "xxl": 12_906_899_328,
    },
    umt5: {
        "small": 306_601_984,
        "base": 592_043_520,
        "xl": 3_768_356_864,
        "xxl": 12_972_531_712,
    },
    bart: {"base": 139_420_416, "large": 406_291_456},
    # As computed; the paper's table 3 rounds to 65 and 213 million and doesn't say what it counts.
    transformer: {"base": 63_045_632, "big": 214_171_648},
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
    deepseek_v2: {"lite": 15_706_484_224, "236b": 235_741_434_880},
    deepseek_v3: {"671b": 671_026_404_352},
    mixtral: {"8x7b": 46_702_792_704, "8x22b": 140_620_634_112},
    qwen3: {
        "0.6b": 596_049_920,
        "1.7b": 1_720_574_976,
        "4b": 4_022_468_096,
        "8b": 8_190_735_360,
        "14b": 14_768_307_200,
        "32b": 32_762_123_264,
    },
    roberta: {"base": 124_697_433, "large": 355_412_057},
    roberta_encoder: {"base": 124_645_632, "large": 355_359_744},
    gemma2: {
        "2b": 2_614_341_888,
        "9b": 9_241_705_984,
        "27b": 27_227_128_320,
    },
    distilbert: {"base": 66_985_530},
    distilbert_encoder: {"base": 66_362_880},
    tinybert: {"4-312": 14_381_394, "6-768": 66_987_066},
    tinybert_encoder: {"4-312": 14_350_248, "6-768": 66_955_008},
    albert: {
        "base": 11_221_680,
        "large": 16_795_824,
        "xlarge": 54_821_040,
        "xxlarge": 206_368_944,
    },
    albert_encoder: {
        "base": 11_683_584,
        "large": 17_683_968,
        "xlarge": 58_724_864,
        "xxlarge": 222_595_584,
    },
    gemma3: {
        "270m": 268_098_176,
        "1b": 999_885_952,
        "4b": 3_880_263_168,
        "12b": 11_766_034_176,
        "27b": 27_009_346_304,
    },
    phi3: {
        "mini-4k": 3_821_079_552,
        "mini-128k": 3_821_079_552,
    },
    gpt3: {
        "125m": 125_226_240,
        "350m": 355_871_744,
        "760m": 760_300_032,
        "1.3b": 1_517_123_584,
        "2.7b": 2_651_553_280,
        "6.7b": 6_658_404_352,
        "13b": 12_936_488_380,
        "175b": 174_604_259_328,
    },
    modernbert: {"base": 149_655_232, "large": 395_881_664},
    modernbert_encoder: {"base": 149_014_272, "large": 394_781_696},
    mobilebert: {"base": 36_596_538},
    mobilebert_encoder: {"base": 24_581_888},  # classifier_activation is false
}
TABLES = {
    t5_1_0: SIZES_1_0, t5_1_1: SIZES_1_1, bert: BERT_SIZES, bert_encoder: BERT_SIZES,
    gpt2: GPT2_SIZES, llama: LLAMA_SIZES,
    mixtral: MIXTRAL_SIZES, deepseek_v2: SIZES_V2, deepseek_v3: SIZES_V3,
    qwen3: QWEN3_SIZES,
    roberta: ROBERTA_SIZES, roberta_encoder: ROBERTA_SIZES,
    gemma2: GEMMA2_SIZES,
    distilbert: DISTILBERT_SIZES, distilbert_encoder: DISTILBERT_SIZES,
    tinybert: TINYBERT_SIZES, tinybert_encoder: TINYBERT_SIZES,
    albert: ALBERT_SIZES, albert_encoder: ALBERT_SIZES,
    gemma3: GEMMA3_SIZES,
    phi3: PHI3_SIZES,
    gpt3: GPT3_SIZES,
    modernbert: MODERNBERT_SIZES, modernbert_encoder: MODERNBERT_SIZES,
    mobilebert: MOBILEBERT_SIZES, mobilebert_encoder: MOBILEBERT_SIZES,
}  # fmt: skip
COUNTS[flan_t5] = COUNTS[t5_1_1]
TABLES |= {flan_t5: SIZES_1_1, mt5: MT5_SIZES, byt5: BYT5_SIZES, umt5: UMT5_SIZES}
TABLES |= {bart: BART_SIZES, transformer: TRANSFORMER_SIZES}
PUBLISHED = [(preset, size) for preset, sizes in COUNTS.items() for size in sizes]


def test_every_published_size_is_counted_here():
    for preset, table in TABLES.items():
        assert {*COUNTS[preset], "tiny"} == set(table), preset


@pytest.mark.parametrize(("preset", "size"), PUBLISHED)
def test_published_parameter_counts(preset, size):
    model = preset(size)
    assert parameters.count(model) == COUNTS[preset][size]
    shapes, _ = parameters.abstract(model)
    table = (model.physical_vocab, getattr(model.embedder, "width", None) or model.width)
    assert table in {leaf.shape for leaf in jax.tree.leaves(shapes)}


@pytest.mark.parametrize(("preset", "size"), [(gpt2, "small"), (bert, "base"), (t5_1_1, "small")])
def test_unrolled_models_count_the_same(preset, size):
    assert parameters.count(preset(size, scan=False)) == COUNTS[preset][size]


PARTS = {"dp": 1, "fsdp": 2, "tp": 4, "fsdp_tp": 8}


@pytest.mark.parametrize("table", PARTS)
@pytest.mark.parametrize(
    "config", [t5_1_1("xxl"), bert("large"), gpt2("large"), llama("70b")], ids=lambda c: c.kind
)
def test_a_device_holds_its_part_of_a_large_model(config, table):
    mesh = MeshConfig(fsdp=2, tensor=4) if "tp" in table else MeshConfig(replica=4, fsdp=2)
    sharding = Sharding(mesh.build(), table)
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
