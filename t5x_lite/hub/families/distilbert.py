"""DistilBERT in Hugging Face's form."""

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.heads import ANSWERS, TOKENS, Head, first_token
from t5x_lite.hub.rules import Rule, linear_rules, norm_rules
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import MaskedLMHead, NoHead
from t5x_lite.nn.presets.distilbert import distilbert, distilbert_encoder

PRESETS = {"DistilBertModel": distilbert_encoder, "DistilBertForMaskedLM": distilbert}


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("activation", "gelu")
    fields.expect("tie_word_embeddings", True)
    architecture = fields.architecture or "DistilBertModel"
    if architecture not in PRESETS:
        raise UserError(f"architecture {architecture} is unknown; there are {', '.join(PRESETS)}.")
    return PRESETS[architecture](
        "base",
        width=fields.take("dim"),
        layers=fields.take("n_layers"),
        heads=fields.take("n_heads"),
        hidden=fields.take("hidden_dim"),
        positions=fields.take("max_position_embeddings", 512),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    block = model.encoder.blocks[0]
    heads = {MaskedLMHead: "DistilBertForMaskedLM", NoHead: "DistilBertModel"}
    return {
        "model_type": "distilbert",
        "architectures": [heads[type(model.head)]],
        "dim": model.width,
        "n_layers": model.encoder.layers,
        "n_heads": block.attention.heads,
        "hidden_dim": block.ffn.hidden,
        "max_position_embeddings": model.encoder.positions.max_length,
        "activation": "gelu",
        "vocab_size": model.vocab_size,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As DistilBERT's own names say; the bare model's tensors lack the first "distilbert."."""
    embeddings, layer = "distilbert.embeddings", "distilbert.transformer.layer.{layer}"
    ours = "encoder/*"
    return [
        Rule("embedder/embedding", f"{embeddings}.word_embeddings.weight"),
        Rule("encoder/positions/embedding", f"{embeddings}.position_embeddings.weight"),
        *norm_rules("encoder/input_norm", f"{embeddings}.LayerNorm"),
        *linear_rules(f"{ours}/attention/query", f"{layer}.attention.q_lin"),
        *linear_rules(f"{ours}/attention/key", f"{layer}.attention.k_lin"),
        *linear_rules(f"{ours}/attention/value", f"{layer}.attention.v_lin"),
        *linear_rules(f"{ours}/attention/out", f"{layer}.attention.out_lin", inputs=2),
        *norm_rules(f"{ours}/attention_norm", f"{layer}.sa_layer_norm"),
        *linear_rules(f"{ours}/ffn/up", f"{layer}.ffn.lin1"),
        *linear_rules(f"{ours}/ffn/down", f"{layer}.ffn.lin2"),
        *norm_rules(f"{ours}/ffn_norm", f"{layer}.output_layer_norm"),
        *linear_rules("head/transform", "vocab_transform"),
        *norm_rules("head/norm", "vocab_layer_norm"),
        Rule("head/bias", "vocab_projector.bias"),
    ]


FAMILIES = {
    "distilbert": Family(
        read,
        write,
        rules,
        ignored_fields={
            "dropout": "dropout, which a run chooses",
            "attention_dropout": "dropout, which a run chooses",
            "qa_dropout": "dropout, which a run chooses",
            "seq_classif_dropout": "dropout, which a run chooses",
            "sinusoidal_pos_embds": "initial values of the positions, which are stored and trained",
            "tie_weights_": "always tied; written by versions before 3",
        },
        ignored_tensors={
            r"(distilbert\.)?embeddings\.position_ids": "counts from 0",
        },
        unread_tensors={
            r"vocab_(transform|layer_norm|projector)\.(weight|bias)": (
                "the bare model doesn't read the masked-LM head"
            ),
        },
        tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        base_prefix="distilbert.",
        heads={
            "DistilBertForSequenceClassification": Head(
                first_token("relu", dropout=0.2),
                {"pooler": "pre_classifier", "classifier": "classifier"},
            ),
            "DistilBertForTokenClassification": TOKENS,
            "DistilBertForQuestionAnswering": ANSWERS,
        },
        base_head=NoHead(),
    )
}
