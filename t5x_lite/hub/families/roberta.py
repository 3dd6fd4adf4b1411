"""RoBERTa in Hugging Face's form."""

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.families.bert import layer_rules
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.heads import ANSWERS, TOKENS, Head, first_token
from t5x_lite.hub.rules import Rule, linear_rules, norm_rules
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import MaskedLMHead, Pooler
from t5x_lite.nn.presets.roberta import roberta, roberta_encoder

PRESETS = {"RobertaModel": roberta_encoder, "RobertaForMaskedLM": roberta}


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("hidden_act", "gelu")
    fields.expect("position_embedding_type", "absolute")
    fields.expect("is_decoder", False)
    fields.expect("add_cross_attention", False)
    fields.expect("tie_word_embeddings", True)
    architecture = fields.architecture or "RobertaModel"
    if architecture not in PRESETS:
        raise UserError(f"architecture {architecture} is unknown; there are {', '.join(PRESETS)}.")
    # The first token's position is the padding token's number plus 1.
    offset = fields.take("pad_token_id", 1) + 1
    return PRESETS[architecture](
        "base",
        width=fields.take("hidden_size"),
        layers=fields.take("num_hidden_layers"),
        heads=fields.take("num_attention_heads"),
        hidden=fields.take("intermediate_size"),
        positions=fields.take("max_position_embeddings", 512) - offset,
        offset=offset,
        types=fields.take("type_vocab_size", 2),
        epsilon=fields.take("layer_norm_eps", 1e-12),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    block, positions = model.encoder.blocks[0], model.encoder.positions
    heads = {MaskedLMHead: "RobertaForMaskedLM", Pooler: "RobertaModel"}
    return {
        "model_type": "roberta",
        "architectures": [heads[type(model.head)]],
        "hidden_size": model.width,
        "num_hidden_layers": model.encoder.layers,
        "num_attention_heads": block.attention.heads,
        "intermediate_size": block.ffn.hidden,
        "max_position_embeddings": positions.offset + positions.max_length,
        "pad_token_id": positions.offset - 1,
        "type_vocab_size": model.embedder.types,
        "layer_norm_eps": block.residual.norm.epsilon,
        "hidden_act": "gelu",
        "vocab_size": model.vocab_size,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """BERT's names but for the head; the bare model's tensors lack the first "roberta."."""
    embeddings = "roberta.embeddings"
    return [
        Rule("embedder/embedding", f"{embeddings}.word_embeddings.weight"),
        Rule("embedder/token_types", f"{embeddings}.token_type_embeddings.weight"),
        Rule("encoder/positions/embedding", f"{embeddings}.position_embeddings.weight"),
        *norm_rules("encoder/input_norm", f"{embeddings}.LayerNorm"),
        *layer_rules(
            "roberta.encoder.layer.{layer}",
            attention={name: f"self.{name}" for name in ("query", "key", "value")},
        ),
        *linear_rules("head/pooler", "roberta.pooler.dense"),
        *linear_rules("head/transform", "lm_head.dense"),
        *norm_rules("head/norm", "lm_head.layer_norm"),
        Rule("head/bias", "lm_head.bias"),
    ]


FAMILIES = {
    "roberta": Family(
        read,
        write,
        rules,
        ignored_fields={
            "hidden_dropout_prob": "dropout, which a run chooses",
            "attention_probs_dropout_prob": "dropout, which a run chooses",
            "classifier_dropout": "dropout, which a run chooses",
        },
        ignored_tensors={
            r"(roberta\.)?embeddings\.position_ids": "counts from 0",
        },
        unread_tensors={
            r"roberta\.pooler\.dense\.(weight|bias)": "the head doesn't read it",
            r"lm_head\.((dense|layer_norm)\..*|(decoder\.)?bias)": (
                "the bare model doesn't read the masked-LM head"
            ),
        },
        tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        base_prefix="roberta.",
        heads={
            "RobertaForSequenceClassification": Head(
                first_token("tanh", input_dropout=0.1),
                {"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
            ),
            "RobertaForTokenClassification": TOKENS,
            "RobertaForQuestionAnswering": ANSWERS,
        },
    )
}
