"""config.json of BERT's descendants, and what is refused.

The files' fields were written down from knowledge of them, not copied: no network here.
"""

import pytest

from t5x_lite.errors import UserError
from t5x_lite.hub.families import family_of, read_config, without_training, write_config
from t5x_lite.nn.presets.albert import SIZES as ALBERT_SIZES
from t5x_lite.nn.presets.albert import albert, albert_encoder, albert_pretraining
from t5x_lite.nn.presets.distilbert import distilbert, distilbert_encoder
from t5x_lite.nn.presets.mobilebert import mobilebert, mobilebert_encoder
from t5x_lite.nn.presets.modernbert import modernbert, modernbert_encoder
from t5x_lite.nn.presets.paired import paired
from t5x_lite.nn.presets.roberta import roberta, roberta_encoder
from t5x_lite.nn.presets.tinybert import tinybert, tinybert_encoder

BERT_FIELDS = {
    "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
    "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip
ROBERTA = {
    **BERT_FIELDS, "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2,
    "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514, "model_type": "roberta", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 50265,
}  # fmt: skip
DISTILBERT = {
    "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1,
    "dim": 768, "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02,
    "max_position_embeddings": 512, "model_type": "distilbert", "n_heads": 12, "n_layers": 6,
    "pad_token_id": 0, "qa_dropout": 0.1, "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522,
}  # fmt: skip
TINYBERT = {
    **BERT_FIELDS, "cell": {}, "model_type": "bert", "emb_size": 312, "hidden_act": "gelu",
    "hidden_size": 312, "intermediate_size": 1200, "num_attention_heads": 12,
    "num_hidden_layers": 4, "pre_trained": "", "structure": [], "vocab_size": 30522,
}  # fmt: skip
ALBERT = {
    **BERT_FIELDS, "architectures": ["AlbertForMaskedLM"], "attention_probs_dropout_prob": 0,
    "bos_token_id": 2, "classifier_dropout_prob": 0.1, "down_scale_factor": 1,
    "embedding_size": 128, "eos_token_id": 3, "gap_size": 0, "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0, "hidden_size": 4096, "inner_group_num": 1,
    "intermediate_size": 16384, "layer_norm_eps": 1e-12, "layers_to_keep": [],
    "model_type": "albert", "net_structure_type": 0, "num_attention_heads": 64,
    "num_hidden_groups": 1, "num_hidden_layers": 12, "num_memory_blocks": 0, "pad_token_id": 0,
    "vocab_size": 30000,
}  # fmt: skip
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False,
    "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281,
    "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0,
    "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 768,
    "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "intermediate_size": 1152,
    "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0,
    "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12,
    "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute",
    "sep_token_id": 50282, "tie_word_embeddings": True, "torch_dtype": "float32",
    "vocab_size": 50368,
}  # fmt: skip
MOBILEBERT = {
    **BERT_FIELDS, "classifier_activation": False, "embedding_size": 128, "hidden_act": "relu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 512, "intermediate_size": 512, "intra_bottleneck_size": 128,
    "key_query_shared_bottleneck": True, "layer_norm_eps": 1e-12, "model_type": "mobilebert",
    "normalization_type": "no_norm", "num_attention_heads": 4, "num_feedforward_networks": 4,
    "num_hidden_layers": 24, "pad_token_id": 0, "trigram_input": True, "true_hidden_size": 128,
    "use_bottleneck": True, "use_bottleneck_attention": False, "vocab_size": 30522,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (ROBERTA, roberta("base")),
        (DISTILBERT, distilbert("base")),
        (TINYBERT, tinybert_encoder("4-312")),
        ({**TINYBERT, "architectures": ["BertForPreTraining"]}, paired(tinybert("4-312"))),
        (ALBERT, albert("xxlarge")),
        (MODERNBERT, modernbert("base")),
        (MOBILEBERT, mobilebert_encoder("base")),
        ({**MOBILEBERT, "architectures": ["MobileBertForPreTraining"]}, mobilebert("base")),
        ({**MOBILEBERT, "classifier_activation": True}, mobilebert_encoder("base", pooler="tanh")),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_a_published_config_is_the_preset(config, model):
    assert without_training(read_config(config)) == without_training(model)


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        (roberta("base"), "RobertaForMaskedLM"),
        (roberta_encoder("large"), "RobertaModel"),
        (distilbert("base"), "DistilBertForMaskedLM"),
        (distilbert_encoder("base"), "DistilBertModel"),
        (tinybert("6-768"), "BertForMaskedLM"),
        (paired(tinybert("6-768")), "BertForPreTraining"),
        *((albert(size), "AlbertForMaskedLM") for size in ALBERT_SIZES),
        (albert_encoder("base"), "AlbertModel"),
        (albert_pretraining("large"), "AlbertForPreTraining"),
        (modernbert("tiny"), "ModernBertForMaskedLM"),  # too few layers to show its period
        (modernbert("base", every=1), "ModernBertForMaskedLM"),
        (modernbert_encoder("large"), "ModernBertModel"),
        (mobilebert("base", ffns=1), "MobileBertForMaskedLM"),
        (mobilebert_encoder("base"), "MobileBertModel"),
        (mobilebert_encoder("base", pooler="tanh"), "MobileBertModel"),
    ],
)
def test_what_is_written_is_read_back_as_the_same_model(model, architecture):
    written = write_config(model)
    assert written["architectures"] == [architecture]
    assert without_training(read_config(written)) == without_training(model)


V5 = {n: v for n, v in MODERNBERT.items() if n != "global_attn_every_n_layers" and "rope" not in n}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def test_modernbert_s_pattern_and_angles_are_read_in_both_forms():
    thetas = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
    rope = {n: {"rope_type": "default", "rope_theta": theta} for n, theta in thetas.items()}
    four = {"num_hidden_layers": 4, "layer_types": KINDS, "rope_parameters": rope}
    old = {**MODERNBERT, "num_hidden_layers": 4}
    assert read_config({**V5, **four}) == read_config(old) == read_config({**old, **four})
    with pytest.raises(UserError, match="layer_types"):
        read_config({**V5, **four, "layer_types": [*KINDS[:2], KINDS[0], KINDS[0]]})
    with pytest.raises(UserError, match="layer_types"):
        read_config({**old, **four, "global_attn_every_n_layers": 2})


def test_roberta_s_positions_count_from_the_padding_token():
    positions = read_config({**ROBERTA, "pad_token_id": 4}).encoder.positions
    assert (positions.offset, positions.max_length) == (5, 509)
    assert read_config(ROBERTA).encoder.positions.max_length == 512


REFUSED = [
    (ROBERTA, {"position_embedding_type": "relative_key"}),
    (ROBERTA, {"is_decoder": True}),
    (ROBERTA, {"hidden_act": "relu"}),
    (DISTILBERT, {"activation": "relu"}),
    (TINYBERT, {"emb_size": 128}),
    (TINYBERT, {"structure": [1]}),
    (ALBERT, {"num_hidden_groups": 2}),
    (ALBERT, {"inner_group_num": 2}),
    (ALBERT, {"hidden_act": "swish"}),
    (MODERNBERT, {"attention_bias": True}),
    (MODERNBERT, {"norm_bias": True}),
    (MODERNBERT, {"mlp_bias": True}),
    (MODERNBERT, {"classifier_bias": True}),
    (MODERNBERT, {"decoder_bias": False}),
    (MODERNBERT, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    (MODERNBERT, {"global_attn_every_n_layers": 0}),
    (MODERNBERT, {"tie_word_embeddings": False}),
    (MOBILEBERT, {"trigram_input": False}),
    (MOBILEBERT, {"use_bottleneck": False}),
    (MOBILEBERT, {"use_bottleneck_attention": True}),
    (MOBILEBERT, {"key_query_shared_bottleneck": False}),
    (MOBILEBERT, {"normalization_type": "layer_norm"}),
    (MOBILEBERT, {"true_hidden_size": 512}),
    (MOBILEBERT, {"hidden_act": "silu"}),
]


@pytest.mark.parametrize(("config", "change"), REFUSED, ids=lambda c: next(reversed(c)))
def test_what_would_be_another_model_is_refused(config, change):
    read_config(config)
    with pytest.raises(UserError, match=next(iter(change))):
        read_config({**config, **change})


@pytest.mark.parametrize(
    "config", [ROBERTA, DISTILBERT, ALBERT, MODERNBERT, MOBILEBERT], ids=lambda c: c["model_type"]
)
def test_unknown_fields_and_architectures_are_refused(config):
    with pytest.raises(UserError, match="layer_scale=2"):
        read_config({**config, "layer_scale": 2})
    with pytest.raises(UserError, match="architecture BertForNothing is unknown"):
        read_config({**config, "architectures": ["BertForNothing"]})
    ignored = family_of(config["model_type"]).ignored_fields
    assert all(reason for reason in ignored.values())
