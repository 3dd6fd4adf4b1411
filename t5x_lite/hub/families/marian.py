"""Marian (Junczys-Dowmunt et al. 2018) in Hugging Face's form: opus-mt's translation models."""

from t5x_lite.hub.families import Family
from t5x_lite.hub.families.bart import IGNORED_FIELDS, IGNORED_TENSORS, TIED, read_shape, rules
from t5x_lite.hub.families.bart import write_shape as write_like_bart
from t5x_lite.hub.fields import Fields
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import FixedBiasLMHead
from t5x_lite.nn.presets.transformer import encoder_decoder


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json: the transformer of 2017, with biases in attention too."""
    fields.expect("normalize_embedding", False)
    fields.expect("static_position_embeddings", True)
    fields.expect("share_encoder_decoder_embeddings", True)
    shape = read_shape(fields)
    fields.expect("decoder_vocab_size", shape["vocab_size"])
    return encoder_decoder(**shape, attention_bias=True, head=FixedBiasLMHead(tied=True))


def write(model: ModelConfig) -> dict:
    """The config.json of a model; by custom the last word is padding, and starts a translation."""
    padding = model.vocab_size - 1
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        **write_like_bart(model),
        "static_position_embeddings": True,
        "share_encoder_decoder_embeddings": True,
        "decoder_vocab_size": model.vocab_size,
        "eos_token_id": 0,
        "pad_token_id": padding,
        "decoder_start_token_id": padding,
    }


FAMILIES = {
    "marian": Family(
        read,
        write,
        rules,
        ignored_fields={
            **IGNORED_FIELDS,
            "max_position_embeddings": "sines and cosines are computed and have no end",
            "extra_pos_embeddings": "rows of a table that isn't read",
        },
        ignored_tensors={
            **IGNORED_TENSORS,
            r"model\.(encoder|decoder)\.embed_positions\.weight": (
                "sines and cosines, which are computed; older checkpoints store them all the same"
            ),
        },
        tied=TIED,
    )
}
