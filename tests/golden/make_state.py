"""Writes a whole training state, with what its model computes, that every later version must load.

`cd tests/golden && python make_state.py state_1`: run it once per format, commit the result, and
never again: it guards the names of parameters and optimizer state and what they mean.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import losses, optim, schedules
from t5x_lite.checkpoint import Checkpointer
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.transformer import Transformer
from t5x_lite.train.identity import model_identity
from t5x_lite.train.state import init_state, to_tree

SHAPE = {"width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 16, "vocab_size": 14}
MODEL = dataclasses.replace(llama("tiny", **SHAPE), vocab_multiple=8)
OPTIMIZER = optim.AdamW(schedules.constant(1e-3))


def logits(params) -> np.ndarray:
    """The model's logits for fourteen tokens, without the vocabulary's padding."""
    tokens = jnp.arange(14, dtype=jnp.int32)[None]
    output = Transformer(MODEL).apply({"params": params}, {"tokens": tokens})
    return np.asarray(losses.logits(output))[..., :14]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    transform = OPTIMIZER.build(parameters.abstract(MODEL)[1])
    state = jax.jit(lambda: init_state(MODEL, transform, 5))()
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(1, to_tree(state), {"model": model_identity(MODEL), "ema": False})
    np.save(folder / "logits.npy", logits(state.params))
