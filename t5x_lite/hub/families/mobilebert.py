"""MobileBERT in Hugging Face's form."""

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rules import Linear, Rule, linear_rules, norm_rules
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import ExtendedMaskedLMHead, Pooler
from t5x_lite.nn.presets.mobilebert import mobilebert, mobilebert_encoder

LANGUAGE_MODELS = ("MobileBertForMaskedLM", "MobileBertForPreTraining")
ACTIVATIONS = ("relu", "gelu")
# The published form; the paper's teacher (IB-BERT) and its ablations have others.
FORM = {
    "trigram_input": True, "use_bottleneck": True, "use_bottleneck_attention": False,
    "key_query_shared_bottleneck": True, "normalization_type": "no_norm",
    "tie_word_embeddings": True,
}  # fmt: skip


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    for name, value in FORM.items():
        fields.expect(name, value)
    fields.expect("hidden_act", *ACTIVATIONS)
    bottleneck = fields.take("intra_bottleneck_size", 128)
    fields.expect("true_hidden_size", bottleneck)
    architecture = fields.architecture or "MobileBertModel"
    activated = fields.take("classifier_activation", True)
    shape = {
        "width": fields.take("hidden_size"),
        "layers": fields.take("num_hidden_layers"),
        "heads": fields.take("num_attention_heads"),
        "hidden": fields.take("intermediate_size"),
        "embedding": fields.take("embedding_size", 128),
        "bottleneck": bottleneck,
        "ffns": fields.take("num_feedforward_networks", 4),
        "positions": fields.take("max_position_embeddings", 512),
        "types": fields.take("type_vocab_size", 2),
        "epsilon": fields.take("layer_norm_eps", 1e-12),
        "activation": fields.take("hidden_act", "relu"),
        "vocab_size": fields.take("vocab_size"),
    }
    if architecture in LANGUAGE_MODELS:
        return mobilebert("base", **shape)
    if architecture != "MobileBertModel":
        known = ", ".join(("MobileBertModel", *LANGUAGE_MODELS))
        raise UserError(f"architecture {architecture} is unknown; there are {known}.")
    return mobilebert_encoder("base", pooler="tanh" if activated else None, **shape)


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    block, head = model.encoder.blocks[0], model.head
    heads = {ExtendedMaskedLMHead: "MobileBertForMaskedLM", Pooler: "MobileBertModel"}
    return {
        "model_type": "mobilebert",
        "architectures": [heads[type(head)]],
        **FORM,
        "hidden_size": model.width,
        "num_hidden_layers": model.encoder.layers,
        "num_attention_heads": block.attention.heads,
        "intermediate_size": block.ffn.hidden,
        "embedding_size": model.embedder.width,
        "intra_bottleneck_size": block.width,
        "num_feedforward_networks": block.ffns,
        "max_position_embeddings": model.encoder.positions.max_length,
        "type_vocab_size": model.embedder.types,
        "layer_norm_eps": head.norm.epsilon if hasattr(head, "norm") else 1e-12,
        "hidden_act": block.ffn.activation,
        "classifier_activation": isinstance(head, Pooler) and head.activation is not None,
        "vocab_size": model.vocab_size,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As MobileBERT's own names say; the bare model's tensors lack the first "mobilebert."."""
    embeddings, predictions = "mobilebert.embeddings", "cls.predictions"
    return [
        Rule("embedder/embedding", f"{embeddings}.word_embeddings.weight"),
        Rule("embedder/token_types", f"{embeddings}.token_type_embeddings.weight"),
        *linear_rules("embedder/projection", f"{embeddings}.embedding_transformation"),
        Rule("encoder/positions/embedding", f"{embeddings}.position_embeddings.weight"),
        *norm_rules("encoder/input_norm", f"{embeddings}.LayerNorm"),
        *_layer_rules("encoder/*", "mobilebert.encoder.layer.{layer}", model),
        *linear_rules("head/pooler", "mobilebert.pooler.dense"),
        *linear_rules("head/transform", f"{predictions}.transform.dense"),
        *norm_rules("head/norm", f"{predictions}.transform.LayerNorm"),
        Rule("head/kernel", f"{predictions}.dense.weight", Linear()),
        Rule("head/bias", f"{predictions}.bias"),
    ]


def _layer_rules(ours: str, theirs: str, model: ModelConfig) -> list[Rule]:
    result = []
    for name, their_name in (("input", "input"), ("attention_input", "attention")):
        result += _joined_rules(f"{ours}/{name}", f"{theirs}.bottleneck.{their_name}")
    for name in ("query", "key", "value"):
        result += linear_rules(f"{ours}/attention/{name}", f"{theirs}.attention.self.{name}")
    result += linear_rules(f"{ours}/attention/out", f"{theirs}.attention.output.dense", inputs=2)
    result += norm_rules(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm")
    ffns = model.encoder.blocks[0].ffns
    for number in range(ffns):
        # The last one stands in the layer itself.
        where = theirs if number == ffns - 1 else f"{theirs}.ffn.{number}"
        result += linear_rules(f"{ours}/ffn_{number}/up", f"{where}.intermediate.dense")
        result += linear_rules(f"{ours}/ffn_{number}/down", f"{where}.output.dense")
        result += norm_rules(f"{ours}/ffn_{number}_norm", f"{where}.output.LayerNorm")
    return [*result, *_joined_rules(f"{ours}/out", f"{theirs}.output.bottleneck")]


def _joined_rules(ours: str, theirs: str) -> list[Rule]:
    return [
        *linear_rules(ours, f"{theirs}.dense"),
        *norm_rules(f"{ours}_norm", f"{theirs}.LayerNorm"),
    ]


FAMILIES = {
    "mobilebert": Family(
        read,
        write,
        rules,
        ignored_fields={
            "hidden_dropout_prob": "dropout, which a run chooses",
            "attention_probs_dropout_prob": "dropout, which a run chooses",
            "classifier_dropout": "dropout, which a run chooses",
        },
        ignored_tensors={
            r"(mobilebert\.)?embeddings\.position_ids": "counts from 0",
        },
        unread_tensors={
            r"mobilebert\.pooler\.dense\.(weight|bias)": "the head doesn't read it",
            r"cls\.seq_relationship\.(weight|bias)": "the masked-LM head doesn't read it",
            r"cls\.predictions\.(transform\..*|dense\.weight|(decoder\.)?bias)": (
                "the bare model doesn't read the masked-LM head"
            ),
        },
        tied={
            "cls.predictions.decoder.weight": "mobilebert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        base_prefix="mobilebert.",
        base_head=Pooler(None),
    )
}
