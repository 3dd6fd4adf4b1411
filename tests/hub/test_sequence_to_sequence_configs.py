"""config.json of T5's heirs, BART and Marian in their published form, and what is refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5x_lite.errors import UserError
from t5x_lite.hub.families import read_config, without_training, write_config
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.presets.bart import bart
from t5x_lite.nn.presets.t5 import byt5, flan_t5, mt5, umt5
from t5x_lite.nn.presets.transformer import transformer

GOLDEN = pathlib.Path(__file__).with_name("golden")
T5 = {
    "d_kv": 64, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
FLAN_T5_SMALL = {
    **T5, "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 1024,
    "d_model": 512, "n_positions": 512, "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8,
    "output_past": True, "relative_attention_max_distance": 128, "task_specific_params": {},
    "vocab_size": 32128,
}  # fmt: skip
BYT5_SMALL = {
    **T5, "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 3584,
    "d_model": 1472, "gradient_checkpointing": False, "num_decoder_layers": 4, "num_heads": 6,
    "num_layers": 12, "tokenizer_class": "ByT5Tokenizer", "vocab_size": 384,
}  # fmt: skip
MT5_SMALL = {
    **T5, "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", "d_ff": 1024,
    "d_model": 512, "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8,
    "tokenizer_class": "T5Tokenizer", "vocab_size": 250112,
}  # fmt: skip
UMT5_SMALL = {
    **T5, "architectures": ["UMT5ForConditionalGeneration"], "model_type": "umt5", "d_ff": 1024,
    "classifier_dropout": 0.0, "d_model": 512, "dense_act_fn": "gelu_new", "is_gated_act": True,
    "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "output_past": True,
    "relative_attention_max_distance": 128, "scalable_attention": True,
    "tokenizer_class": "T5Tokenizer", "vocab_size": 256384,
}  # fmt: skip
FAIRSEQ = {
    "activation_dropout": 0.0, "add_bias_logits": False, "add_final_layer_norm": False,
    "attention_dropout": 0.0, "bos_token_id": 0, "classif_dropout": 0.0,
    "decoder_layerdrop": 0.0, "dropout": 0.1, "encoder_layerdrop": 0.0,
    "gradient_checkpointing": False, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
    "init_std": 0.02, "is_encoder_decoder": True, "normalize_before": False, "num_beams": 4,
}  # fmt: skip
BART_LARGE = {
    **FAIRSEQ, "architectures": ["BartForConditionalGeneration"], "model_type": "bart",
    "activation_function": "gelu", "d_model": 1024, "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096, "decoder_layers": 12, "decoder_start_token_id": 2,
    "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "encoder_layers": 12,
    "eos_token_id": 2, "forced_eos_token_id": 2, "max_position_embeddings": 1024,
    "normalize_embedding": True, "num_hidden_layers": 12, "pad_token_id": 1,
    "scale_embedding": False, "task_specific_params": {}, "vocab_size": 50265,
}  # fmt: skip
OPUS_MT = {
    **FAIRSEQ, "architectures": ["MarianMTModel"], "model_type": "marian",
    "activation_function": "swish", "bad_words_ids": [[58100]], "d_model": 512,
    "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layers": 6,
    "decoder_start_token_id": 58100, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
    "encoder_layers": 6, "eos_token_id": 0, "max_length": 512, "max_position_embeddings": 512,
    "normalize_embedding": False, "num_hidden_layers": 6, "pad_token_id": 58100,
    "scale_embedding": True, "static_position_embeddings": True, "vocab_size": 58101,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (FLAN_T5_SMALL, flan_t5("small")),
        (BYT5_SMALL, byt5("small")),
        (MT5_SMALL, mt5("small")),
        (UMT5_SMALL, umt5("small")),
        (BART_LARGE, bart("large")),
        ({**BART_LARGE, "architectures": ["BartModel"]}, bart("large", head=LMHead(tied=True))),
    ],
    ids=["flan-t5", "byt5", "mt5", "umt5", "bart", "bare bart"],
)
def test_a_published_config_is_its_preset(config, model):
    assert without_training(read_config(config)) == without_training(model)
    assert without_training(read_config(write_config(model))) == without_training(model)


def test_marian_is_the_transformer_of_2017_with_more_biases():
    model, paper = read_config(OPUS_MT), transformer("base", vocab_size=58_101)
    assert model.encoder.positions == paper.encoder.positions
    assert model.decoder.block.residual.norm == paper.decoder.block.residual.norm
    assert model.embedder == paper.embedder
    ours, theirs = model.encoder.block.attention, paper.encoder.block.attention
    assert (ours.bias, ours.out_bias, theirs.bias, theirs.out_bias) == (True, True, False, False)
    assert without_training(read_config(write_config(model))) == without_training(model)
    with pytest.raises(UserError, match="no family of"):
        write_config(paper)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (BART_LARGE, {"normalize_before": True}, "normalize_before=True"),
        (BART_LARGE, {"num_hidden_layers": 6}, "num_hidden_layers=6"),
        (BART_LARGE, {"activation_function": "quick_gelu"}, "quick_gelu"),
        (BART_LARGE, {"architectures": ["BartForCausalLM"]}, "BartForCausalLM is unknown"),
        (OPUS_MT, {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        (OPUS_MT, {"decoder_vocab_size": 99}, "decoder_vocab_size=99"),
        (OPUS_MT, {"normalize_embedding": True}, "normalize_embedding=True"),
        (MT5_SMALL, {"feed_forward_proj": "gated-swish"}, "gated-swish"),
        (MT5_SMALL, {"scale_decoder_outputs": True}, "scale_decoder_outputs=True"),
    ],
)
def test_what_would_compute_something_else_is_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        read_config({**config, **change})


def test_sines_that_an_older_marian_stores_are_left_out(ours, tmp_path):
    folder = GOLDEN / "marian"
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    width = json.loads((folder / "config.json").read_text())["d_model"]
    sines = {f"model.{stack}.embed_positions.weight": np.zeros((80, width), np.float32)
             for stack in ("encoder", "decoder")}  # fmt: skip
    save_file({**tensors, **sines}, tmp_path / "model.safetensors")
    model, params, family = ours.load(tmp_path)
    assert set(ours.exported(model, params, family)) == set(tensors)
