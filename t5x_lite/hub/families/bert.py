"""BERT in Hugging Face's form."""

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.heads import ANSWERS, TOKENS, Head, first_token, without_pairs
from t5x_lite.hub.rules import Rule, linear_rules, norm_rules
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import MaskedLMHead, PairedLMHead, Pooler
from t5x_lite.nn.presets.bert import bert, bert_encoder, bert_pretraining

PRESETS = {
    "BertModel": bert_encoder,
    "BertForMaskedLM": bert,
    "BertForPreTraining": bert_pretraining,
}


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("hidden_act", "gelu")
    fields.expect("position_embedding_type", "absolute")
    fields.expect("is_decoder", False)
    fields.expect("add_cross_attention", False)
    fields.expect("tie_word_embeddings", True)
    # TinyBERT's files have these besides; other values would be another model.
    fields.expect("emb_size", fields.take("hidden_size"))
    fields.expect("cell", {})
    fields.expect("structure", [])
    fields.expect("pre_trained", "")
    architecture = fields.architecture or "BertModel"
    if architecture not in PRESETS:
        raise UserError(f"architecture {architecture} is unknown; there are {', '.join(PRESETS)}.")
    if without_pairs(fields, "cls.seq_relationship.weight"):  # TinyBERT's, of whatever class
        architecture = "BertForMaskedLM"
    return PRESETS[architecture](
        "base",
        width=fields.take("hidden_size"),
        layers=fields.take("num_hidden_layers"),
        heads=fields.take("num_attention_heads"),
        hidden=fields.take("intermediate_size"),
        positions=fields.take("max_position_embeddings", 512),
        types=fields.take("type_vocab_size", 2),
        epsilon=fields.take("layer_norm_eps", 1e-12),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    block = model.encoder.blocks[0]
    heads = {MaskedLMHead: "BertForMaskedLM", Pooler: "BertModel"}
    heads[PairedLMHead] = "BertForPreTraining"
    return {
        "model_type": "bert",
        "architectures": [heads[type(model.head)]],
        "hidden_size": model.width,
        "num_hidden_layers": model.encoder.layers,
        "num_attention_heads": block.attention.heads,
        "intermediate_size": block.ffn.hidden,
        "max_position_embeddings": model.encoder.positions.max_length,
        "type_vocab_size": model.embedder.types,
        "layer_norm_eps": block.residual.norm.epsilon,
        "hidden_act": "gelu",
        "vocab_size": model.vocab_size,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As BERT's own names say; the bare model's tensors lack the first "bert."."""
    layer, embeddings = "bert.encoder.layer.{layer}", "bert.embeddings"
    transform = "cls.predictions.transform"
    return [
        Rule("embedder/embedding", f"{embeddings}.word_embeddings.weight"),
        Rule("embedder/token_types", f"{embeddings}.token_type_embeddings.weight"),
        Rule("encoder/positions/embedding", f"{embeddings}.position_embeddings.weight"),
        *norm_rules("encoder/input_norm", f"{embeddings}.LayerNorm"),
        *layer_rules(
            layer,
            attention={name: f"self.{name}" for name in ("query", "key", "value")},
        ),
        *linear_rules("head/pooler", "bert.pooler.dense"),
        *linear_rules("head/transform", f"{transform}.dense"),
        *norm_rules("head/norm", f"{transform}.LayerNorm"),
        Rule("head/bias", "cls.predictions.bias"),
        *linear_rules("head/pairs", "cls.seq_relationship"),
    ]


def layer_rules(layer: str, attention: dict[str, str]) -> list[Rule]:
    """A layer whose parts have BERT's names; `attention` names the three products."""
    ours = "encoder/*"
    return [
        *(
            rule
            for name, theirs in attention.items()
            for rule in linear_rules(f"{ours}/attention/{name}", f"{layer}.attention.{theirs}")
        ),
        *linear_rules(f"{ours}/attention/out", f"{layer}.attention.output.dense", inputs=2),
        *norm_rules(f"{ours}/attention_norm", f"{layer}.attention.output.LayerNorm"),
        *linear_rules(f"{ours}/ffn/up", f"{layer}.intermediate.dense"),
        *linear_rules(f"{ours}/ffn/down", f"{layer}.output.dense"),
        *norm_rules(f"{ours}/ffn_norm", f"{layer}.output.LayerNorm"),
    ]


FAMILIES = {
    "bert": Family(
        read,
        write,
        rules,
        ignored_fields={
            "hidden_dropout_prob": "dropout, which a run chooses",
            "attention_probs_dropout_prob": "dropout, which a run chooses",
            "classifier_dropout": "dropout, which a run chooses",
        },
        ignored_tensors={
            r"(bert\.)?embeddings\.position_ids": "counts from 0",
        },
        unread_tensors={
            r"bert\.pooler\.dense\.(weight|bias)": "the head doesn't read it",
            r"cls\.seq_relationship\.(weight|bias)": "the masked-LM head doesn't read it",
            r"cls\.predictions\.(transform\..*|(decoder\.)?bias)": (
                "the bare model doesn't read the masked-LM head"
            ),
            r"fit_dense\.(weight|bias)": "TinyBERT's map to its teacher's width, of distillation",
        },
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        old_names={"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
        base_prefix="bert.",
        heads={
            "BertForSequenceClassification": Head(
                first_token("tanh"), {"pooler": "bert.pooler.dense", "classifier": "classifier"}
            ),
            "BertForTokenClassification": TOKENS,
            "BertForQuestionAnswering": ANSWERS,
        },
    )
}
