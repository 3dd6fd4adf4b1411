"""Whether a model and its batches fit a mesh, with the arithmetic where they don't."""

import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from t5x_lite.data.converters import Shapes
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters, pipeline
from t5x_lite.nn.config import ModelConfig
from t5x_lite.optim import path_name
from t5x_lite.partitioning import MeshConfig, Sharding


def check_layout(
    model: ModelConfig, sharding: Sharding, rows: int, lengths: Sequence[int]
) -> str | None:
    """Raises `UserError` where the mesh doesn't divide the model or a row of its batches.

    Args:
        model: the model.
        sharding: the mesh and its rule table.
        rows: of a microbatch.
        lengths: tokens a row, of each side.

    Returns:
        How a batch passes the pipeline; None where there is none.
    """
    for length in lengths:
        _check_size("length", length, sharding, "a row")
    passes = pipeline.check(model, sharding, rows)
    shapes, axes = parameters.abstract(model)
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(shapes),
        jax.tree.leaves(axes, is_leaf=parameters.is_axes),
        strict=True,
    ):
        for name, size in zip(names, leaf.shape, strict=True):
            _check_size(name, size, sharding, path_name(path))
    return passes


def lengths_of(shapes: Shapes) -> list[int]:
    """Tokens a row of these batches, of the encoder and of the decoder, whichever there are."""
    sides = [name for name in ("encoder_tokens", "tokens") if name in shapes]
    return [shapes[name][0][1] for name in sides]


def _check_size(name: str | None, size: int, sharding: Sharding, where: str) -> None:
    parts = 1 if name is None else sharding.parts(name)
    if size % parts == 0:
        return
    axes = sharding.axes(name)
    given = " × ".join(f"{axis}={sharding.mesh.shape[axis]}" for axis in axes)
    raise UserError(
        f"{where}: {name}={size} doesn't divide by {given}, {size} / {parts} = "
        f"{size / parts:.4g}; try {' × '.join(axes)}={math.gcd(size, parts)}, or a {name} that is "
        f"a multiple of {parts}."
    )


def mesh_lines(config: MeshConfig, sharding: Sharding) -> Iterator[str]:
    """What is said of the mesh when a run starts: devices, and what is split over them."""
    mesh = sharding.mesh
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    kind = f" ({mesh.devices.flat[0].device_kind})" if isinstance(mesh, Mesh) else ""
    devices = f"{mesh.size} device{'s' * (mesh.size > 1)}{kind}"
    yield f"mesh {' × '.join(sizes) or 'of one'}: {devices}, rules {sharding.table}"
    if config.slices > 1:
        yield f"  {config.slices} slices of {mesh.size // config.slices} devices: mesh {config}"
    for axis, size in mesh.shape.items():
        names = [name for name, axes in sharding.table.axes.items() if axis in axes]
        if size > 1:
            yield f"  {axis}={size} splits {', '.join(names)}"
