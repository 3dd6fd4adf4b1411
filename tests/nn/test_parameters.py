"""Parameters as trees: layouts, axes, initial values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn import parameters
from t5x_lite.nn.presets.gpt2 import gpt2

FAMILIES = ["t5_1_0", "t5_1_1", "bert", "gpt2", "llama"]


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b)  # raises if trees differ
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("family", FAMILIES)
def test_stack_and_unstack_are_inverse(models, family):
    stacked = models.random_params(models.tiny(family))
    unrolled = parameters.unstack_layers(stacked)
    assert "layers_1" in unrolled["encoder" if family == "bert" else "decoder"]
    assert equal(parameters.stack_layers(unrolled), stacked)
    assert equal(parameters.unstack_layers(parameters.stack_layers(unrolled)), unrolled)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layouts_are_those_of_the_two_models(models, family):
    config = models.tiny(family)
    stacked, _ = parameters.abstract(config)
    unrolled, _ = parameters.abstract(dataclasses.replace(config, scan=False))
    converted = jax.eval_shape(parameters.unstack_layers, stacked)
    assert jax.tree.map(lambda x: x.shape, converted) == jax.tree.map(lambda x: x.shape, unrolled)


def test_layers_are_stacked_in_the_order_of_their_numbers():
    tree = {f"layers_{n}": {"scale": jnp.full(1, n)} for n in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}
    assert parameters.stack_layers(tree)["layers"]["scale"][:, 0].tolist() == list(range(11))


@pytest.mark.parametrize("scan", [True, False])
def test_every_parameter_names_its_axes_and_is_float32(models, scan):
    config = models.tiny("t5_1_1", scan=scan, dtype="bfloat16")
    shapes, axes = parameters.abstract(config)
    leaves = jax.tree.leaves(shapes)
    names = jax.tree.leaves(axes, is_leaf=parameters.is_axes)
    for leaf, name in zip(leaves, names, strict=True):
        assert leaf.dtype == jnp.float32
        assert len(name) == leaf.ndim
        assert all(isinstance(axis, str) for axis in name)
    assert ("layers" in {axis for name in names for axis in name}) == scan


def test_padding_of_the_vocabulary_does_not_count(models):
    config = models.tiny("bert")  # tied: a table of 97 rows and a bias of 97
    physical = dataclasses.replace(config, vocab_multiple=1)
    assert config.physical_vocab == 104
    assert physical.physical_vocab == 97
    assert parameters.count(config) == parameters.count(physical)
    shapes, _ = parameters.abstract(config)
    assert shapes["embedder"]["embedding"].shape == (104, 32)
    assert shapes["head"]["bias"].shape == (104,)


def initial(config):
    return jax.jit(lambda seed: parameters.init(config, jax.random.key(seed)))(0)


@pytest.fixture(scope="module")
def gpt2_init():
    return initial(gpt2("tiny", width=64, layers=8, heads=4, vocab_size=97))


def test_scanned_and_unrolled_start_with_the_same_values(gpt2_init):
    config = gpt2("tiny", width=64, layers=8, heads=4, vocab_size=97, scan=False)
    assert equal(parameters.stack_layers(initial(config)), gpt2_init)


def test_no_two_layers_start_alike(gpt2_init):
    kernel = np.asarray(gpt2_init["decoder"]["layers"]["ffn"]["up"]["kernel"])
    assert len(np.unique(kernel)) > 0.98 * kernel.size


def test_gpt2_shrinks_what_joins_the_residual_stream(gpt2_init):
    layer = gpt2_init["decoder"]["layers"]
    for part, name in (("attention", "query"), ("attention", "value"), ("ffn", "up")):
        assert np.std(layer[part][name]["kernel"]) == pytest.approx(0.02, rel=0.03)
    for part, name in (("attention", "out"), ("ffn", "down")):
        # 16 additions: Radford et al. 2019, section 2.3.
        assert np.std(layer[part][name]["kernel"]) == pytest.approx(0.02 / 16**0.5, rel=0.03)
    assert np.all(layer["ffn_norm"]["scale"] == 1)
    assert np.all(layer["attention"]["query"]["bias"] == 0)


def test_t5_starts_with_small_queries_instead_of_scaled_logits(models):
    params = initial(models.tiny("t5_1_1"))
    layer = params["decoder"]["layers"]
    query, key = layer["attention"]["query"]["kernel"], layer["attention"]["key"]["kernel"]
    assert np.std(query) == pytest.approx((32 * 8) ** -0.5, rel=0.05)
    assert np.std(key) == pytest.approx(32**-0.5, rel=0.05)
    assert np.std(layer["attention"]["out"]["kernel"]) == pytest.approx(32**-0.5, rel=0.05)
    assert np.std(layer["ffn"]["down"]["kernel"]) == pytest.approx(48**-0.5, rel=0.05)
    assert np.std(params["embedder"]["embedding"]) == pytest.approx(1, rel=0.05)
