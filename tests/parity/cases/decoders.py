"""Decoder-only families that are plain attention and a plain FFN."""

from cases import Case

GPT2 = {"n_embd": 16, "n_layer": 3, "n_inner": 24, "n_head": 4, "n_positions": 96, "vocab_size": 61}
LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "vocab_size": 61, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip

CASES = [
    Case("gpt2", "GPT2LMHeadModel", GPT2, golden=True, quick=True),
    Case("gpt2-inner", "GPT2LMHeadModel", {**GPT2, "n_inner": None, "layer_norm_epsilon": 1e-6}),
    Case("llama", "LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 2}, golden=True, quick=True),
    Case("llama-tied", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    Case("llama-one-kv-head", "LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 1}),
    Case("llama-head-dim", "LlamaForCausalLM", {**LLAMA, "head_dim": 10}),
    Case("llama3", "LlamaForCausalLM", {**LLAMA, "rope_parameters": LLAMA3}, golden=True),
]
