"""Gemma 3's language model in Hugging Face's form."""

from t5x_lite.hub.families import Family, gemma2
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rope import read_layer_rotary, write_layer_rotary
from t5x_lite.hub.rules import Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.presets.gemma3 import gemma3

THETAS = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    gemma2.expect_plain(fields)
    layers, positions = fields.take("num_hidden_layers", 26), read_layer_rotary(fields, THETAS)
    return gemma3(
        "4b",
        width=fields.take("hidden_size"),
        layers=layers,
        heads=fields.take("num_attention_heads", 8),
        kv_heads=fields.take("num_key_value_heads", 4),
        head_dim=fields.take("head_dim", 256),
        hidden=fields.take("intermediate_size"),
        positions=positions["full_attention"],
        local_positions=positions["sliding_attention"],
        query_scalar=fields.take("query_pre_attn_scalar", 256),
        window=fields.take("sliding_window", 4096),
        period=read_period(fields, layers),
        logit_caps=(
            fields.take("attn_logit_softcapping", None),
            fields.take("final_logit_softcapping", None),
        ),
        epsilon=fields.take("rms_norm_eps", 1e-6),
        vocab_size=fields.take("vocab_size", 262_208),
    )


def read_period(fields: Fields, layers: int) -> int:
    """Every how many layers one looks everywhere, as the fields of all versions agree.

    Raises:
        UserError: the layers don't repeat so.
    """
    kinds = fields.take("layer_types", [])
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else 6
    for name in ("_sliding_window_pattern", "sliding_window_pattern"):
        period = fields.take(name, period)
    fields.expect("layer_types", gemma2.layer_types(layers, period))
    fields.expect("_sliding_window_pattern", period)
    return period


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    layers, blocks = model.decoder.layers, model.decoder.block.blocks
    return {
        **gemma2.write_shape(model),
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window_pattern": len(blocks),
        "layer_types": gemma2.layer_types(layers, len(blocks)),
        **write_layer_rotary(
            {
                "full_attention": model.decoder.positions,
                "sliding_attention": blocks[0].attention.positions,
            }
        ),
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As Gemma 2's, with the norms of queries and keys."""
    ours, theirs = "decoder/*/attention", "model.layers.{layer}.self_attn"
    return [
        *gemma2.rules(model),
        Rule(f"{ours}/query_norm/scale", f"{theirs}.q_norm.weight"),
        Rule(f"{ours}/key_norm/scale", f"{theirs}.k_norm.weight"),
    ]


FAMILIES = {
    "gemma3_text": Family(
        read,
        write,
        rules,
        ignored_fields=gemma2.IGNORED_FIELDS,
        ignored_tensors={r".*\.rotary_emb\..*inv_freq": "computed from config.json"},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        base_prefix="model.",
    )
}
