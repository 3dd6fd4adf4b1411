"""What a checkpoint remembers of its run, and how a changed run is told."""

import dataclasses
import json
import pathlib

import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn.presets.gemma2 import gemma2
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.train import identity


def test_differences_name_each_leaf_that_differs():
    saved = {"model": {"width": 8, "decoder": {"layers": 2, "dropout": 0.1}}, "seed": 0}
    assert identity.differences(saved, saved) == []
    now = {"model": {"width": 8, "decoder": {"layers": 3, "dropout": 0.2}}, "seed": 1}
    assert identity.differences(saved, now) == [
        "model.decoder.layers: 2 → 3",
        "model.decoder.dropout: 0.1 → 0.2",
        "seed: 0 → 1",
    ]


def test_differences_name_what_one_side_lacks():
    assert identity.differences({"a": 1, "b": {"c": 2}}, {"a": 1, "d": 3}) == [
        "b: {'c': 2} → None",
        "d: None → 3",
    ]
    assert identity.differences({"data": "old"}, {"data": {"paths": ["x"]}}) == [
        "data: old → {'paths': ['x']}"
    ]
    assert identity.differences({"paths": ["x"]}, {"paths": ["x", "y"]}) == [
        "paths: ['x'] → ['x', 'y']"
    ]


def test_identity_of_a_model_survives_json_and_holds_what_it_computes():
    model = gpt2("tiny")
    known = identity.model_identity(model)
    assert json.loads(json.dumps(known)) == known
    assert known["decoder"]["block"]["attention"]["type"] == "AttentionConfig"
    # How it is compiled may change between a run and its resumption; what it computes may not.
    assert identity.model_identity(gpt2("tiny", scan=False, remat="full")) == known
    by_blocks = dataclasses.replace(model, attention_kernel="blockwise")
    assert identity.model_identity(by_blocks) == known
    assert "attention_kernel" not in known  # of checkpoints that were written before there was one
    assert identity.model_identity(gpt2("tiny", dtype="bfloat16")) != known
    assert identity.model_identity(gpt2("tiny", dropout=0.2)) != known
    # Two kinds with the same fields stay apart.
    rms, layer = ({"type": name, "epsilon": 1e-5} for name in ("RMSNorm", "LayerNorm"))
    norms = [identity.model_identity(m)["decoder"]["final_norm"] for m in (llama("tiny"), model)]
    assert norms == [rms, layer]


def test_another_run_is_refused_with_the_difference():
    now = {"model": identity.model_identity(gpt2("tiny")), "seed": 0}
    saved = json.loads(json.dumps({**now, "config": "STEPS = 3"}))
    identity.require_same(saved, now, pathlib.Path("runs/a"))

    changed = dataclasses.replace(gpt2("tiny"), width=64)
    with pytest.raises(UserError) as error:
        identity.require_same(
            saved, now | {"model": identity.model_identity(changed)}, pathlib.Path("runs/a")
        )
    assert str(error.value) == (
        "runs/a holds another run (model.width: 128 → 64): undo the change or give another "
        "--model_dir."
    )


def test_many_differences_are_cut_short_and_tuples_are_lists():
    saved = {"data": dict.fromkeys("abcdef", 1), "sizes": [1, 2]}
    identity.require_same(saved, {"sizes": (1, 2)}, pathlib.Path("runs/a"))
    with pytest.raises(UserError, match=r"data.d: 1 → 2; and 2 more\)") as error:
        identity.require_same(saved, {"data": dict.fromkeys("abcdef", 2)}, pathlib.Path("runs/a"))
    assert "\n" not in str(error.value)


def test_environment_is_recorded():
    record = json.loads(json.dumps(identity.environment()))
    assert record["devices"] == 8
    assert record["device_kind"] == "cpu"
    assert {"jax", "flax", "optax", "orbax-checkpoint", "grain"} <= record["packages"].keys()


def test_layers_of_a_pattern_are_compared_one_by_one():
    saved = json.loads(json.dumps(identity.model_identity(gemma2("tiny"))))
    now = json.loads(json.dumps(identity.model_identity(gemma2("tiny", window=32))))
    place = "decoder.block.blocks[0].attention.window"
    assert identity.differences(saved, now) == [f"{place}: 64 → 32"]
    # A field that a checkpoint of an older version lacks counts as None there too.
    del saved["decoder"]["block"]["blocks"][1]["attention"]["window"]
    assert identity.differences(saved, now) == [f"{place}: 64 → 32"]
