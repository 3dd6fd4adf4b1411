"""Encoder-decoder families beyond T5: its heirs, BART, the transformer of 2017."""

from cases import Case

# Small enough to be committed.
T5 = {
    "d_model": 6, "num_layers": 2, "num_heads": 3, "d_kv": 3, "d_ff": 10, "vocab_size": 23,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
LARGER = {**T5, "d_model": 24, "num_layers": 3, "num_heads": 4, "d_kv": 6, "d_ff": 40}
# Version 5 of transformers always ties; parity_heads.py compares the heads that aren't.
FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BYT5 = {"num_layers": 3, "num_decoder_layers": 2, "vocab_size": 25}
# Ids of special tokens lie in the small vocabulary.
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
BART = {
    "d_model": 6, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 10, "decoder_ffn_dim": 10, "vocab_size": 23,
    "max_position_embeddings": 70, **IDS,
}  # fmt: skip
UNEQUAL = {
    "d_model": 24, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_attention_heads": 2,
}  # fmt: skip
MARIAN = {**BART, "scale_embedding": True, "activation_function": "swish"}

CASES = [
    Case("flan-t5", "T5ForConditionalGeneration", {**LARGER, **FLAN, "num_heads": 3, "d_kv": 9}),
    Case("byt5", "T5ForConditionalGeneration", {**T5, **FLAN, **BYT5}, golden=True),
    Case("byt5-long", "T5ForConditionalGeneration",
         {**LARGER, **FLAN, **BYT5, "num_layers": 4}, length=40),
    Case("mt5", "MT5ForConditionalGeneration", T5, golden=True),
    Case("mt5-relu", "MT5ForConditionalGeneration",
         {**LARGER, "num_decoder_layers": 2, "feed_forward_proj": "relu"}),
    Case("umt5", "UMT5ForConditionalGeneration", T5, golden=True, quick=True),
    Case("umt5-long", "UMT5ForConditionalGeneration", {**LARGER, "num_decoder_layers": 2},
         length=40),
    Case("bart", "BartForConditionalGeneration", BART, golden=True, quick=True),
    Case("bart-unequal", "BartForConditionalGeneration", {**BART, **UNEQUAL}, length=40),
    Case("bart-scaled", "BartForConditionalGeneration",
         {**BART, "scale_embedding": True, "activation_function": "relu"}),
    Case("marian", "MarianMTModel", MARIAN, golden=True),
    Case("marian-unequal", "MarianMTModel",
         {**MARIAN, **UNEQUAL, "activation_function": "relu"}, length=40),
    Case("marian-unscaled", "MarianMTModel", {**MARIAN, "scale_embedding": False}, length=70),
]  # fmt: skip
