"""Qwen 3 (dense) in Hugging Face's form."""

from t5x_lite.hub.families import Family, llama
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rope import read_rotary
from t5x_lite.hub.rules import Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.presets.qwen3 import qwen3


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    layers, heads = fields.take("num_hidden_layers"), fields.take("num_attention_heads")
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("use_sliding_window", False)
    fields.expect("layer_types", ["full_attention"] * layers)
    return qwen3(
        "8b",
        width=fields.take("hidden_size"),
        layers=layers,
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", heads),
        head_dim=fields.take("head_dim", 128),
        hidden=fields.take("intermediate_size"),
        positions=read_rotary(fields, 10_000.0),
        epsilon=fields.take("rms_norm_eps", 1e-6),
        tied=fields.take("tie_word_embeddings", False),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    return {
        **llama.write(model),
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "use_sliding_window": False,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As Llama's, with the norms of queries and keys."""
    ours, theirs = "decoder/*/attention", "model.layers.{layer}.self_attn"
    return [
        *llama.rules(model),
        Rule(f"{ours}/query_norm/scale", f"{theirs}.q_norm.weight"),
        Rule(f"{ours}/key_norm/scale", f"{theirs}.k_norm.weight"),
    ]


FAMILIES = {
    "qwen3": Family(
        read,
        write,
        rules,
        ignored_fields={
            "attention_dropout": llama.DROPOUT,
            "max_position_embeddings": "rotary positions have no end",
            "sliding_window": "of use_sliding_window, which is off",
            "max_window_layers": "of use_sliding_window, which is off",
        },
        ignored_tensors={r".*\.rotary_emb\.inv_freq": "computed from config.json"},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        base_prefix="model.",
    )
}
