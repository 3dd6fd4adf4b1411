"""Encoders that descend from BERT."""

from cases import Case

SHAPE = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "vocab_size": 23,
}  # fmt: skip
DEEP = {
    **SHAPE, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 40,
}  # fmt: skip
# 13 places for 13 tokens: the last row of the table is read.
ROBERTA = {"max_position_embeddings": 15, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
DISTILBERT = {
    "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "vocab_size": 23,
    "max_position_embeddings": 13,
}  # fmt: skip
TINYBERT = {  # what Huawei's files hold besides BERT's fields
    **DEEP, "num_hidden_layers": 4, "num_attention_heads": 12,
    "emb_size": 24, "cell": {}, "structure": [], "pre_trained": "",
}  # fmt: skip
ALBERT = {**SHAPE, "embedding_size": 6, "num_hidden_layers": 3, "max_position_embeddings": 13}
WIDE_ALBERT = {**DEEP, "embedding_size": 32, "hidden_act": "gelu", "max_position_embeddings": 32}
# Windows of 3 keys on either side, in rows of 13; 7 layers are one first and two rounds.
MODERNBERT = {
    **SHAPE, "num_hidden_layers": 7, "intermediate_size": 8, "local_attention": 6,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
}  # fmt: skip
EVERY_OTHER = {"layer_types": ["full_attention", "sliding_attention"] * 3, "num_hidden_layers": 6}
MOBILEBERT = {
    **SHAPE, "embedding_size": 6, "intra_bottleneck_size": 6, "max_position_embeddings": 13,
    "num_feedforward_networks": 3,
}  # fmt: skip
FEW_FFNS = {
    "num_feedforward_networks": 2, "intra_bottleneck_size": 12, "hidden_act": "gelu",
    "num_attention_heads": 3,
}  # fmt: skip

CASES = [
    Case("roberta", "RobertaForMaskedLM", {**SHAPE, **ROBERTA}, golden=True, quick=True),
    Case(
        "roberta-pooler",
        "RobertaModel",
        {**DEEP, **ROBERTA, "pad_token_id": 4, "max_position_embeddings": 18},
    ),
    Case("distilbert", "DistilBertForMaskedLM", DISTILBERT, golden=True),
    Case("distilbert-bare", "DistilBertModel", {**DISTILBERT, "n_heads": 4}, golden=True),
    Case("tinybert", "BertForMaskedLM", TINYBERT),
    Case("tinybert-pooler", "BertModel", {**TINYBERT, "max_position_embeddings": 13}),
    Case("albert", "AlbertForMaskedLM", ALBERT, golden=True, quick=True),
    Case("albert-wide", "AlbertForMaskedLM", WIDE_ALBERT),
    Case("albert-pooler", "AlbertModel", {**ALBERT, "num_attention_heads": 4}),
    Case("modernbert", "ModernBertForMaskedLM", MODERNBERT, golden=True, quick=True),
    Case("modernbert-odd", "ModernBertForMaskedLM", {**MODERNBERT, "local_attention": 5}),
    Case("modernbert-every-other", "ModernBertForMaskedLM", {**MODERNBERT, **EVERY_OTHER}),
    Case("modernbert-two", "ModernBertForMaskedLM", {**MODERNBERT, "num_hidden_layers": 2}),
    Case("modernbert-bare", "ModernBertModel", {**MODERNBERT, "num_hidden_layers": 5}, length=20),
    Case("mobilebert", "MobileBertForMaskedLM", MOBILEBERT, golden=True, quick=True),
    Case("mobilebert-few", "MobileBertForMaskedLM", {**MOBILEBERT, **FEW_FFNS}),
    Case("mobilebert-pooler", "MobileBertModel", {**MOBILEBERT, "num_feedforward_networks": 1}),
    Case(
        "mobilebert-bare",
        "MobileBertModel",
        {**MOBILEBERT, "num_feedforward_networks": 4, "classifier_activation": False},
    ),
]
