"""Decoder-only families that are plain attention and a plain FFN."""

from cases import Case

GPT2 = {"n_embd": 8, "n_layer": 2, "n_inner": 12, "n_head": 2, "n_positions": 77, "vocab_size": 23}
LLAMA = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4,
    "intermediate_size": 12, "vocab_size": 41, "rms_norm_eps": 1e-5,
}  # fmt: skip
WIDE_LLAMA = {**LLAMA, "hidden_size": 16, "head_dim": None}
# Of four rotations the fastest stays, the next is between, the others slow down.
SLOWER = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LLAMA3 = {
    **LLAMA, "num_attention_heads": 2, "head_dim": 8, "vocab_size": 23,
    "rope_parameters": SLOWER,
}  # fmt: skip

CASES = [
    Case("gpt2", "GPT2LMHeadModel", GPT2, golden=True, quick=True),
    Case("gpt2-inner", "GPT2LMHeadModel", {**GPT2, "n_inner": None, "layer_norm_epsilon": 1e-6}),
    Case("llama", "LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 2}, golden=True, quick=True),
    Case(
        "llama-tied",
        "LlamaForCausalLM",
        {**WIDE_LLAMA, "num_hidden_layers": 3, "tie_word_embeddings": True},
    ),
    Case("llama-one-kv-head", "LlamaForCausalLM", {**WIDE_LLAMA, "num_key_value_heads": 1}),
    Case("llama-head-dim", "LlamaForCausalLM", {**LLAMA, "head_dim": 10}),
    Case("llama3", "LlamaForCausalLM", LLAMA3, golden=True),
]
