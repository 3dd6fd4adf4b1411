"""ALBERT in Hugging Face's form."""

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.heads import Head, first_token, without_pairs
from t5x_lite.hub.rules import Rule, linear_rules, norm_rules
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import MaskedLMHead, PairedLMHead, Pooler
from t5x_lite.nn.presets.albert import albert, albert_encoder, albert_pretraining

PRESETS = {
    "AlbertModel": albert_encoder,
    "AlbertForMaskedLM": albert,
    "AlbertForPreTraining": albert_pretraining,
}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    activation = fields.take("hidden_act", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"config.json has hidden_act={activation!r}; t5x_lite knows {', '.join(ACTIVATIONS)}."
        )
    fields.expect("position_embedding_type", "absolute")
    # Groups of layers that share among themselves only, and groups of several layers each: the
    # paper tries both (§4.5), no published model has them.
    fields.expect("num_hidden_groups", 1)
    fields.expect("inner_group_num", 1)
    fields.expect("tie_word_embeddings", True)
    architecture = fields.architecture or "AlbertModel"
    if architecture not in PRESETS:
        raise UserError(f"architecture {architecture} is unknown; there are {', '.join(PRESETS)}.")
    if without_pairs(fields, "sop_classifier.classifier.weight"):
        architecture = "AlbertForMaskedLM"
    return PRESETS[architecture](
        "base",
        width=fields.take("hidden_size"),
        layers=fields.take("num_hidden_layers"),
        heads=fields.take("num_attention_heads"),
        hidden=fields.take("intermediate_size"),
        embedding=fields.take("embedding_size", 128),
        positions=fields.take("max_position_embeddings", 512),
        types=fields.take("type_vocab_size", 2),
        epsilon=fields.take("layer_norm_eps", 1e-12),
        activation=ACTIVATIONS[activation],
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    block = model.encoder.blocks[0]
    heads = {MaskedLMHead: "AlbertForMaskedLM", Pooler: "AlbertModel"}
    heads[PairedLMHead] = "AlbertForPreTraining"
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "model_type": "albert",
        "architectures": [heads[type(model.head)]],
        "hidden_size": model.width,
        "num_hidden_layers": model.encoder.layers,
        "num_attention_heads": block.attention.heads,
        "intermediate_size": block.ffn.hidden,
        "embedding_size": model.embedder.width,
        "max_position_embeddings": model.encoder.positions.max_length,
        "type_vocab_size": model.embedder.types,
        "layer_norm_eps": block.residual.norm.epsilon,
        "hidden_act": names[block.ffn.activation],
        "vocab_size": model.vocab_size,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As ALBERT's own names say; the bare model's tensors lack the first "albert."."""
    embeddings, ours = "albert.embeddings", "encoder/*"
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    return [
        Rule("embedder/embedding", f"{embeddings}.word_embeddings.weight"),
        Rule("embedder/token_types", f"{embeddings}.token_type_embeddings.weight"),
        Rule("encoder/positions/embedding", f"{embeddings}.position_embeddings.weight"),
        *norm_rules("encoder/input_norm", f"{embeddings}.LayerNorm"),
        *linear_rules("encoder/input_projection", "albert.encoder.embedding_hidden_mapping_in"),
        *linear_rules(f"{ours}/attention/query", f"{layer}.attention.query"),
        *linear_rules(f"{ours}/attention/key", f"{layer}.attention.key"),
        *linear_rules(f"{ours}/attention/value", f"{layer}.attention.value"),
        *linear_rules(f"{ours}/attention/out", f"{layer}.attention.dense", inputs=2),
        *norm_rules(f"{ours}/attention_norm", f"{layer}.attention.LayerNorm"),
        *linear_rules(f"{ours}/ffn/up", f"{layer}.ffn"),
        *linear_rules(f"{ours}/ffn/down", f"{layer}.ffn_output"),
        *norm_rules(f"{ours}/ffn_norm", f"{layer}.full_layer_layer_norm"),
        *linear_rules("head/pooler", "albert.pooler"),
        *linear_rules("head/transform", "predictions.dense"),
        *norm_rules("head/norm", "predictions.LayerNorm"),
        Rule("head/bias", "predictions.bias"),
        *linear_rules("head/pairs", "sop_classifier.classifier"),
    ]


FAMILIES = {
    "albert": Family(
        read,
        write,
        rules,
        ignored_fields={
            "hidden_dropout_prob": "dropout, which a run chooses",
            "attention_probs_dropout_prob": "dropout, which a run chooses",
            "classifier_dropout_prob": "dropout, which a run chooses",
            "down_scale_factor": "of the authors' code, never read",
            "gap_size": "of the authors' code, never read",
            "net_structure_type": "of the authors' code, never read",
            "num_memory_blocks": "of the authors' code, never read",
            "layers_to_keep": "of the authors' code, never read",
        },
        ignored_tensors={
            r"(albert\.)?embeddings\.position_ids": "counts from 0",
        },
        unread_tensors={
            r"albert\.pooler\.(weight|bias)": "the masked-LM head doesn't read it",
            r"sop_classifier\.classifier\.(weight|bias)": "the masked-LM head doesn't read it",
            r"predictions\.((dense|LayerNorm)\..*|(decoder\.)?bias)": (
                "the bare model doesn't read the masked-LM head"
            ),
        },
        tied={
            "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
            "predictions.decoder.bias": "predictions.bias",
        },
        base_prefix="albert.",
        heads={
            "AlbertForSequenceClassification": Head(
                first_token("tanh"), {"pooler": "albert.pooler", "classifier": "classifier"}
            ),
        },
    )
}
