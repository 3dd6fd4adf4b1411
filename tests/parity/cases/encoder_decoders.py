"""Encoder-decoder families."""

from cases import Case

T5 = {
    "d_model": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 10, "vocab_size": 41,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
T5_1_1 = {
    **T5, "vocab_size": 23, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip

CASES = [
    Case("t5", "T5ForConditionalGeneration", T5, golden=True, quick=True),
    Case(
        "t5-depths",
        "T5ForConditionalGeneration",
        {**T5, "num_layers": 3, "num_decoder_layers": 2, "d_kv": 5},
    ),
    Case("t5-1-1", "T5ForConditionalGeneration", T5_1_1, golden=True, quick=True),
]
