"""GPT-3 beside GPT-2: nobody published its weights, so its own definition is the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.gpt3 import SIZES, gpt3
from t5x_lite.nn.transformer import Transformer

LENGTH = 16
SHAPE = {"width": 32, "layers": 4, "heads": 4, "vocab_size": 97, "positions": LENGTH}


@pytest.fixture(scope="module")
def logits(models):
    """Of GPT-2, and of GPT-3 with the same parameters and some window."""
    ours = gpt2("tiny", dropout=0.0, **SHAPE)
    params = models.random_params(ours)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, LENGTH)), jnp.int32)

    def of(window=None, **changes):
        model, given = ours, params
        if window is not None:
            model = gpt3("tiny", dropout=0.0, **SHAPE, head_dim=8, window=window)
            stacked = params["decoder"]["layers"]
            halves = {
                f"block_{n}": jax.tree.map(lambda leaf, n=n: leaf[n::2], stacked) for n in (0, 1)
            }
            given = {**params, "decoder": {**params["decoder"], "layers": halves}}
        model = dataclasses.replace(model, **changes)
        run = jax.jit(
            lambda p: losses.logits(Transformer(model).apply({"params": p}, {"tokens": tokens}))
        )
        return np.asarray(run(given))[..., :97]

    return of


def test_a_band_of_all_positions_is_gpt2(logits):
    np.testing.assert_allclose(logits(LENGTH), logits(), rtol=1e-6, atol=1e-6)


def test_a_narrower_band_changes_the_tokens_beyond_it_alone(logits):
    dense, banded = logits(), logits(5)
    np.testing.assert_allclose(banded[:, :5], dense[:, :5], rtol=1e-6, atol=1e-6)
    assert np.all(np.abs(banded[:, 5:] - dense[:, 5:]).max(axis=-1) > 1e-3)


def test_dense_and_banded_layers_alternate():
    windows = [block.attention.window for block in gpt3("175b").decoder.blocks]
    assert windows == [None, 256] * 48


def test_the_rows_are_as_printed_and_two_contradict_themselves():
    wide = [name for name, row in SIZES.items() if row["heads"] * row["head_dim"] != row["width"]]
    assert wide == ["1.3b", "13b"]
    assert [SIZES[name]["width"] for name in wide] == [2048, 5140]
