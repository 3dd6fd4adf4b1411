"""Norms, dropout and the linear map against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.ffn import MLPConfig

COMMON = layers.Common("float32", layers.FanIn())


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, SCALE, BIAS = 3 + 2 * draw(2, 5, 16), draw(16, seed=1), draw(16, seed=2)


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_norms(epsilon):
    x = np.asarray(X, float)
    got = layers.RMSNorm(epsilon).build(COMMON, "n").apply({"params": {"scale": SCALE}}, X)
    rms = np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon)
    np.testing.assert_allclose(got, x / rms * np.asarray(SCALE), rtol=1e-5, atol=1e-5)
    variables = {"params": {"scale": SCALE, "bias": BIAS}}
    got = layers.LayerNorm(epsilon).build(COMMON, "n").apply(variables, X)
    deviation = np.sqrt(x.var(-1, keepdims=True) + epsilon)
    normal = (x - x.mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(
        got, normal * np.asarray(SCALE) + np.asarray(BIAS), rtol=1e-5, atol=1e-5
    )


def test_norms_keep_their_statistics_in_float32():
    # In bfloat16 the mean of squares of 1000 ± 4 would lose the variance.
    x = jnp.asarray(np.tile([1000.0, 1008.0], 8), jnp.bfloat16)[None]
    common = layers.Common("bfloat16", layers.FanIn())
    variables = {"params": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}
    got = layers.LayerNorm().build(common, "n").apply(variables, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32)[0], np.tile([-1.0, 1.0], 8), rtol=0.01)


def test_dropout_drops_its_share_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jnp.full((2, 20_000), 2.0)
    kept = np.asarray(layers.dropout(x, 0.3, keys))
    assert set(np.unique(kept)) == {0.0, np.float32(2.0 / 0.7)}
    assert np.mean(kept == 0) == pytest.approx(0.3, abs=0.01)
    assert not np.array_equal(kept[0], kept[1])


def test_no_keys_no_dropout():
    x = jnp.ones((2, 3))
    assert layers.dropout(x, 0.3, None) is x
    assert layers.dropout(x, 0.0, jax.random.split(jax.random.key(0), 2)) is x
    assert layers.fold_in(None, 3) is None


def test_linear_over_several_axes():
    kernel, bias, x = draw(4, 4, 6, seed=3), draw(6, seed=4), X.reshape(2, 5, 4, 4)
    linear = layers.Linear((6,), ("heads", "head_dim"), ("embed",), True, COMMON)
    got = linear.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    expected = np.einsum("bthd,hde->bte", x, kernel) + np.asarray(bias)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_gate_multiplies():
    up, gate, down = draw(16, 8, seed=3), draw(16, 8, seed=4), draw(8, 16, seed=5)
    params = {name: {"kernel": k} for name, k in (("up", up), ("gate", gate), ("down", down))}
    module = MLPConfig(8, "relu", gated=True).build(COMMON, "ffn")
    got, aux = module.apply({"params": params}, X, None)
    x, up, gate, down = (np.asarray(a, float) for a in (X, up, gate, down))
    expected = np.maximum(x @ gate, 0) * (x @ up) @ down
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert aux == {}


def test_unknown_activations_name_what_there_is():
    with pytest.raises(UserError, match=r"unknown activation 'swish'; there are relu, gelu, "):
        MLPConfig(8, "swish")


@pytest.mark.parametrize(
    ("init", "fan_in", "expected"),
    [(layers.FanIn(), 64, 0.125), (layers.FanIn(4), 64, 0.25), (layers.Normal(0.02), 64, 0.02)],
)
def test_initialisers(init, fan_in, expected):
    assert init.stddev(fan_in) == pytest.approx(expected)
    values = layers.truncated_normal(expected)(jax.random.key(0), (20_000,), jnp.float32)
    assert np.std(values) == pytest.approx(expected, rel=0.02)
    assert np.abs(values).max() < 2.3 * expected  # cut at two sigma of the uncut normal
