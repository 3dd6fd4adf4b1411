"""Rematerialisation: the same gradients from less memory."""

import dataclasses
import math

import jax
import pytest

from t5x_lite.nn.transformer import Transformer


def kept_bytes(models, config) -> int:
    """What the forward pass keeps for the backward pass; nothing is run."""
    params, batch = models.random_params(config), models.packed_batch(config)

    def forward(params):
        return Transformer(config).apply({"params": params}, batch).hidden_BTD

    # The pull-back is a tree whose leaves are the residuals.
    pull_back = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)
    leaves = jax.tree.leaves(pull_back)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize(("family", "scan"), [("bert", False), ("gpt2", True)])
def test_each_policy_keeps_less(models, family, scan):
    config = models.tiny(family, scan=scan)
    none, minimal, full = (
        kept_bytes(models, dataclasses.replace(config, remat=policy))
        for policy in ("none", "minimal", "full")
    )
    assert full < 0.9 * minimal
    assert minimal < 0.9 * none


@pytest.mark.parametrize("policy", [pytest.param("minimal", marks=pytest.mark.grid), "full"])
def test_gradients_are_those_without(models, policy):
    config = models.tiny("gpt2")
    params, batch = models.random_params(config), models.packed_batch(config)
    noise = jax.random.normal(jax.random.key(3), (4, 8, config.width))
    hidden, grads = models.probe(config)(params, batch, None, noise)
    again = dataclasses.replace(config, remat=policy)
    hidden_again, grads_again = models.probe(again)(params, batch, None, noise)
    assert models.relative(hidden_again, hidden) < 1e-6
    assert models.relative(grads_again, grads) < 1e-5
