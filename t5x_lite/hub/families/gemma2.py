"""Gemma 2 in Hugging Face's form."""

from t5x_lite.hub.families import Family, llama
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rope import read_rotary, write_rotary
from t5x_lite.hub.rules import Linear, Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.presets.gemma2 import gemma2

IGNORED_FIELDS = {
    "attention_dropout": llama.DROPOUT,
    "max_position_embeddings": "rotary positions have no end",
    "cache_implementation": "of generation",
    "tie_word_embeddings": "always tied",
}


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    layers, window = fields.take("num_hidden_layers"), fields.take("sliding_window", 4096)
    expect_plain(fields)
    fields.expect("sliding_window_size", window)
    fields.expect("layer_types", layer_types(layers, 2))
    return gemma2(
        "2b",
        width=fields.take("hidden_size"),
        layers=layers,
        heads=fields.take("num_attention_heads"),
        kv_heads=fields.take("num_key_value_heads"),
        head_dim=fields.take("head_dim"),
        hidden=fields.take("intermediate_size"),
        positions=read_rotary(fields, 10_000.0),
        query_scalar=fields.take("query_pre_attn_scalar", 256),
        window=window,
        logit_caps=(
            fields.take_null("attn_logit_softcapping", 50.0),
            fields.take_null("final_logit_softcapping", 30.0),
        ),
        epsilon=fields.take("rms_norm_eps", 1e-6),
        vocab_size=fields.take("vocab_size"),
    )


def expect_plain(fields: Fields) -> None:
    """Raises `UserError` for what no published Gemma has."""
    for name in ("hidden_act", "hidden_activation"):
        fields.expect(name, "gelu_pytorch_tanh")
    fields.expect("attention_bias", False)
    fields.expect("use_bidirectional_attention", False)
    fields.expect("tie_word_embeddings", True)


def layer_types(layers: int, period: int) -> list[str]:
    """Local layers, and after each `period - 1` of them a global one."""
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return [kinds[layer % period] for layer in range(layers)]


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    layers = model.decoder.layers
    return {
        **write_shape(model),
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "layer_types": layer_types(layers, 2),
        **write_rotary(model.decoder.positions),
    }


def write_shape(model: ModelConfig) -> dict:
    """The fields that are the same in Gemma 3."""
    block = model.decoder.blocks[0]
    attention = block.attention
    return {
        "hidden_size": model.width,
        "num_hidden_layers": model.decoder.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.keys,
        "head_dim": attention.head_dim,
        "intermediate_size": block.ffn.hidden,
        "rms_norm_eps": block.residual.norm.epsilon,
        "query_pre_attn_scalar": round(attention.logit_scale**-2),
        "sliding_window": attention.window,
        "attn_logit_softcapping": attention.soft_cap,
        "final_logit_softcapping": model.head.soft_cap,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "vocab_size": model.vocab_size,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As Llama's, with a norm on either side of each sublayer."""
    ours, theirs = "decoder/*", "model.layers.{layer}"
    norms = {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_out_norm": "post_feedforward_layernorm",
    }
    return [
        Rule("embedder/embedding", "model.embed_tokens.weight"),
        *llama.attention_rules(f"{ours}/attention", f"{theirs}.self_attn"),
        Rule(f"{ours}/ffn/gate/kernel", f"{theirs}.mlp.gate_proj.weight", Linear()),
        Rule(f"{ours}/ffn/up/kernel", f"{theirs}.mlp.up_proj.weight", Linear()),
        Rule(f"{ours}/ffn/down/kernel", f"{theirs}.mlp.down_proj.weight", Linear()),
        *(Rule(f"{ours}/{a}/scale", f"{theirs}.{b}.weight") for a, b in norms.items()),
        Rule("decoder/final_norm/scale", "model.norm.weight"),
    ]


FAMILIES = {
    "gemma2": Family(
        read,
        write,
        rules,
        ignored_fields=IGNORED_FIELDS,
        ignored_tensors={r".*\.rotary_emb\.inv_freq": "computed from config.json"},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        base_prefix="model.",
    )
}
