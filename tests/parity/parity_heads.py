"""Heads that no config of `transformers` makes, but a checkpoint does.

T5's heirs with heads of their own, as all published ones have (ours is exported, and theirs loads
it); a bare BART.
"""

import dataclasses
import json

import jax
import numpy as np
import ours
import pytest
import reference
import transformers
from cases import Case, all_cases
from safetensors import safe_open

from t5x_lite.hub.families import family_of, write_config
from t5x_lite.hub.source import write_tensors
from t5x_lite.nn import parameters
from t5x_lite.nn.presets import t5

SHAPE = {
    "width": 24, "layers": 2, "heads": 4, "head_dim": 6, "hidden": 40, "vocab_size": 61
}  # fmt: skip
MODELS = {
    "t5_1_1": ("T5ForConditionalGeneration", t5.t5_1_1("tiny", **SHAPE)),
    "byt5": ("T5ForConditionalGeneration", t5.byt5("tiny", **SHAPE, decoder_layers=3)),
    "mt5": ("MT5ForConditionalGeneration", t5.mt5("tiny", **SHAPE)),
    "umt5": ("UMT5ForConditionalGeneration", t5.umt5("tiny", **SHAPE)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_head_of_its_own_is_exported_and_computes_the_same(name, tmp_path):
    cls, model = MODELS[name]
    cls, model = getattr(transformers, cls), dataclasses.replace(model, vocab_multiple=8)
    config = write_config(model)
    if name == "mt5":  # which is a T5 1.1 as well, and was written as one
        config = family_of("mt5").write(model)
    params = jax.jit(lambda key: parameters.init(model, key))(jax.random.key(0))
    tensors = ours.exported(model, params, family_of(config["model_type"]))
    assert not np.array_equal(tensors["lm_head.weight"], tensors["shared.weight"])
    write_tensors(tmp_path, iter(tensors.items()), 1 << 20)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, _, _ = ours.load(tmp_path)
    assert dataclasses.replace(again, vocab_multiple=8).head == model.head
    theirs, info = cls.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    batch = reference.batches(Case(name, "", {}), model.kind, model.vocab_size)["right"]
    expected = reference.outputs(theirs.eval(), batch)
    if name == "umt5":  # scaled by version 5, not by version 4 nor by their trainer
        expected["logits"] *= model.width**0.5
    ours.compare(ours.outputs(model, params, batch), expected, batch)


def test_a_bare_bart_predicts_by_its_embeddings(tmp_path):
    case = next(case for case in all_cases() if case.name == "bart")
    theirs = reference.build(case)
    theirs.final_logits_bias.zero_()
    reference.save(theirs.model, tmp_path)
    model, params, family = ours.load(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "numpy") as stored:
        given = ours.exported(model, params, family)
        assert set(given) == set(stored.keys())
        assert all(np.array_equal(given[name], stored.get_tensor(name)) for name in given)
    assert write_config(model)["architectures"] == ["BartModel"]
    batch = reference.batches(case, model.kind, model.vocab_size)["right"]
    ours.compare(ours.outputs(model, params, batch), reference.outputs(theirs, batch), batch)
