"""config.json of Mixtral and DeepSeek as they were published; what is ignored and what refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5x_lite.errors import UserError
from t5x_lite.hub.families import read_config, without_training, write_config
from t5x_lite.nn.presets.deepseek import deepseek_v2, deepseek_v3
from t5x_lite.nn.presets.mixtral import mixtral

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MIXTRAL_8X22B = {
    **MIXTRAL_8X7B, "hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48,
    "num_hidden_layers": 56, "max_position_embeddings": 65536, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
DEEPSEEK_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60,
    "num_key_value_heads": 128, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": _YARN, "rope_theta": 10000,
    "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 3, "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1,
    "topk_method": "greedy",
}  # fmt: skip
DEEPSEEK_V3 = {
    **DEEPSEEK_V2, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "bos_token_id": 0, "eos_token_id": 1,
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
    "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
PUBLISHED = {
    "mixtral 8x7b": (MIXTRAL_8X7B, mixtral("8x7b")),
    "mixtral 8x22b": (MIXTRAL_8X22B, mixtral("8x22b")),
    "deepseek v2": (DEEPSEEK_V2, deepseek_v2("236b")),
    "deepseek v2 lite": (DEEPSEEK_V2_LITE, deepseek_v2("lite")),
    "deepseek v3": (DEEPSEEK_V3, deepseek_v3("671b")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(name):
    config, preset = PUBLISHED[name]
    assert read_config(config) == preset
    written = write_config(preset)
    assert written["model_type"] == config["model_type"]
    assert without_training(read_config(written)) == without_training(preset)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (MIXTRAL_8X7B, {"hidden_act": "gelu"}),
        (DEEPSEEK_V2, {"scoring_func": "sigmoid"}),
        (DEEPSEEK_V2, {"norm_topk_prob": True}),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}),
        (DEEPSEEK_V2, {"num_key_value_heads": 8}),
        (DEEPSEEK_V2, {"moe_layer_freq": 2}),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}),
        (DEEPSEEK_V3, {"rope_interleave": False}),
        (DEEPSEEK_V3, {"quantization_config": {"quant_method": "fp8"}}),
        (DEEPSEEK_V3, {"rope_scaling": {**_YARN, "beta_middle": 3}}),
        (DEEPSEEK_V3, {"rope_scaling": {"type": "yarn", "factor": 40}}),
    ],
)
def test_what_is_computed_otherwise_is_refused(config, field):
    (name,) = field
    with pytest.raises(UserError, match=name if name != "rope_scaling" else "'yarn'"):
        read_config({**config, **field})


def test_layers_after_the_last_are_left_out_and_others_are_not(ours, tmp_path):
    golden = pathlib.Path(__file__).with_name("golden") / "deepseek-v3"
    shutil.copyfile(golden / "config.json", tmp_path / "config.json")
    layers = json.loads((golden / "config.json").read_text())["num_hidden_layers"]
    tensors = load_file(golden / "model.safetensors")
    extra = {f"model.layers.{layers}.eh_proj.weight": np.ones((2, 3), np.float32)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    model, params, family = ours.load(tmp_path)
    assert set(ours.exported(model, params, family)) == set(tensors)
    within = {f"model.layers.{layers - 1}.eh_proj.weight": np.ones((2, 3), np.float32)}
    save_file({**tensors, **within}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model.layers.{layers - 1}.eh_proj"):
        ours.load(tmp_path)
