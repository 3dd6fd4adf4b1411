"""config.json of Qwen 3, Gemma 2 and 3 and Phi-3 as they were published, and what is refused."""

import copy

import pytest

from t5x_lite.errors import UserError
from t5x_lite.hub.families import read_config, without_training, write_config
from t5x_lite.nn.positions import LinearRotary, LongRotary, Rotary
from t5x_lite.nn.presets.gemma2 import gemma2
from t5x_lite.nn.presets.gemma3 import gemma3
from t5x_lite.nn.presets.phi3 import SIZES, phi3
from t5x_lite.nn.presets.qwen3 import qwen3

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GEMMA2_27B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608, "initializer_range": 0.02, "intermediate_size": 36864,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
    "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0,
    "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
    "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 262144,
}  # fmt: skip
# The text_config of the larger ones leaves out what equals a default.
GEMMA3_4B = {
    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 34, "sliding_window": 1024,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
PHI3_4K = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1,
    "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
FACTORS = SIZES["mini-128k"]["positions"]
PHI3_128K = {
    **PHI3_4K, "max_position_embeddings": 131072, "sliding_window": 262144,
    "rope_scaling": {"long_factor": list(FACTORS.long), "short_factor": list(FACTORS.short),
                     "type": "longrope"},
}  # fmt: skip
PUBLISHED = [
    (QWEN3_8B, qwen3("8b")), (GEMMA2_27B, gemma2("27b")), (GEMMA3_1B, gemma3("1b")),
    (GEMMA3_4B, gemma3("4b")), (PHI3_4K, phi3("mini-4k")), (PHI3_128K, phi3("mini-128k")),
]  # fmt: skip


@pytest.mark.parametrize(("config", "preset"), PUBLISHED)
def test_a_published_config_is_its_preset_and_survives_export(config, preset):
    assert without_training(read_config(config)) == without_training(preset)
    written = write_config(preset)
    assert written["model_type"] == config["model_type"]
    assert without_training(read_config(written)) == without_training(preset)


SMALL3 = {**GEMMA3_1B, "num_hidden_layers": 7, "sliding_window_pattern": 3}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def test_layer_types_give_the_pattern_where_nothing_else_does():
    kinds = [LOCAL, LOCAL, GLOBAL] * 2 + [LOCAL]
    config = {k: v for k, v in SMALL3.items() if k != "sliding_window_pattern"}
    assert read_config({**config, "layer_types": kinds}) == read_config(SMALL3)
    assert read_config({**SMALL3, "layer_types": kinds}) == read_config(SMALL3)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": [LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL]},
        {"layer_types": [LOCAL, LOCAL, GLOBAL]},
        {"_sliding_window_pattern": 2},
    ],
)
def test_layers_that_are_not_the_pattern_are_refused(changes):
    with pytest.raises(UserError, match="doesn't compute"):
        read_config({**SMALL3, **changes})


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (QWEN3_8B, {"use_sliding_window": True}),
        (QWEN3_8B, {"layer_types": [LOCAL] * 36}),
        (GEMMA2_27B, {"use_bidirectional_attention": True}),
        (GEMMA2_27B, {"sliding_window_size": 2048}),
        (GEMMA2_27B, {"layer_types": [GLOBAL] * 46}),
        (GEMMA3_1B, {"hidden_activation": "silu"}),
        (PHI3_4K, {"partial_rotary_factor": 0.75}),
        (PHI3_4K, {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}),
        (PHI3_4K, {"rope_scaling": {"type": "linear"}}),
        (QWEN3_8B, {"rope_scaling": {"type": "llama3", "factor": 8.0}}),
        (GEMMA3_1B, {"rope_parameters": {"rope_theta": 5.0}}),
        (GEMMA3_1B, {"attention_kind": "new"}),
    ],
)
def test_what_is_not_computed_is_refused(config, changes):
    with pytest.raises(UserError):
        read_config({**config, **changes})


def test_a_cap_of_null_is_none_and_a_missing_one_the_default():
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    model = read_config({**GEMMA2_27B, **dict.fromkeys(caps)})
    assert (model.decoder.blocks[0].attention.soft_cap, model.head.soft_cap) == (None, None)
    model = read_config({k: v for k, v in GEMMA2_27B.items() if k not in caps})
    assert (model.decoder.blocks[0].attention.soft_cap, model.head.soft_cap) == (50.0, 30.0)


def test_rotations_of_both_versions_are_the_same():
    now = {k: v for k, v in GEMMA3_4B.items() if k != "rope_scaling"} | {
        "rope_parameters": {
            GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
        }
    }
    model = read_config(now)
    assert model == read_config(GEMMA3_4B)
    assert model.decoder.positions == LinearRotary(1_000_000.0, factor=8.0)
    assert model.decoder.blocks[0].attention.positions == Rotary(10_000.0)
    assert model.decoder.blocks[5].attention.positions is None


def test_the_length_beside_long_rotations_rules_over_the_one_among_them():
    config = copy.deepcopy(PHI3_128K)
    config["rope_scaling"] |= {"original_max_position_embeddings": 77, "type": "su"}
    positions = read_config(config).decoder.positions
    assert isinstance(positions, LongRotary)
    assert (positions.original_length, positions.factor) == (4096, 32.0)
    assert positions.amplitude == pytest.approx((1 + 5 / 12) ** 0.5)
