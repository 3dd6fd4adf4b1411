"""Small models and what the reference computed of them; tests/parity/make_golden.py wrote both."""

import json
import pathlib

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).with_name("golden")
# Families whose models are another's too, which is the one that export then writes.
TWINS = {"mt5": "t5"}
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.fixture(scope="module", params=NAMES)
def case(request, ours):
    folder = GOLDEN / request.param
    model, params, family = ours.load(folder)
    with np.load(folder / "expected.npz") as expected:
        return folder, model, params, family, dict(expected)


def test_outputs_equal_the_reference(case, ours):
    _, model, params, _, expected = case
    batch = {n.removeprefix("batch/"): v for n, v in expected.items() if n.startswith("batch/")}
    theirs = {n.removeprefix("out/"): v for n, v in expected.items() if n.startswith("out/")}
    assert theirs
    ours.compare(ours.outputs(model, params, batch), theirs, batch)


def test_greedy_decoding_equals_the_reference(case, ours):
    _, model, params, _, expected = case
    if model.predicts != "next":
        assert "greedy" not in expected
        return
    batch = {"tokens": expected["batch/tokens"]}
    batch["mask"] = np.ones_like(batch["tokens"])
    np.testing.assert_array_equal(
        ours.greedy(model, params, batch, expected["greedy"].shape[1]), expected["greedy"]
    )


def test_export_gives_back_what_was_imported(case, ours):
    folder, model, params, family, _ = case
    from safetensors.numpy import load_file

    stored, given = load_file(folder / "model.safetensors"), ours.exported(model, params, family)
    assert set(given) == set(stored)
    for name, value in stored.items():
        assert value.dtype == np.float16  # half the bytes
        assert given[name].dtype == np.float32
        np.testing.assert_array_equal(given[name], value.astype(np.float32), err_msg=name)


def test_config_survives_the_round_trip(case):
    from t5x_lite.hub.families import family_of, read_config, without_training, write_config

    folder, model, *_ = case
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    written = write_config(model)
    assert written["model_type"] == TWINS.get(model_type, model_type)
    for config in (written, family_of(model_type).config(model)):
        assert without_training(read_config(config)) == without_training(model)
