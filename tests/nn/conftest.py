"""Tiny models of every family, and a batch that holds padding and packed documents."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.presets.albert import albert
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.deepseek import deepseek_v3
from t5x_lite.nn.presets.gemma3 import gemma3
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.mixtral import mixtral
from t5x_lite.nn.presets.mobilebert import mobilebert
from t5x_lite.nn.presets.modernbert import modernbert
from t5x_lite.nn.presets.t5 import t5_1_0, t5_1_1, umt5
from t5x_lite.nn.presets.transformer import transformer
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import Sharding

SHAPE = {"width": 32, "layers": 2, "heads": 4, "vocab_size": 97}
T5_SHAPE = {**SHAPE, "head_dim": 8, "hidden": 48}
PRESETS = {
    "t5_1_0": (t5_1_0, T5_SHAPE),
    "t5_1_1": (t5_1_1, T5_SHAPE),
    "umt5": (umt5, T5_SHAPE),
    "transformer": (transformer, {**SHAPE, "hidden": 48}),
    "bert": (bert, SHAPE),
    "gpt2": (gpt2, SHAPE),
    "llama": (llama, {**SHAPE, "kv_heads": 2, "hidden": 48}),
    # A local layer, then a global one; caps that bend what random parameters give.
    "gemma3": (
        gemma3,
        {
            **SHAPE,
            "kv_heads": 2,
            "head_dim": 8,
            "hidden": 48,
            "window": 3,
            "logit_caps": (5.0, 5.0),
            "query_scalar": 8,
        },
    ),
    "deepseek_v3": (
        deepseek_v3,
        {
            **SHAPE,
            "hidden": 48,
            "content_dim": 6,
            "rotary_dim": 4,
            "value_dim": 5,
            "kv_rank": 10,
            "query_rank": 12,
            "expert_hidden": 12,
            "experts": 8,
            "layers": 3,
        },
    ),
    "mixtral": (mixtral, {**SHAPE, "kv_heads": 2, "hidden": 24, "experts": 4}),
    "albert": (albert, {**SHAPE, "embedding": 16}),
    "modernbert": (modernbert, {**SHAPE, "hidden": 48, "layers": 5, "local": 4}),
    "mobilebert": (mobilebert, {**SHAPE, "hidden": 24, "embedding": 12, "bottleneck": 16}),
}

# Documents by row: a full row, padding on the right, packed, and packed between padding.
SEGMENTS = [[1] * 8, [1] * 5 + [0] * 3, [1] * 3 + [2] * 5, [0, 1, 1, 2, 2, 2, 0, 0]]
ENCODER_SEGMENTS = [[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [2] * 4, [0, 1, 1, 1, 2, 0]]


def tiny(family: str, dropout: float = 0.0, **overrides) -> ModelConfig:
    """The family's preset in a small shape, with 7 rows of padding in its vocabulary."""
    preset, shape = PRESETS[family]
    small = preset("tiny", dropout=dropout, **shape)
    return dataclasses.replace(small, vocab_multiple=8, **overrides)


def random_params(config: ModelConfig, seed: int = 0):
    """Values without any zero or one: initial biases and scales would hide mistakes."""
    rng = np.random.default_rng(seed)
    # Drawn in the stacked layout, so that scanned and unrolled models get the same numbers.
    shapes, _ = parameters.abstract(parameters.scanned(config))

    def draw(path, leaf):
        kind, noise = path[-1].key, rng.normal(size=leaf.shape)
        value = {"scale": 1 + 0.2 * noise, "embedding": 0.7 * noise}.get(kind, 0.2 * noise)
        return jnp.asarray(value, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return params if config.scan else parameters.unstack_layers(params)


def positions_of(segments) -> np.ndarray:
    """Counts from 0 in each run of equal segments."""
    result = np.zeros_like(segments)
    for row, out in zip(segments, result, strict=True):
        for slot in range(1, len(row)):
            out[slot] = out[slot - 1] + 1 if row[slot] == row[slot - 1] else 0
    return result


def packed_batch(config: ModelConfig) -> dict[str, jax.Array]:
    """[4, 8] tokens (and [4, 6] of an encoder), no two alike, with padding and packing."""
    ids = np.random.default_rng(1).permutation(np.arange(1, SHAPE["vocab_size"]))
    segments, encoder_segments = np.array(SEGMENTS), np.array(ENCODER_SEGMENTS)
    batch = {
        "tokens": ids[:32].reshape(4, 8),
        "segments": segments,
        "positions": positions_of(segments),
    }
    if config.kind == "encoder-decoder":
        batch |= {
            "encoder_tokens": ids[32:56].reshape(4, 6),
            "encoder_segments": encoder_segments,
            "encoder_positions": positions_of(encoder_segments),
        }
    return {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


@functools.cache
def forward(config: ModelConfig, sharding: Sharding | None = None):
    """Compiled (params, batch, dropout_keys, cache) -> Output."""

    @jax.jit
    def run(params, batch, keys=None, cache=None):
        return Transformer(config, sharding).apply({"params": params}, batch, keys, cache)

    return run


@functools.cache
def probe(config: ModelConfig):
    """Compiled (params, batch, dropout_keys, cotangent [B, T, D]) -> hidden, gradients."""

    @jax.jit
    def run(params, batch, keys, cotangent):
        def hidden(params):
            return Transformer(config).apply({"params": params}, batch, keys).hidden_BTD

        out, pull_back = jax.vjp(hidden, params)
        return out, pull_back(cotangent.astype(out.dtype))[0]

    return run


def row_keys(rows: int = 4, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def relative(a, b) -> float:
    """The norm of all differences over the norm of b."""
    a, b = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)])
        for t in (a, b)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="session")
def models():
    """The helpers above, for tests in several files: they share what was compiled."""
    return SimpleNamespace(
        tiny=tiny, random_params=random_params, packed_batch=packed_batch,
        positions_of=positions_of, forward=forward, probe=probe, row_keys=row_keys,
        relative=relative,
    )  # fmt: skip
