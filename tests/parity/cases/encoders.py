"""Encoder-only families."""

from cases import Case

BERT = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "vocab_size": 61, "max_position_embeddings": 32,
}  # fmt: skip

CASES = [
    Case("bert", "BertForMaskedLM", BERT, golden=True, quick=True),
    Case("bert-pooler", "BertModel", BERT, golden=True),
]
