"""Families with experts in the FFN's place."""

from cases import Case

MIXTRAL = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "intermediate_size": 6, "vocab_size": 23, "num_local_experts": 4,
}  # fmt: skip

CASES = [
    Case("mixtral", "MixtralForCausalLM", MIXTRAL, golden=True, quick=True),
    Case("mixtral-tied", "MixtralForCausalLM", {
        **MIXTRAL, "hidden_size": 16, "head_dim": None, "tie_word_embeddings": True}),
    Case("mixtral-head-dim", "MixtralForCausalLM", {
        **MIXTRAL, "head_dim": 10, "num_local_experts": 7, "num_experts_per_tok": 3,
        "num_key_value_heads": 1, "intermediate_size": 15, "rope_parameters": {
            "rope_type": "default", "rope_theta": 500.0},
    }),
    Case("mixtral-window", "MixtralForCausalLM", {
        **MIXTRAL, "num_hidden_layers": 3, "sliding_window": 5}, length=17),
]  # fmt: skip

YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 0.707,
    "mscale_all_dim": 0.707, "original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 1,
}  # fmt: skip
DEEPSEEK = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 10, "vocab_size": 23, "first_k_dense_replace": 1, "kv_lora_rank": 6,
    "q_lora_rank": 7, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 5,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 4,
}  # fmt: skip
V2 = {**DEEPSEEK, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
# Three experts of two groups: the two best would lie in the two best groups, limit or not.
V2_GROUPS = {
    "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3,
}  # fmt: skip
V2_LITE = {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}

CASES += [
    Case("deepseek-v2", "DeepseekV2ForCausalLM", {**V2, **V2_GROUPS, "rope_parameters": YARN},
         golden=True, quick=True),
    Case("deepseek-v2-lite", "DeepseekV2ForCausalLM", {
        **V2, **V2_LITE, "num_hidden_layers": 3, "rope_parameters": {
            **YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    Case("deepseek-v2-plain", "DeepseekV2ForCausalLM", {
        **V2, **V2_LITE, "first_k_dense_replace": 0, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True}),
    Case("deepseek-v2-depths", "DeepseekV2ForCausalLM", {
        **V2, **V2_GROUPS, "num_hidden_layers": 4, "first_k_dense_replace": 2,
        "attention_bias": True, "rope_parameters": {
            n: v for n, v in YARN.items() if not n.startswith("mscale")}}, length=21),
]  # fmt: skip

V3 = {**DEEPSEEK, "n_shared_experts": 1, "n_group": 3, "topk_group": 2}

CASES += [
    Case("deepseek-v3", "DeepseekV3ForCausalLM", {
        **V3, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
         golden=True, quick=True),
    Case("deepseek-v3-plain", "DeepseekV3ForCausalLM", {
        **V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
        "first_k_dense_replace": 0, "attention_bias": True, "routed_scaling_factor": 0.7,
        "n_shared_experts": 2, "rms_norm_eps": 1e-5, "num_experts_per_tok": 3}),
    Case("deepseek-v3-depths", "DeepseekV3ForCausalLM", {
        **V3, "num_hidden_layers": 4, "first_k_dense_replace": 2, "tie_word_embeddings": True,
        "num_attention_heads": 3, "num_key_value_heads": 3, "rope_parameters": {
            **YARN, "factor": 40.0, "beta_fast": 32}}, length=21),
]  # fmt: skip
