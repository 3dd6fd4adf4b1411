"""ModernBERT in Hugging Face's form."""

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rope import rotary_of, write_rotary
from t5x_lite.hub.rules import Linear, Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import MaskedLMHead, NoHead
from t5x_lite.nn.presets.modernbert import modernbert, modernbert_encoder

PRESETS = {"ModernBertModel": modernbert_encoder, "ModernBertForMaskedLM": modernbert}
FULL, SLIDING = "full_attention", "sliding_attention"
BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("hidden_activation", "gelu")
    fields.expect("classifier_activation", "gelu")
    for name in BIASES:
        fields.expect(name, False)
    fields.expect("decoder_bias", True)
    fields.expect("tie_word_embeddings", True)
    architecture = fields.architecture or "ModernBertModel"
    if architecture not in PRESETS:
        raise UserError(f"architecture {architecture} is unknown; there are {', '.join(PRESETS)}.")
    layers = fields.take("num_hidden_layers")
    positions, local_positions = _read_rotary(fields)
    return PRESETS[architecture](
        "base",
        width=fields.take("hidden_size"),
        layers=layers,
        heads=fields.take("num_attention_heads"),
        hidden=fields.take("intermediate_size"),
        every=_read_every(fields, layers),
        local=fields.take("local_attention", 128),
        positions=positions,
        local_positions=local_positions,
        epsilon=fields.take("norm_eps", 1e-5),
        vocab_size=fields.take("vocab_size"),
    )


def _read_every(fields: Fields, layers: int) -> int:
    """After how many layers attention is global again: version 4 says it, version 5 lists all."""
    kinds = fields.take("layer_types", None)
    full = [layer for layer in range(1, layers) if kinds and kinds[layer] == FULL]
    every = fields.take("global_attn_every_n_layers", full[0] if full else layers if kinds else 3)
    if every < 1:
        raise UserError(f"global_attn_every_n_layers={every} must be at least 1.")
    if kinds is not None and list(kinds) != _kinds(every, layers):
        raise UserError(
            f"config.json has layer_types={kinds}, which don't repeat after every {every} layers."
        )
    return every


def _kinds(every: int, layers: int) -> list[str]:
    return [SLIDING if layer % every else FULL for layer in range(layers)]


def _read_rotary(fields: Fields):
    """Global and local rotary positions."""
    fields.expect("rope_scaling", {})
    values = fields.take("rope_parameters", {})
    thetas = {
        FULL: fields.take("global_rope_theta", 160_000.0),
        SLIDING: fields.take("local_rope_theta", 10_000.0),
    }
    return [rotary_of(dict(values.get(kind) or {}), theta) for kind, theta in thetas.items()]


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    pattern = model.encoder.block
    first, local, every = pattern.first[0], pattern.blocks[0], len(pattern.blocks)
    heads = {MaskedLMHead: "ModernBertForMaskedLM", NoHead: "ModernBertModel"}
    rotary = {
        FULL: write_rotary(first.attention.positions)["rope_parameters"],
        SLIDING: write_rotary(local.attention.positions)["rope_parameters"],
    }
    window = {} if every == 1 else {"local_attention": 2 * (local.attention.window - 1)}
    return {
        "model_type": "modernbert",
        "architectures": [heads[type(model.head)]],
        "hidden_size": model.width,
        "num_hidden_layers": model.encoder.layers,
        "num_attention_heads": first.attention.heads,
        "intermediate_size": first.ffn.hidden,
        "global_attn_every_n_layers": every,
        **window,
        "rope_parameters": rotary,
        "norm_eps": model.encoder.final_norm.epsilon,
        "hidden_activation": "gelu",
        "vocab_size": model.vocab_size,
        "pad_token_id": None,  # by default one that a smaller vocabulary lacks
    }


def rules(model: ModelConfig) -> list[Rule]:
    """Queries, keys and values are one product, and so are gate and value of the FFN."""
    ours, theirs = "encoder/*", "model.layers.{layer}"
    parts = tuple(f"{ours}/attention/{name}/kernel" for name in ("query", "key", "value"))
    gated = (f"{ours}/ffn/gate/kernel", f"{ours}/ffn/up/kernel")
    return [
        Rule("embedder/embedding", "model.embeddings.tok_embeddings.weight"),
        Rule("encoder/input_norm/scale", "model.embeddings.norm.weight"),
        Rule(f"{ours}/attention_norm/scale", f"{theirs}.attn_norm.weight"),  # not of layer 0
        Rule(parts, f"{theirs}.attn.Wqkv.weight", Linear()),
        Rule(f"{ours}/attention/out/kernel", f"{theirs}.attn.Wo.weight", Linear(2)),
        Rule(f"{ours}/ffn_norm/scale", f"{theirs}.mlp_norm.weight"),
        Rule(gated, f"{theirs}.mlp.Wi.weight", Linear()),
        Rule(f"{ours}/ffn/down/kernel", f"{theirs}.mlp.Wo.weight", Linear()),
        Rule("encoder/final_norm/scale", "model.final_norm.weight"),
        Rule("head/transform/kernel", "head.dense.weight", Linear()),
        Rule("head/norm/scale", "head.norm.weight"),
        Rule("head/bias", "decoder.bias"),
    ]


FAMILIES = {
    "modernbert": Family(
        read,
        write,
        rules,
        ignored_fields={
            "attention_dropout": "dropout, which a run chooses",
            "embedding_dropout": "dropout, which a run chooses",
            "mlp_dropout": "dropout, which a run chooses",
            "classifier_dropout": "dropout, which a run chooses",
            "classifier_pooling": "of a head for classification",
            "max_position_embeddings": "rotary positions have no end",
            "position_embedding_type": "a remnant of BERT's, never read",
            "layer_norm_eps": "a remnant of BERT's; norm_eps is read",
            "initializer_cutoff_factor": "of training from scratch",
            "deterministic_flash_attn": "which kernel computes the same attention",
            "repad_logits_with_grad": "of training",
            "sparse_prediction": "of training: which tokens the loss looks at",
            "sparse_pred_ignore_index": "of training: which tokens the loss looks at",
        },
        unread_tensors={
            r"(head\.(dense|norm)\.weight|decoder\.bias)": (
                "the bare model doesn't read the masked-LM head"
            ),
        },
        tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        base_prefix="model.",
        base_head=NoHead(),
    )
}
