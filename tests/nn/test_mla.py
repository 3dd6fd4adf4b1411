"""Latent attention: the definition, one query at a time, and what its cache holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import masks, parameters
from t5x_lite.nn.attention import LayerInputs
from t5x_lite.nn.cache import init_cache
from t5x_lite.nn.layers import Common, FanIn
from t5x_lite.nn.mla import MLAConfig
from t5x_lite.nn.positions import YarnRotary
from t5x_lite.nn.presets.deepseek import deepseek_v2, deepseek_v3

CONFIG = MLAConfig(
    heads=3, content_dim=6, rotary_dim=4, value_dim=5, kv_rank=7, query_rank=8, bias=True
)
LENGTH = 4


def attention(config):
    """A module, its parameters and the inputs of one causal row."""
    module = config.build(Common("float32", FanIn()), "attention")
    x_BTD = jax.random.normal(jax.random.key(0), (1, LENGTH, 10))
    order = masks.slots(LENGTH)
    angle = jnp.arange(LENGTH, dtype=jnp.float32)[None, :, None] * jnp.asarray([[[1.0, 0.3]]])
    inputs = LayerInputs(
        sees=masks.Visibility(order, order), rotation=(jnp.sin(angle), jnp.cos(angle))
    )
    params = module.init(jax.random.key(1), x_BTD, None, inputs, None)["params"]
    params = jax.tree.map(lambda box: box.value, params, is_leaf=lambda b: hasattr(b, "value"))
    return module, jax.tree.map(lambda x: x + 0.3, params), x_BTD, inputs


def by_the_query(config, params, x_TD):
    """The definition (DeepSeek-V2, §2.1, eq. 9-19) with complex rotations, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def normed(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"]

    def turned(x, place):
        turned = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * place * np.array([1.0, 0.3]))
        return np.concatenate([turned.real, turned.imag], -1)

    def down(x, name):
        return x @ p[name]["kernel"] + p[name].get("bias", 0.0)

    queries, keys, values = [], [], []
    for place, x_D in enumerate(x_TD):
        latent = x_D if config.query_rank is None else normed(down(x_D, "query_down"), "query_norm")
        q_NH = np.einsum("d,dnh->nh", latent, p["query"]["kernel"])
        queries.append(np.concatenate([q_NH[:, :6], turned(q_NH[:, 6:], place)], -1))
        both = down(x_D, "kv_down")
        up_NH = np.einsum("r,rnh->nh", normed(both[:7], "kv_norm"), p["up"]["kernel"])
        shared = np.tile(turned(both[7:], place), (3, 1))
        keys.append(np.concatenate([up_NH[:, :6], shared], -1))
        values.append(up_NH[:, 6:])
    rows = []
    for place, q_NH in enumerate(queries):
        logits_NS = np.einsum("nh,snh->ns", q_NH, np.stack(keys[: place + 1])) / np.sqrt(10)
        probs_NS = np.exp(logits_NS) / np.exp(logits_NS).sum(-1, keepdims=True)
        out_Nh = np.einsum("ns,snh->nh", probs_NS, np.stack(values[: place + 1]))
        out_D = np.einsum("nh,nhd->d", out_Nh, p["out"]["kernel"])
        rows.append(out_D + p["out"].get("bias", 0.0))
    return np.stack(rows)


@pytest.mark.parametrize("query_rank", [None, 8])
def test_the_definition(query_rank):
    config = dataclasses.replace(CONFIG, query_rank=query_rank)
    module, params, x_BTD, inputs = attention(config)
    out_BTD, _ = module.apply({"params": params}, x_BTD, None, inputs, None)
    expected = by_the_query(config, params, np.asarray(x_BTD[0], np.float64))
    np.testing.assert_allclose(out_BTD[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("content_dim", [1, 6])  # up to as many queries are brought to the latents
def test_the_cache_gives_what_the_whole_row_gives(content_dim):
    config = dataclasses.replace(CONFIG, content_dim=content_dim)
    module, params, x_BTD, inputs = attention(config)
    whole, _ = module.apply({"params": params}, x_BTD, None, inputs, None)
    cache = config.init_cache(1, LENGTH, "float32")
    inputs = inputs.replace(cache_index=jnp.zeros((), jnp.int32))
    cached, after = module.apply({"params": params}, x_BTD, cache, inputs, None)
    np.testing.assert_allclose(cached, whole, rtol=1e-5, atol=1e-5)
    assert {name: leaf.shape for name, leaf in after.items()} == {
        "latent": (1, LENGTH, 7),
        "rotary_key": (1, LENGTH, 4),
    }


def test_a_token_of_deepseek_v3_takes_576_numbers_a_layer():
    config = deepseek_v3("671b", layers=4)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 1).layers)
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == 4 * (512 + 64)


def test_a_correction_is_no_parameter():
    config = deepseek_v3("tiny")
    shapes, _ = parameters.abstract(config)
    held = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert held - parameters.count(config) == 8  # of one layer of experts


def test_yarn_keeps_what_turns_often_and_stretches_what_turns_seldom():
    yarn = YarnRotary(10_000.0, factor=40.0, original_length=4096, mscale=0.707, mscale_all=0.707)
    plain, stretched = (
        kind.frequencies(64) for kind in (deepseek_v2("tiny").decoder.positions, yarn)
    )
    ratio = stretched / plain
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 40)
    assert np.all(np.diff(ratio) < 1e-8)
    assert (yarn.amplitude, yarn.logit_gain) == (1.0, pytest.approx(1.5896, rel=1e-4))
    alone = dataclasses.replace(yarn, mscale=None, mscale_all=None)
    assert (alone.amplitude, alone.logit_gain) == (pytest.approx(1.36889, rel=1e-5), 1.0)
    attention = deepseek_v2("lite").decoder.blocks[0].attention
    assert attention.logit_scale == pytest.approx(192**-0.5 * 1.5896, rel=1e-4)


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(UserError, match=r"kv_rank=0 must be at least 1"):
        dataclasses.replace(CONFIG, kv_rank=0)
    with pytest.raises(UserError, match=r"query_rank=0 must be at least 1, or None"):
        dataclasses.replace(CONFIG, query_rank=0)
