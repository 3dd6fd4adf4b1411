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
    same = jax.tree.map(np.array_equal, a, b)  # raises where the trees differ
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("family", ["bert", "t5_1_1"])
def test_stack_and_unstack_are_inverse(models, family):
    stack, unstack = jax.jit(parameters.stack_layers), jax.jit(parameters.unstack_layers)
    stacked = models.random_params(models.tiny(family))
    unrolled = unstack(stacked)
    kernel = stacked["encoder"]["layers"]["ffn"]["up"]["kernel"]
    assert equal(unrolled["encoder"]["layers_1"]["ffn"]["up"]["kernel"], kernel[1])
    assert equal(stack(unrolled), stacked)
    assert equal(unstack(stack(unrolled)), unrolled)


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


@pytest.fixture(scope="module")
def starts():
    """A GPT-2's initial values, for scanned and for unrolled layers."""
    config = gpt2("tiny", width=64, layers=8, heads=4, vocab_size=97)
    unrolled = dataclasses.replace(config, scan=False)

    @jax.jit
    def both(seed):
        return tuple(parameters.init(c, jax.random.key(seed)) for c in (config, unrolled))

    return both(0)


def test_scanned_and_unrolled_start_with_the_same_values(starts):
    scanned, unrolled = starts
    assert equal(parameters.stack_layers(unrolled), scanned)


def test_no_two_layers_start_alike(starts):
    kernel = np.asarray(starts[0]["decoder"]["layers"]["ffn"]["up"]["kernel"])
    assert len(np.unique(kernel)) > 0.98 * kernel.size


def test_gpt2_shrinks_what_joins_the_residual_stream(starts):
    layer = starts[0]["decoder"]["layers"]
    for part, name in (("attention", "query"), ("attention", "value"), ("ffn", "up")):
        assert np.std(layer[part][name]["kernel"]) == pytest.approx(0.02, rel=0.03)
    for part, name in (("attention", "out"), ("ffn", "down")):
        # 16 additions: Radford et al. 2019, section 2.3.
        assert np.std(layer[part][name]["kernel"]) == pytest.approx(0.02 / 16**0.5, rel=0.03)
    assert np.all(np.asarray(layer["ffn_norm"]["scale"]) == 1)
    assert np.all(np.asarray(layer["attention"]["query"]["bias"]) == 0)
