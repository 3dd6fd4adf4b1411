"""Mixtral in Hugging Face's form: one tensor for each expert's product."""

from t5x_lite.hub.families import Family
from t5x_lite.hub.families.llama import DROPOUT, attention_rules
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rope import read_rotary, write_rotary
from t5x_lite.hub.rules import Linear, Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.presets.mixtral import mixtral


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("hidden_act", "silu")
    width, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    return mixtral(
        "8x7b",
        width=width,
        layers=fields.take("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 8),
        head_dim=fields.take("head_dim", width // heads),
        hidden=fields.take("intermediate_size"),
        experts=fields.take("num_local_experts", 8),
        top_k=fields.take("num_experts_per_tok", 2),
        positions=read_rotary(fields, 1_000_000.0),
        epsilon=fields.take("rms_norm_eps", 1e-5),
        window=fields.take("sliding_window", None),
        tied=fields.take("tie_word_embeddings", False),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    block = model.decoder.blocks[0]
    attention, moe = block.attention, block.ffn
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": model.width,
        "num_hidden_layers": model.decoder.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.keys,
        "head_dim": attention.head_dim,
        "intermediate_size": moe.expert.hidden,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.router.top_k,
        "rms_norm_eps": block.residual.norm.epsilon,
        "sliding_window": attention.window,
        "hidden_act": "silu",
        "tie_word_embeddings": model.head.tied,
        "vocab_size": model.vocab_size,
        **write_rotary(model.decoder.positions),
    }


def rules(model: ModelConfig) -> list[Rule]:
    """w1 is the gate, w3 what it multiplies, w2 the way back."""
    ours, theirs = "decoder/*", "model.layers.{layer}"
    moe, expert = f"{theirs}.block_sparse_moe", f"{theirs}.block_sparse_moe.experts.{{expert}}"
    return [
        Rule("embedder/embedding", "model.embed_tokens.weight"),
        *attention_rules(f"{ours}/attention", f"{theirs}.self_attn"),
        Rule(f"{ours}/ffn/router/kernel", f"{moe}.gate.weight", Linear()),
        Rule(f"{ours}/ffn/experts/gate/kernel", f"{expert}.w1.weight", Linear()),
        Rule(f"{ours}/ffn/experts/down/kernel", f"{expert}.w2.weight", Linear()),
        Rule(f"{ours}/ffn/experts/up/kernel", f"{expert}.w3.weight", Linear()),
        Rule(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
        Rule(f"{ours}/ffn_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
        Rule("decoder/final_norm/scale", "model.norm.weight"),
        Rule("head/kernel", "lm_head.weight"),
    ]


FAMILIES = {
    "mixtral": Family(
        read,
        write,
        rules,
        ignored_fields={
            "attention_dropout": DROPOUT,
            "max_position_embeddings": "rotary positions have no end",
            "output_router_logits": "an option of a call",
            "router_aux_loss_coef": "of the loss, which a run chooses",
            "router_jitter_noise": "of training alone",
        },
        ignored_tensors={r".*\.rotary_emb\.inv_freq": "computed from config.json"},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        base_prefix="model.",
    )
}
