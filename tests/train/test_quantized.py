"""Quantised training: which products are of integers, what they give, and what they leave alone."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses, optim, schedules
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.quantized import QuantizedTraining, multiply
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.state import TrainState
from t5x_lite.train.step import make_train_step, model_apply

INT8 = QuantizedTraining()
TOKENS, IN, OUT = (2, 3), (4, 5), (7,)


@pytest.fixture(scope="module")
def product():
    """x [2, 3, 4, 5], a kernel [4, 5, 7] and a cotangent, with tokens of very different sizes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*TOKENS, *IN), np.float32) * 10.0 ** np.arange(6).reshape(2, 3, 1, 1)
    kernel = rng.standard_normal((*IN, *OUT), np.float32) * 10.0 ** np.arange(7)
    d = rng.standard_normal((*TOKENS, *OUT), np.float32)
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, kernel, d))


def with_gradients(config, x, kernel, d):
    of = multiply if config else lambda _, count, x, kernel: jnp.tensordot(x, kernel, axes=count)
    result, pull_back = jax.vjp(lambda x, kernel: of(config, 2, x, kernel), x, kernel)
    return result, *pull_back(d)


def rounded(array, axes):
    """By hand: 254 steps from the largest to its negative, for each index of the other axes."""
    step = np.abs(array).max(axis=axes, keepdims=True) / 127
    return np.round(array / step) * step


def test_a_product_is_one_of_rounded_numbers_with_the_plain_gradient(product):
    x, kernel, _ = (np.asarray(a, np.float64) for a in product)
    found, *gradients = jax.jit(with_gradients, static_argnums=0)(INT8, *product)
    by_hand = np.tensordot(rounded(x, (2, 3)), rounded(kernel, (0, 1)), axes=2)
    size = np.tensordot(np.abs(x), np.abs(kernel), axes=2)
    np.testing.assert_array_less(np.abs(found - by_hand), 1e-5 * size)
    # Rounding is within a hundredth of what is added up, and isn't nothing.
    error = np.abs(found - np.tensordot(x, kernel, axes=2)) / size
    assert 1e-4 < error.max() < 1e-2
    for a, b in zip(gradients, with_gradients(None, *product)[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


def test_gradients_are_quantised_where_asked(product):
    config = QuantizedTraining(gradients="int8")
    x, kernel, d = (np.asarray(a, np.float64) for a in product)
    _, d_x, d_kernel = jax.jit(with_gradients, static_argnums=0)(config, *product)
    by_hand = (
        np.einsum("bto,ijo->btij", rounded(d, (2,)), rounded(kernel, (2,))),
        np.einsum("btij,bto->ijo", rounded(x, (0, 1)), rounded(d, (0, 1))),
    )
    for found, expected in zip((d_x, d_kernel), by_hand, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def integer_products(config, quantized, batch):
    """How many products of int8 a model's forward pass has."""
    params = parameters.abstract(config)[0]
    apply = model_apply(config, None, quantized)
    text = jax.jit(apply).lower(params, batch).as_text()
    return len(re.findall(r"dot_general.*\(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\)", text))


@pytest.mark.parametrize(
    ("quantized", "count"),
    [(None, 0), (INT8, 7), (QuantizedTraining(modules=r"decoder/layers/ffn/(up|down)$"), 2)],
)
def test_the_linear_maps_that_the_rule_names_are_of_integers(tiny, batch_of, quantized, count):
    """A Llama's layer has four in its attention and three in its FFN; it is scanned."""
    config = tiny("llama")
    assert integer_products(config, quantized, batch_of(config)) == count


@pytest.mark.parametrize("change", [{"scan": False, "remat": "full"}, {"rules": "fsdp_tp"}])
def test_layout_changes_no_more_than_rounding(tiny, initial, batch_of, change):
    """An integer may round the other way; that is as much as one of 255 steps of one number."""
    change = dict(change)
    rules = change.pop("rules", None)
    mesh = MeshConfig(fsdp=2, tensor=2).build(jax.devices()[:4]) if rules else None
    sharding = Sharding(mesh, rules) if rules else None
    results = []
    for config, where in ((tiny("llama"), None), (tiny("llama", **change), sharding)):
        batch, params = jax.tree.map(jnp.asarray, (batch_of(config), initial(config)))
        module = Transformer(config, where, INT8)
        results.append(np.asarray(jax.jit(module.apply)({"params": params}, batch).hidden_BTD))
    error = np.linalg.norm(results[0] - results[1]) / np.linalg.norm(results[1])
    assert error < 2e-3
    params = jax.tree.map(jnp.asarray, initial(tiny("llama")))
    plain = jax.jit(Transformer(tiny("llama")).apply)({"params": params}, batch)
    assert np.linalg.norm(results[0] - plain.hidden_BTD) / np.linalg.norm(results[0]) > 4e-3


def test_a_model_learns_as_fast_as_in_bfloat16(tiny, initial, batch_of):
    """Over fifty steps on one batch the loss falls by half, and stays within 1%."""
    config = dataclasses.replace(tiny("llama"), dtype="bfloat16")
    batch = jax.tree.map(jnp.asarray, batch_of(config))
    rate = schedules.constant(2e-3)
    transform = optim.AdamW(rate).build(parameters.abstract(config)[1])
    curves = []
    for quantized in (None, INT8):
        apply = model_apply(config, None, quantized)
        step = jax.jit(make_train_step(apply, losses.CrossEntropy(), transform, rate))
        params = jax.tree.map(jnp.asarray, initial(config))
        state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(transform.init)(params))
        curve = []
        for _ in range(50):
            state, metrics = step(state, batch, jax.random.key(0))
            curve.append(float(metrics["loss"]))
        curves.append(np.asarray(curve))
    plain, found = curves
    assert plain[-1] < plain[0] / 2
    assert not np.array_equal(found, plain)
    np.testing.assert_allclose(found, plain, rtol=0.01)


def test_rules_that_mean_nothing_are_refused(monkeypatch, product):
    with pytest.raises(UserError, match="weights='int7' must be one of int8, int4"):
        QuantizedTraining(weights="int7")
    with pytest.raises(UserError, match="gradients='int7' must be one of int8"):
        QuantizedTraining(gradients="int7")
    with pytest.raises(UserError, match=r"modules='[(]' is not a regular expression"):
        QuantizedTraining(modules="(")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install 't5x_lite\[tune\]'"):
        multiply(INT8, 2, *product[:2])
