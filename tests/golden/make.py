"""Writes the checkpoint that every later version must load.

`python tests/golden/make.py DIRECTORY`: run it once per format, commit the result as
`tests/golden/format_<number>`, and never again. Orbax writes the directory's path into the files,
so give one that says nothing.
"""

import sys

import jax.numpy as jnp

from t5x_lite.checkpoint import Checkpointer

META = {"seed": 17, "data": {"cursor": 640, "fingerprint": "abc"}, "rate": 0.1}


def tree():
    """Every slot of a training state, in the dtypes that states hold."""
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) / 7
    return {
        "params": {"decoder": {"norm": {"scale": x[0]}, "layers": {"kernel": x}}},
        "frozen": {"base": x.astype(jnp.bfloat16)},
        "buffers": {"bias": x[:, 0] > 0.5},
        "ema": {},
        "opt_state": {"0": {"count": jnp.asarray(3, jnp.int32), "mu": -x}},
        "step": jnp.asarray(20, jnp.int32),
    }


if __name__ == "__main__":
    with Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.save(20, tree(), META)
