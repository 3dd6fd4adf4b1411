"""DeepSeek-V2, DeepSeek-V3 and R1 in Hugging Face's form: one tensor for each expert's product."""

from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.families.llama import DROPOUT
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rope import read_rotary, write_rotary
from t5x_lite.hub.rules import Linear, Neighbours, Rule, Same
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.moe import GroupLimit, SigmoidRouter
from t5x_lite.nn.presets.deepseek import deepseek_v2, deepseek_v3

# How many layers after the model's own may predict further tokens; V3 has one.
MTP_LAYERS = 8


def read_v2(fields: Fields) -> ModelConfig:
    """The model of a DeepSeek-V2 config.json."""
    fields.expect("scoring_func", "softmax")
    fields.expect("norm_topk_prob", False)
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    limited = fields.take("topk_method", "greedy") == "group_limited_greedy"
    groups = fields.take("n_group", 1), fields.take("topk_group", 1)
    return deepseek_v2(
        "lite",  # which has neither groups nor a query_rank
        **_read(fields),
        dense_layers=fields.take("first_k_dense_replace", 0),
        shared=fields.take("n_shared_experts", 2),
        scale=fields.take("routed_scaling_factor", 1.0),
        groups=GroupLimit(*groups) if limited else None,
        mlp_bias=fields.take("mlp_bias", False),
    )


def read_v3(fields: Fields) -> ModelConfig:
    """The model of a DeepSeek-V3 config.json."""
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    fields.expect("rope_interleave", True)
    return deepseek_v3(
        "671b",
        **_read(fields),
        dense_layers=fields.take("first_k_dense_replace", 3),
        shared=fields.take("n_shared_experts", 1),
        scale=fields.take("routed_scaling_factor", 2.5),
        normalized=fields.take("norm_topk_prob", True),
        groups=GroupLimit(fields.take("n_group", 8), fields.take("topk_group", 4), best=2),
    )


def _read(fields: Fields) -> dict[str, Any]:
    heads = fields.take("num_attention_heads")
    fields.expect("hidden_act", "silu")
    fields.expect("num_key_value_heads", heads)
    fields.expect("moe_layer_freq", 1)
    return {
        "width": fields.take("hidden_size"),
        "layers": fields.take("num_hidden_layers"),
        "heads": heads,
        "hidden": fields.take("intermediate_size"),
        "content_dim": fields.take("qk_nope_head_dim", 128),
        "rotary_dim": fields.take("qk_rope_head_dim", 64),
        "value_dim": fields.take("v_head_dim", 128),
        "kv_rank": fields.take("kv_lora_rank", 512),
        "query_rank": fields.take_null("q_lora_rank", 1536) or 0,
        "expert_hidden": fields.take("moe_intermediate_size"),
        "experts": fields.take("n_routed_experts"),
        "top_k": fields.take("num_experts_per_tok"),
        "positions": read_rotary(fields, 10_000.0),
        "epsilon": fields.take("rms_norm_eps", 1e-6),
        "bias": fields.take("attention_bias", False),
        "tied": fields.take("tie_word_embeddings", False),
        "vocab_size": fields.take("vocab_size"),
    }


def write_v2(model: ModelConfig) -> dict:
    """The config.json of a DeepSeek-V2 model."""
    block = model.decoder.block.blocks[0]
    if isinstance(block.ffn.router, SigmoidRouter):
        raise UserError("DeepSeek-V2's router is a softmax.")
    method = "greedy" if block.ffn.router.groups is None else "group_limited_greedy"
    return {
        **_write(model, "V2"),
        "norm_topk_prob": False,
        "topk_method": method,
        "mlp_bias": block.ffn.shared.bias,
    }


def write_v3(model: ModelConfig) -> dict:
    """The config.json of a DeepSeek-V3 model."""
    router = model.decoder.block.blocks[0].ffn.router
    if not isinstance(router, SigmoidRouter):
        raise UserError("DeepSeek-V3's router is a sigmoid.")
    return {
        **_write(model, "V3"),
        "norm_topk_prob": router.normalized,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


def _write(model: ModelConfig, version: str) -> dict:
    block, first = model.decoder.block.blocks[0], model.decoder.block.first
    attention, moe, groups = block.attention, block.ffn, block.ffn.router.groups
    limits = {} if groups is None else {"n_group": groups.groups, "topk_group": groups.chosen}
    return {
        "model_type": f"deepseek_{version.lower()}",
        "architectures": [f"Deepseek{version}ForCausalLM"],
        "hidden_size": model.width,
        "num_hidden_layers": model.decoder.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "intermediate_size": first[0].ffn.hidden if first else moe.expert.hidden,
        "first_k_dense_replace": len(first),
        "qk_nope_head_dim": attention.content_dim,
        "qk_rope_head_dim": attention.rotary_dim,
        "v_head_dim": attention.value_dim,
        "kv_lora_rank": attention.kv_rank,
        "q_lora_rank": attention.query_rank,
        "moe_intermediate_size": moe.expert.hidden,
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared.hidden // moe.expert.hidden,
        "num_experts_per_tok": moe.router.top_k,
        "routed_scaling_factor": moe.router.scale,
        **limits,
        "rms_norm_eps": block.residual.norm.epsilon,
        "attention_bias": attention.bias,
        "hidden_act": "silu",
        "tie_word_embeddings": model.head.tied,
        "vocab_size": model.vocab_size,
        **write_rotary(model.decoder.positions),
    }


def rules(model: ModelConfig) -> list[Rule]:
    """ "a" projections lead into the latents, "b" projections out of them."""
    ours, theirs = "decoder/*", "model.layers.{layer}"
    moe, expert = f"{theirs}.mlp", f"{theirs}.mlp.experts.{{expert}}"
    return [
        Rule("embedder/embedding", "model.embed_tokens.weight"),
        *_attention_rules(model, f"{ours}/attention", f"{theirs}.self_attn"),
        *_mlp_rules(f"{ours}/ffn", f"{theirs}.mlp"),
        Rule(f"{ours}/ffn/router/kernel", f"{moe}.gate.weight", Linear()),
        Rule(f"{ours}/ffn/router/correction", f"{moe}.gate.e_score_correction_bias"),
        *_mlp_rules(f"{ours}/ffn/experts", expert),
        *_mlp_rules(f"{ours}/ffn/shared", f"{moe}.shared_experts"),
        Rule(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
        Rule(f"{ours}/ffn_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
        Rule("decoder/final_norm/scale", "model.norm.weight"),
        Rule("head/kernel", "lm_head.weight"),
    ]


def _mlp_rules(ours: str, theirs: str) -> list[Rule]:
    rules = []
    for name in ("gate", "up", "down"):
        rules += [
            Rule(f"{ours}/{name}/kernel", f"{theirs}.{name}_proj.weight", Linear()),
            Rule(f"{ours}/{name}/bias", f"{theirs}.{name}_proj.bias"),
        ]
    return rules


def _attention_rules(model: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    """Rotary features are neighbours in theirs, halves in ours: the logits are the same."""
    attention = model.decoder.blocks[0].attention
    kernel = Neighbours(Linear(), attention.rotary_dim)
    query = "q_proj" if attention.query_rank is None else "q_b_proj"
    joined = f"{theirs}.kv_a_proj_with_mqa"
    return [
        Rule(f"{ours}/query_down/kernel", f"{theirs}.q_a_proj.weight", Linear()),
        Rule(f"{ours}/query_down/bias", f"{theirs}.q_a_proj.bias"),
        Rule(f"{ours}/query_norm/scale", f"{theirs}.q_a_layernorm.weight"),
        Rule(f"{ours}/query/kernel", f"{theirs}.{query}.weight", kernel),
        Rule(f"{ours}/kv_down/kernel", f"{joined}.weight", kernel),
        Rule(f"{ours}/kv_down/bias", f"{joined}.bias", Neighbours(Same(), attention.rotary_dim)),
        Rule(f"{ours}/kv_norm/scale", f"{theirs}.kv_a_layernorm.weight"),
        Rule(f"{ours}/up/kernel", f"{theirs}.kv_b_proj.weight", Linear()),
        Rule(f"{ours}/out/kernel", f"{theirs}.o_proj.weight", Linear(2)),
        Rule(f"{ours}/out/bias", f"{theirs}.o_proj.bias"),
    ]


def ignored_tensors(model: ModelConfig) -> dict[str, str]:
    """The layers that V3 is published with beside its own."""
    layers = model.decoder.layers
    numbers = "|".join(str(layers + extra) for extra in range(MTP_LAYERS))
    return {
        r".*\.rotary_emb\.inv_freq": "computed from config.json",
        rf"model\.layers\.({numbers})\..*": "predicts the token after the next, which isn't read",
    }


def _family(read, write) -> Family:
    return Family(
        read,
        write,
        rules,
        ignored_fields={
            "attention_dropout": DROPOUT,
            "max_position_embeddings": "rotary positions have no end",
            "head_dim": "as qk_rope_head_dim",
            "qk_head_dim": "qk_nope_head_dim + qk_rope_head_dim",
            "output_router_logits": "an option of a call",
            "aux_loss_alpha": "of the loss, which a run chooses",
            "seq_aux": "of the loss, which a run chooses",
            "ep_size": "how experts lie over devices",
            "num_nextn_predict_layers": "layers after the model's own, which aren't read",
        },
        ignored_tensors=ignored_tensors,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        base_prefix="model.",
    )


FAMILIES = {"deepseek_v2": _family(read_v2, write_v2), "deepseek_v3": _family(read_v3, write_v3)}
