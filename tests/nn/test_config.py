"""Configs refuse what cannot work, with the number and the remedy."""

import dataclasses

import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn.heads import MaskedLMHead, Pooler
from t5x_lite.nn.layers import LayerNorm
from t5x_lite.nn.presets.gpt2 import gpt2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1."),
        ({"width": -4}, "width=-4 must be at least 1."),
        ({"vocab_multiple": 0}, "vocab_multiple=0 must be at least 1."),
        ({"dtype": "float16"}, "dtype='float16' must be one of float32, bfloat16."),
        (
            {"remat": "some"},
            "remat='some' must be one of none, minimal, save_qkv_proj, full, offload.",
        ),
        ({"encoder": None, "decoder": None}, "a model needs an encoder, a decoder, or both."),
        ({"encoder": None}, "a decoder has cross_attention exactly where there is an encoder."),
    ],
)
def test_models_refuse(models, change, message):
    with pytest.raises(UserError) as error:
        dataclasses.replace(models.tiny("t5_1_1"), **change)
    assert str(error.value) == message


def test_an_encoder_needs_a_decoder_that_reads_it(models):
    encoder = models.tiny("bert").encoder
    with pytest.raises(UserError, match="cross_attention exactly where there is an encoder"):
        dataclasses.replace(models.tiny("gpt2"), encoder=encoder)


def test_a_stack_has_layers(models):
    with pytest.raises(UserError, match="layers=0: a stack has at least one layer"):
        dataclasses.replace(models.tiny("gpt2").decoder, layers=0)


def test_lengths_beyond_learned_positions(models):
    with pytest.raises(UserError, match=r"length=1025 exceeds the model's 1024 learned positions"):
        models.tiny("gpt2").check_lengths(1025)
    models.tiny("gpt2").check_lengths(1024)
    models.tiny("t5_1_1").check_lengths(10**6, 10**6)


@pytest.mark.parametrize(
    ("family", "kind", "predicts"),
    [("bert", "encoder-only", "masked"), ("gpt2", "decoder-only", "next"),
     ("t5_1_0", "encoder-decoder", "next")],
)  # fmt: skip
def test_what_a_config_is(models, family, kind, predicts):
    config = models.tiny(family)
    assert (config.kind, config.predicts) == (kind, predicts)
    assert config.physical_vocab == 104


def test_heads_refuse_unknown_activations(models):
    with pytest.raises(UserError, match="unknown activation 'mish'"):
        MaskedLMHead("mish", LayerNorm())
    with pytest.raises(UserError, match="unknown activation 'mish'"):
        Pooler("mish")
    assert dataclasses.replace(models.tiny("bert"), head=Pooler()).predicts == "none"


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1])
def test_dropout_rates_lie_below_one(rate):
    with pytest.raises(UserError, match=rf"dropout={rate} must lie in \[0, 1\)"):
        gpt2("tiny", dropout=rate)
