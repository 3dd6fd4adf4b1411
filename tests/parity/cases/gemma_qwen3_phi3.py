"""Qwen 3, Gemma 2 and 3, Phi-3: norms of queries and keys, windows, soft caps, long rotations."""

from cases import Case

QWEN3 = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "intermediate_size": 12, "vocab_size": 23,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA2 = {
    "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "intermediate_size": 8, "vocab_size": 23, "sliding_window": 4,
    "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
}  # fmt: skip
GEMMA3 = {
    "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "intermediate_size": 8, "vocab_size": 23, "sliding_window": 4,
    "query_pre_attn_scalar": 10, "sliding_window_pattern": 2,
}  # fmt: skip
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
PHI3 = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12, "vocab_size": 23, "sliding_window": 6, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def long_rotations(original):
    """Short factors up to `original` places, long ones beyond."""
    factors = {"short_factor": [1.0, 1.3], "long_factor": [1.5, 9.0]}
    return {
        **PHI3,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, **factors},
        "original_max_position_embeddings": original,
        "max_position_embeddings": 4 * original,
    }


CASES = [
    Case("qwen3", "Qwen3ForCausalLM", {**QWEN3, "tie_word_embeddings": True}, True, quick=True),
    Case("qwen3-untied", "Qwen3ForCausalLM", {**QWEN3, "num_key_value_heads": 4, "head_dim": 10,
                                              "num_hidden_layers": 3}),
    Case("qwen3-rotary", "Qwen3ForCausalLM", {**QWEN3, "num_key_value_heads": 1,
                                              "rms_norm_eps": 1e-3, "rope_parameters": LLAMA3}),
    # Caps so low that they bend what a random model computes.
    Case("gemma2", "Gemma2ForCausalLM", GEMMA2, golden=True, quick=True),
    # Not a window of 1: the cache of `transformers` then forgets no key.
    Case("gemma2-odd", "Gemma2ForCausalLM", {**GEMMA2, "num_hidden_layers": 3, "head_dim": 10,
                                              "num_key_value_heads": 4, "sliding_window": 2}),
    Case("gemma2-uncapped", "Gemma2ForCausalLM", {**GEMMA2, "attn_logit_softcapping": None,
                                                  "num_key_value_heads": 1,
                                                  "final_logit_softcapping": None}),
    Case("gemma3", "Gemma3ForCausalLM", GEMMA3, golden=True),
    # A whole period of the published pattern, and a rest.
    Case("gemma3-linear", "Gemma3ForCausalLM", {**GEMMA3, "rope_parameters": LINEAR, "head_dim": 10,
                                                "num_hidden_layers": 8, "num_key_value_heads": 1,
                                                "sliding_window_pattern": 6}),
    Case("gemma3-local", "Gemma3ForCausalLM", {**GEMMA3, "sliding_window_pattern": 6,
                                               "num_key_value_heads": 4, "sliding_window": 3,
                                               "final_logit_softcapping": 3.0}),
    Case("phi3", "Phi3ForCausalLM", PHI3, golden=True),
    Case("phi3-no-window", "Phi3ForCausalLM", {**PHI3, "sliding_window": None,
                                               "hidden_size": 16, "num_attention_heads": 4,
                                               "num_key_value_heads": 2,
                                               "tie_word_embeddings": True}),
    # All rows on one side of the length: `transformers` decides for the whole batch at once.
    Case("phi3-long", "Phi3ForCausalLM", long_rotations(4), golden=True),
    Case("phi3-short", "Phi3ForCausalLM", {**long_rotations(96), "num_key_value_heads": 2}),
]  # fmt: skip
