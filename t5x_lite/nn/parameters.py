"""A model's parameters as trees: shapes and logical axes without memory, values, counts, layouts.

Names are paths such as `decoder/layers/attention/query/kernel`. A scanned stack holds all its
layers in one leaf with a leading axis "layers"; an unrolled one has `layers_0`, `layers_1`, …
The first form is the one that checkpoints hold, whichever way the model is compiled.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.embedders import FeatureEmbedder
from t5x_lite.nn.layers import Declared
from t5x_lite.nn.transformer import Transformer
from t5x_lite.types import KeyArray, Params, PyTree

BUFFERS = ("correction", "fixed_bias")  # a router's; of a head (BART)
_LAYER = re.compile(r"layers_(\d+)")


def smallest_batch(config: ModelConfig, rows: int = 1, length: int = 2) -> dict[str, jax.Array]:
    """Zeros of the shapes that the model takes; for initialisation, which looks at shapes only."""
    tokens = jnp.zeros((rows, length), jnp.int32)
    batch = {}
    for name, prefix in (("encoder", "encoder_"), ("decoder", "")):
        stack = getattr(config, name)
        if stack is None:
            continue
        prefix = prefix if config.kind == "encoder-decoder" else ""
        if isinstance(stack.embedder, FeatureEmbedder):
            batch[f"{prefix}features"] = jnp.zeros((rows, length, stack.embedder.size), jnp.float32)
        else:
            batch[f"{prefix}tokens"] = tokens
    return batch


def scanned(config: ModelConfig) -> ModelConfig:
    """The same model with its layers stacked, the form in which it is initialised and stored."""
    return dataclasses.replace(config, scan=True)


def _plain(config: ModelConfig) -> ModelConfig:
    """The same with attention that runs anywhere: parameters are made where no kernel runs."""
    return dataclasses.replace(config, attention_kernel="plain")


def init(config: ModelConfig, key: KeyArray) -> Params:
    """The model's initial parameters, float32; the same whether scanned or unrolled.

    Run it under `jax.jit`: eager bits differ.
    """
    variables = Transformer(_plain(scanned(config))).init(key, smallest_batch(config))
    params = jax.tree.map(lambda box: box.value, variables["params"], is_leaf=_is_box)
    return params if config.scan else unstack_layers(params)


def declared(config: ModelConfig) -> dict[str, Declared]:
    """Every parameter's declaration by its path; its value is a shape, and nothing is allocated."""
    leaves = jax.tree_util.tree_leaves_with_path(_declared(config), is_leaf=_is_box)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): box for p, box in leaves}


@functools.lru_cache(maxsize=16)  # a trace of the whole model takes half a second
def _declared(config: ModelConfig) -> PyTree:
    batch = jax.eval_shape(lambda: smallest_batch(config))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Transformer(_plain(config)).init, key, batch)["params"]


def abstract(config: ModelConfig) -> tuple[PyTree, PyTree]:
    """Every parameter's shape and dtype, and its logical axis names; allocates nothing."""
    boxed = _declared(config)
    shapes = jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)
    axes = jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)
    return shapes, axes


def count(config: ModelConfig) -> int:
    """Trainable parameters as published: rows that pad the vocabulary don't count.

    Nor do leaves of `BUFFERS`, which no gradient moves and which are published as buffers.
    """
    shapes, axes = abstract(config)
    return sum(
        math.prod(published_shape(config, shape.shape, names))
        for (path, shape), names in zip(
            jax.tree_util.tree_leaves_with_path(shapes),
            jax.tree.leaves(axes, is_leaf=is_axes),
            strict=True,
        )
        if path[-1].key not in BUFFERS
    )


def published_shape(
    config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...]
) -> tuple[int, ...]:
    """A parameter's shape without the rows that pad the vocabulary."""
    return tuple(
        config.vocab_size if name == "vocab" else size
        for name, size in zip(axes, shape, strict=True)
    )


def is_axes(node) -> bool:
    """True of a leaf of a tree of logical axis names."""
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def _is_box(node) -> bool:
    return isinstance(node, Declared)


def stack_layers(tree: PyTree) -> PyTree:
    """Turns every `layers_0`, `layers_1`, … of nested dicts into one stacked `layers`."""
    if not isinstance(tree, Mapping):
        return tree
    numbered = sorted((key for key in tree if _LAYER.fullmatch(key)), key=_number)
    result = {key: stack_layers(value) for key, value in tree.items() if key not in numbered}
    if numbered:
        each = [tree[key] for key in numbered]
        result["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return result


def unstack_layers(tree: PyTree) -> PyTree:
    """The inverse of `stack_layers`."""
    if not isinstance(tree, Mapping):
        return tree
    result = {key: unstack_layers(value) for key, value in tree.items() if key != "layers"}
    if "layers" in tree:
        depth = jax.tree.leaves(tree["layers"])[0].shape[0]
        for number in range(depth):
            result[f"layers_{number}"] = jax.tree.map(
                lambda leaf, n=number: leaf[n], tree["layers"]
            )
    return result


def _number(key: str) -> int:
    return int(_LAYER.fullmatch(key).group(1))
