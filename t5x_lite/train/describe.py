"""What a model consists of, as a table; computed from shapes alone."""

import math

import jax
from rich.console import Console
from rich.table import Table

from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.optim import path_name
from t5x_lite.partitioning import Sharding


def describe(
    model: ModelConfig, sharding: Sharding | None = None, console: Console | None = None
) -> None:
    """Prints every parameter's name, shape, logical axes and count, and their total.

    Rows that pad the vocabulary are neither shown nor counted. With `sharding`, also how each is
    split over the mesh.
    """
    console = console or Console(width=None if Console().is_terminal else 160)
    shapes, axes = parameters.abstract(model)
    table = Table("parameter", "shape", "axes", box=None, pad_edge=False)
    if sharding is not None:
        table.add_column("split over")
    table.add_column("count", justify="right")
    total = 0
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(shapes),
        jax.tree.leaves(axes, is_leaf=parameters.is_axes),
        strict=True,
    ):
        shape = parameters.published_shape(model, leaf.shape, names)
        total += math.prod(shape)
        row = [path_name(path), " × ".join(map(str, shape)), " ".join(names)]
        if sharding is not None:
            row.append(_spec(sharding, names, leaf.shape))
        table.add_row(*row, f"{math.prod(shape):,}")
    console.print(table)
    console.print(f"total parameters: {total:,}", highlight=False)


def _spec(sharding: Sharding, names: tuple[str, ...], shape: tuple[int, ...]) -> str:
    """The mesh axes of each dimension, such as `fsdp · tensor`; "-" where it is whole."""
    # A PartitionSpec gives a single mesh axis as its bare name.
    groups = [(g,) if isinstance(g, str) else g or ("-",) for g in sharding.spec(names, shape)]
    return " ".join("·".join(group) for group in groups)
