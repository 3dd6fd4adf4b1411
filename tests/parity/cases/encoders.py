"""Encoder-only families."""

from cases import Case

BERT = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "vocab_size": 41, "max_position_embeddings": 32,
}  # fmt: skip

CASES = [
    Case("bert", "BertForMaskedLM", BERT, golden=True, quick=True),
    Case("bert-pooler", "BertModel", BERT, golden=True),
]
