"""Rematerialisation: the same gradients from less memory, measured in compiled programs."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from t5x_lite.nn import parameters, remat
from t5x_lite.nn.transformer import Transformer

ROWS, LENGTH = 4, 64  # enough that what layers keep outweighs everything else
LAYERS, WIDTH = 4, 32


def shaped(models, family, policy, **overrides):
    """The family's tiny model with dropout on, some layers more and this policy."""
    config = models.tiny(family, dropout=0.2, remat=policy, **overrides)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, layers=LAYERS))


def gradient_of(config):
    """(params, tokens, dropout keys, cotangent) -> hidden states, gradients."""

    def run(params, tokens, keys, cotangent):
        def hidden(params):
            return (
                Transformer(config).apply({"params": params}, {"tokens": tokens}, keys).hidden_BTD
            )

        out, pull_back = jax.vjp(hidden, params)
        return out, pull_back(cotangent)[0]

    return run


@pytest.fixture(scope="module")
def measured(models):
    """`measured(policy)`: bytes of temporaries, hidden states and gradients."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (ROWS, LENGTH), np.int32)
    cotangent = rng.standard_normal((ROWS, LENGTH, WIDTH), np.float32)
    params = models.random_params(shaped(models, "gpt2", "none"))

    @functools.cache
    def measure(policy):
        config = shaped(models, "gpt2", policy)
        arguments = jax.tree.map(jnp.asarray, (params, tokens, models.row_keys(), cotangent))
        compiled = jax.jit(gradient_of(config)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes, *compiled(*arguments)

    return measure


@pytest.mark.parametrize("policy", [name for name in remat.POLICIES if name != "none"])
def test_results_are_those_without_dropout_on(models, measured, policy):
    _, hidden, gradients = measured("none")
    _, found, found_gradients = measured(policy)
    np.testing.assert_array_equal(found, hidden)
    assert models.relative(found_gradients, gradients) < 1e-6


def test_temporaries_fall_by_what_isnt_kept(measured):
    """Each layer's queries, keys and values are what `save_qkv_proj` keeps over `full`."""
    none, minimal, saved, full = (
        measured(policy)[0] for policy in ("none", "minimal", "save_qkv_proj", "full")
    )
    assert full < saved < minimal < none
    assert saved - full == pytest.approx(LAYERS * ROWS * LENGTH * 3 * WIDTH * 4, rel=0.1)
    assert full < none / 3


def kept_bytes(models, config) -> int:
    """What the forward pass keeps for the backward pass; nothing is run."""
    params, batch = models.random_params(config), models.packed_batch(config)

    def forward(params):
        return Transformer(config).apply({"params": params}, batch).hidden_BTD

    # The pull-back is a tree whose leaves are the residuals.
    pull_back = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)
    leaves = jax.tree.leaves(pull_back)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


# Unrolled layers, latent attention, a bottleneck, and a decoder that reads an encoder.
@pytest.mark.parametrize(
    ("family", "scan"),
    [
        ("bert", False),
        ("deepseek_v3", True),
        pytest.param("mobilebert", True, marks=pytest.mark.grid),
        ("t5_1_1", True),
    ],
)
def test_each_policy_keeps_less_in_every_kind_of_layer(models, family, scan):
    config = models.tiny(family, scan=scan)
    none, minimal, saved, full = (
        kept_bytes(models, dataclasses.replace(config, remat=policy))
        for policy in ("none", "minimal", "save_qkv_proj", "full")
    )
    assert full < saved < minimal < none
    run = Transformer(config).apply
    text = str(
        jax.make_jaxpr(run)({"params": models.random_params(config)}, models.packed_batch(config))
    )
    named = set(re.findall(r"name\[name=(\w+)\]", text))
    latent = {"query", "latent"} if family == "deepseek_v3" else {"query", "key", "value"}
    assert named == {remat.LAYER_INPUT} | latent


@pytest.mark.usefixtures("uncached")
def test_offloaded_tensors_lie_in_the_memory_of_the_tpus_host(models, tpu):
    """Layers' inputs, queries, keys and values, to the byte."""
    rows, length = 64, 128
    config = shaped(models, "gpt2", "offload", dtype="bfloat16")
    place = SingleDeviceSharding(tpu("v5e:2x2")[0])
    arguments = (
        parameters.abstract(config)[0],
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        None,  # no dropout, which takes long to compile
        jax.ShapeDtypeStruct((rows, length, WIDTH), jnp.bfloat16),
    )
    there = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    compiled = jax.jit(gradient_of(config)).lower(*there).compile()
    kept = LAYERS * rows * length * 4 * WIDTH * 2
    assert compiled.memory_analysis().host_temp_size_in_bytes == kept
