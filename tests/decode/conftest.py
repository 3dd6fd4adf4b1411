import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn import parameters
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.t5 import t5_1_0, t5_1_1
from t5x_lite.nn.transformer import Transformer

PRESETS = {"llama": llama, "gpt2": gpt2, "t5_1_0": t5_1_0, "t5_1_1": t5_1_1, "bert": bert}
VOCAB = 100  # of 128 physical rows: the rest must never be chosen


@functools.cache
def _tiny(name):
    """A tiny model with NumPy's weights: compiling an initialiser takes longer than all the rest.

    They are large enough for its tokens to depend on what stands before them.
    """
    config = PRESETS[name]("tiny", vocab_size=VOCAB)
    rng = np.random.default_rng(1)

    def value(path, shape):
        noise = rng.standard_normal(shape.shape, np.float32)
        return jnp.asarray(1 + 0.1 * noise if path[-1].key == "scale" else 0.1 * noise)

    shapes, _ = parameters.abstract(config)
    return Transformer(config), jax.tree_util.tree_map_with_path(value, shapes)


@pytest.fixture(scope="session")
def tiny():
    return _tiny
