"""Tiny models, with parameters and batches from NumPy: compiling an initialiser takes seconds."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite.nn import parameters
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.mixtral import mixtral
from t5x_lite.nn.presets.t5 import t5_1_1

SHAPE = {"width": 32, "layers": 2, "heads": 4, "vocab_size": 100}
FAMILIES = {
    "t5": (t5_1_1, {"head_dim": 8, "hidden": 48}),
    "bert": (bert, {}),
    "gpt2": (gpt2, {}),
    "llama": (llama, {"kv_heads": 2, "hidden": 48}),
    "mixtral": (mixtral, {"kv_heads": 2, "hidden": 48, "experts": 4, "top_k": 2}),
}


def _tiny(family, **options):
    preset, shape = FAMILIES[family]
    config = preset("tiny", **SHAPE, **shape, dropout=0.1, **options)
    return dataclasses.replace(config, vocab_multiple=8)  # four rows of padding


@pytest.fixture(scope="session")
def tiny():
    """`tiny(family, scan=…, …)`: a config with dropout and a padded vocabulary."""
    return _tiny


def _parameters(config):
    rng = np.random.default_rng(0)

    def value(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.1 * noise if path[-1].key == "scale" else 0.1 * noise

    shapes, _ = parameters.abstract(parameters.scanned(config))
    params = jax.tree_util.tree_map_with_path(value, shapes)
    return params if config.scan else jax.tree.map(np.asarray, parameters.unstack_layers(params))


@pytest.fixture(scope="session")
def initial():
    """`initial(config)`: parameters, the same whether scanned or unrolled."""
    return _parameters


def _stream(rng, vocab_size, length):
    """Rows of two packed documents each; rows 0 and 4 are padding, the others end in some."""
    ends = np.asarray([0, 8, 5, 7, 0, 8, 3, 6]) * length // 8
    cuts = np.asarray([0, 3, 2, 7, 0, 5, 3, 1])
    place = np.arange(length)[None, :]
    second = place >= cuts[:, None]
    segments = np.where(place < ends[:, None], 1 + second, 0)
    return {
        "tokens": rng.integers(1, vocab_size, segments.shape).astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": np.where(second, place - cuts[:, None], place).astype(np.int32),
    }


def _batch(config, seed=0, length=8):
    rng = np.random.default_rng(seed)
    batch = _stream(rng, config.vocab_size, length)
    batch["targets"] = rng.integers(1, config.vocab_size, (8, length)).astype(np.int32)
    chosen = rng.random((8, length)) < np.linspace(0.4, 1, 8)[:, None]
    batch["weights"] = (chosen & (batch["segments"] > 0)).astype(np.float32)
    if config.kind == "encoder-decoder":
        encoder = _stream(rng, config.vocab_size, length - 2)
        batch |= {f"encoder_{name}": value for name, value in encoder.items()}
    return batch


@pytest.fixture(scope="session")
def batch_of():
    """`batch_of(config, seed)`: eight rows with as many different numbers of targets."""
    return _batch
