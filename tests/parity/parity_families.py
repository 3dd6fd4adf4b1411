"""Every family beside `transformers`: every layer, greedy decoding, export, gradients."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import reference
import transformers
from cases import all_cases
from safetensors.numpy import load_file

from t5x_lite import losses
from t5x_lite.hub import weights
from t5x_lite.hub.convert import from_hf, to_hf
from t5x_lite.nn.transformer import Transformer

CASES = {case.name: case for case in all_cases()}
marks = {name: [pytest.mark.quick] if case.quick else [] for name, case in CASES.items()}
GENERATING = [name for name, case in CASES.items() if reference.generates(case.model)]
cases = pytest.mark.parametrize("name", [pytest.param(n, marks=marks[n]) for n in CASES])


@functools.cache
def published(name: str, root: pathlib.Path):
    """The reference model, and the folder that it was saved to."""
    model = reference.build(CASES[name])
    reference.save(model, root / name)
    return model, root / name


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@cases
@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_and_the_outputs_are_equal(root, name, scan):
    theirs, folder = published(name, root)
    model, params, _ = ours.load(folder, scan)
    assert model.kind == reference.kind_of(theirs)
    batches = reference.batches(CASES[name], model.kind, theirs.config.vocab_size)
    for batch in batches.values():
        ours.compare(ours.outputs(model, params, batch), reference.outputs(theirs, batch), batch)


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks[n]) for n in GENERATING])
def test_greedy_decoding_is_equal(root, name):
    theirs, folder = published(name, root)
    model, params, _ = ours.load(folder)
    assert model.predicts == "next"
    batch = reference.batches(CASES[name], model.kind, theirs.config.vocab_size)["whole"]
    expected = reference.greedy(theirs, batch)
    np.testing.assert_array_equal(ours.greedy(model, params, batch, expected.shape[1]), expected)


@cases
def test_transformers_loads_what_was_exported(root, name, tmp_path):
    theirs, folder = published(name, root)
    model = from_hf(str(folder), str(tmp_path / "run"))
    to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"))
    given, stored = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folder))
    assert set(given) == set(stored)
    assert all(np.array_equal(given[n], stored[n]) for n in stored)
    _, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_gradients_are_equal(root, name):
    theirs, folder = published(name, root)
    model, params, family = ours.load(folder)
    batch = reference.batches(CASES[name], model.kind, theirs.config.vocab_size)["whole"]
    tokens = batch["decoder_tokens" if model.kind == "encoder-decoder" else "tokens"]
    tokens = jnp.asarray(tokens, jnp.int32)

    def loss(params):
        out = Transformer(model).apply({"params": params}, ours.batch_of(model, batch))
        return -losses.token_logprobs(out, tokens).mean()

    given = dict(weights.save(model, family, ours.reader(jax.jit(jax.grad(loss))(params))))
    expected = reference.gradients(theirs, batch)
    # Some gradients are zero but for rounding: a key's bias moves all logits of a query alike.
    floor = 1e-7 * max(np.abs(value).max() for value in expected.values())
    for tensor in set(given) & set(expected):
        scale = np.abs(expected[tensor]).max() + floor / 2e-5
        np.testing.assert_allclose(given[tensor], expected[tensor], atol=2e-5 * scale, rtol=1e-4,
                                   err_msg=tensor)  # fmt: skip
    assert len(set(given) & set(expected)) >= len(expected) - 1
    assert isinstance(theirs, transformers.PreTrainedModel)
