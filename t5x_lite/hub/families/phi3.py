"""Phi-3 Mini in Hugging Face's form."""

from t5x_lite.hub.families import Family, llama
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rope import read_rotary, write_rotary
from t5x_lite.hub.rules import Linear, Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.positions import LongRotary
from t5x_lite.nn.presets.phi3 import phi3


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("partial_rotary_factor", 1.0)
    heads = fields.take("num_attention_heads")
    # How far the rotations are stretched is written beside them, not among them.
    original = fields.take("original_max_position_embeddings", 4096)
    extended = fields.take("max_position_embeddings", 4096)
    return phi3(
        "tiny",  # which has no window, so that null can mean none
        width=fields.take("hidden_size"),
        layers=fields.take("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", heads),
        hidden=fields.take("intermediate_size"),
        positions=read_rotary(fields, 10_000.0, stretched=(original, extended)),
        window=fields.take("sliding_window", None),
        epsilon=fields.take("rms_norm_eps", 1e-5),
        tied=fields.take("tie_word_embeddings", False),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    positions, window = model.decoder.positions, model.decoder.blocks[0].attention.window
    lengths = {}
    if isinstance(positions, LongRotary):
        lengths = {
            "original_max_position_embeddings": positions.original_length,
            "max_position_embeddings": round(positions.factor * positions.original_length),
        }
    llamas_alone = {"model_type", "architectures", "head_dim", "rope_parameters"}
    fields = llama.write(model)
    return {
        **{name: value for name, value in fields.items() if name not in llamas_alone},
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "sliding_window": window,
        "pad_token_id": None,  # by default one that a smaller vocabulary lacks
        **lengths,
        **write_rotary(positions),
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As Llama's, with one product for queries, keys and values and one for gate and up."""
    ours, theirs = "decoder/*", "model.layers.{layer}"
    parts = tuple(f"{ours}/attention/{name}/kernel" for name in ("query", "key", "value"))
    halves = tuple(f"{ours}/ffn/{name}/kernel" for name in ("gate", "up"))
    joined = {*parts, *halves}
    return [
        *(rule for rule in llama.rules(model) if rule.ours not in joined),
        Rule(parts, f"{theirs}.self_attn.qkv_proj.weight", Linear()),
        Rule(halves, f"{theirs}.mlp.gate_up_proj.weight", Linear()),
    ]


FAMILIES = {
    "phi3": Family(
        read,
        write,
        rules,
        ignored_fields={
            "attention_dropout": llama.DROPOUT,
            "embd_pdrop": llama.DROPOUT,
            "resid_pdrop": llama.DROPOUT,
        },
        ignored_tensors={r".*\.rotary_emb\.inv_freq": "computed from config.json"},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        base_prefix="model.",
    )
}
