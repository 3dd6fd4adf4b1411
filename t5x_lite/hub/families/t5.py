"""T5 1.0 and 1.1, Flan-T5, ByT5 (all of them "t5"), mT5 and umT5 in Hugging Face's form."""

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rules import Linear, Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.presets.t5 import bias_per_layer, t5

# feed_forward_proj → (activation, gated)
FEED_FORWARD = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
}


def read(fields: Fields) -> ModelConfig:
    """A T5 model."""
    # Version 5 of transformers always writes that the head is tied, and a field of its own for the
    # scale that T5 1.0 puts before a tied head; whether there is a head then only the tensors say.
    tied = fields.take("tie_word_embeddings", True)
    return _read(fields, "relu", tied, fields.take("scale_decoder_outputs", tied))


def read_mt5(fields: Fields) -> ModelConfig:
    """An mT5 model; version 5 of transformers scales no head of it, tied or not."""
    return _read(fields, "gated-gelu", fields.take("tie_word_embeddings", True), scaled=False)


def read_umt5(fields: Fields) -> ModelConfig:
    """A umT5 model, scaled where its config.json ties the head, as version 4 of transformers did.

    Version 5 overrides the field, and so multiplies all logits of the published models, which have
    heads of their own, by width^-0.5; they were trained without.
    """
    tied = fields.take("tie_word_embeddings", True)
    scaled = fields.take("scale_decoder_outputs", tied)
    return bias_per_layer(_read(fields, "gated-gelu", tied, scaled))


def _read(fields: Fields, feed_forward: str, tied: bool, scaled: bool) -> ModelConfig:
    kind = fields.take("feed_forward_proj", feed_forward)
    if kind not in FEED_FORWARD:
        raise UserError(
            f"config.json has feed_forward_proj={kind!r}; t5x_lite knows {', '.join(FEED_FORWARD)}."
        )
    fields.expect("is_decoder", False)
    for derived in ("dense_act_fn", "is_gated_act"):
        fields.take(derived, None)
    activation, gated = FEED_FORWARD[kind]
    if fields.tensors is not None:
        tied = "lm_head.weight" not in fields.tensors
    layers = fields.take("num_layers")
    return t5(
        width=fields.take("d_model"),
        layers=layers,
        decoder_layers=fields.take("num_decoder_layers", layers),
        heads=fields.take("num_heads"),
        head_dim=fields.take("d_kv"),
        hidden=fields.take("d_ff"),
        activation=activation,
        gated=gated,
        tied=tied,
        scaled=scaled,
        buckets=fields.take("relative_attention_num_buckets", 32),
        max_distance=fields.take("relative_attention_max_distance", 128),
        epsilon=fields.take("layer_norm_epsilon", 1e-6),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a T5 model."""
    tied, scaled = model.head.tied, model.head.scale != 1.0
    config = _write(model, "t5", "T5ForConditionalGeneration")
    return config | ({"scale_decoder_outputs": scaled} if scaled != tied else {})


def write_mt5(model: ModelConfig) -> dict:
    """The config.json of an mT5 model."""
    return _write(model, "mt5", "MT5ForConditionalGeneration")


def write_umt5(model: ModelConfig) -> dict:
    """The config.json of a umT5 model."""
    return write(model) | _write(model, "umt5", "UMT5ForConditionalGeneration")


def _write(model: ModelConfig, model_type: str, architecture: str) -> dict:
    block = model.encoder.blocks[0]
    positions = model.encoder.positions or block.attention.positions
    kinds = {kind: name for name, kind in FEED_FORWARD.items()}
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "d_model": model.width,
        "num_layers": model.encoder.layers,
        "num_decoder_layers": model.decoder.layers,
        "num_heads": block.attention.heads,
        "d_kv": block.attention.head_dim,
        "d_ff": block.ffn.hidden,
        "feed_forward_proj": kinds[block.ffn.activation, block.ffn.gated],
        "tie_word_embeddings": model.head.tied,
        "relative_attention_num_buckets": positions.buckets,
        "relative_attention_max_distance": positions.max_distance,
        "layer_norm_epsilon": block.residual.norm.epsilon,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "vocab_size": model.vocab_size,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As T5's own names say: a block is a list of layers, attention first."""
    return [
        Rule("embedder/embedding", "shared.weight"),
        *_stack_rules("encoder", ["attention"], model.encoder.blocks[0].ffn.gated),
        *_stack_rules(
            "decoder", ["attention", "cross_attention"], model.encoder.blocks[0].ffn.gated
        ),
        Rule("head/kernel", "lm_head.weight"),
    ]


def _stack_rules(stack: str, attentions: list[str], gated: bool) -> list[Rule]:
    ours, theirs, rules = f"{stack}/*", f"{stack}.block.{{layer}}.layer", []
    for number, name in enumerate(attentions):
        module = f"{theirs}.{number}." + ("EncDecAttention" if number else "SelfAttention")
        rules += [
            Rule(f"{ours}/{name}/query/kernel", f"{module}.q.weight", Linear()),
            Rule(f"{ours}/{name}/key/kernel", f"{module}.k.weight", Linear()),
            Rule(f"{ours}/{name}/value/kernel", f"{module}.v.weight", Linear()),
            Rule(f"{ours}/{name}/out/kernel", f"{module}.o.weight", Linear(2)),
            Rule(f"{ours}/{name}_norm/scale", f"{theirs}.{number}.layer_norm.weight"),
        ]
    last = f"{theirs}.{len(attentions)}"
    dense = f"{last}.DenseReluDense"
    bias = f"{stack}.block.{{layer}}.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        *rules,
        Rule(f"{stack}/positions/embedding", bias.format(layer=0)),
        Rule(f"{ours}/attention/positions/embedding", bias),  # umT5
        Rule(f"{ours}/ffn/gate/kernel", f"{dense}.wi_0.weight", Linear()),
        Rule(f"{ours}/ffn/up/kernel", f"{dense}.wi_1.weight" if gated else f"{dense}.wi.weight",
             Linear()),
        Rule(f"{ours}/ffn/down/kernel", f"{dense}.wo.weight", Linear()),
        Rule(f"{ours}/ffn_norm/scale", f"{last}.layer_norm.weight"),
        Rule(f"{stack}/final_norm/scale", f"{stack}.final_layer_norm.weight"),
    ]  # fmt: skip


def _family(read, write) -> Family:
    return Family(
        read,
        write,
        rules,
        ignored_fields={
            "dropout_rate": "dropout, which a run chooses",
            "classifier_dropout": "dropout, which a run chooses",
            "initializer_factor": "of training from scratch",
            "n_positions": "relative positions have no end",
            "output_past": "an option of a call",
            "scalable_attention": "how umT5's trainer stored what was converted from it",
        },
        unread_tensors={
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight": (
                "cross-attention has no positions; some old checkpoints store a table all the same"
            ),
        },
        tied={
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
            "lm_head.weight": "shared.weight",
        },
    )


FAMILIES = {
    "t5": _family(read, write),
    "mt5": _family(read_mt5, write_mt5),
    "umt5": _family(read_umt5, write_umt5),
}
