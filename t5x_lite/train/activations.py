"""How much of a forward pass is kept for the backward pass; computed from shapes alone."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from t5x_lite.data.converters import Shapes
from t5x_lite.losses import Loss
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.partitioning import Sharding
from t5x_lite.train.step import model_apply


def stored_bytes(
    model: ModelConfig, loss: Loss, batch: Shapes, sharding: Sharding, microbatches: int = 1
) -> int:
    """Bytes a device that one microbatch's forward pass leaves for its backward pass.

    An estimate: what differentiation saves, rematerialisation considered, as far as it grows with
    the batch (copies of parameters don't), divided by the mesh as the rule table says. The compiler
    may keep some of it in another form, and has temporaries of its own beside it.

    Args:
        model: the model, with its `remat`.
        loss: what is differentiated.
        batch: each entry's shape, of the whole batch, and dtype.
        sharding: how rows, tokens, heads, units and layers are split.
        microbatches: parts of the batch.
    """
    # The second trace's arrays are larger where they hold rows; the others aren't activations.
    traced = functools.partial(_residuals, loss, batch, sharding, microbatches)
    one, two = (traced(model, times) for times in (1, 2))
    if len(one) != len(two):  # so many rows more have their attention computed by another kernel
        model = dataclasses.replace(model, attention_kernel="blockwise")
        one, two = (traced(model, times) for times in (1, 2))
    total = 0
    for leaf, more in zip(one, two, strict=True):
        # As many rows as the model has heads are none.
        sizes = [a for a, b in zip(leaf.shape, more.shape, strict=True) if a == b]
        total += (_bytes(more) - _bytes(leaf)) // _parts(sizes, model, sharding)
    return total


def _residuals(loss, batch, sharding, microbatches, model, times) -> list[jax.ShapeDtypeStruct]:
    """Shapes of what the backward pass reads, of `times` microbatches' rows at once."""
    apply = model_apply(model, sharding)
    part = {
        name: jax.ShapeDtypeStruct((times * shape[0] // microbatches, *shape[1:]), dtype)
        for name, (shape, dtype) in batch.items()
    }
    rows = next(iter(part.values())).shape[0]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))

    def forward(params, part, keys):
        def value(params):
            sums = loss(apply, params, None, part, keys)
            return sum(jnp.sum(term) for term in sums.terms.values())

        return jax.vjp(value, params)[1]

    return jax.tree.leaves(jax.eval_shape(forward, parameters.abstract(model)[0], part, keys))


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * (leaf.dtype.itemsize if leaf.dtype != jax.dtypes.float0 else 0)


def _parts(sizes: Sequence[int], model: ModelConfig, sharding: Sharding) -> int:
    """Devices that an array is split over: rows and tokens always, units where one of `sizes` is.

    `sizes` are those of its other axes.
    """
    parts = math.prod(sharding.parts(name) for name in ("batch", "length", "layers"))
    shapes, axes = parameters.abstract(model)
    units = {
        size: sharding.parts(name)
        for names, param in zip(
            jax.tree.leaves(axes, is_leaf=parameters.is_axes), jax.tree.leaves(shapes), strict=True
        )
        for name, size in zip(names, param.shape, strict=True)
        if name in ("heads", "kv_heads", "mlp", "vocab") and size != model.width
    }
    return parts * max((units[size] for size in sizes if size in units), default=1)
