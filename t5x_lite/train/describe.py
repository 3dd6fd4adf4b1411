"""What a run consists of, as a table; computed from shapes alone, for meshes of any size."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from t5x_lite.data.tasks import Trainable
from t5x_lite.losses import CrossEntropy, Loss
from t5x_lite.nn import mup, parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.optim import MuP, Optimizer, path_name
from t5x_lite.partitioning import MeshConfig, Rules, Sharding
from t5x_lite.train.activations import stored_bytes
from t5x_lite.train.layout import check_layout, lengths_of, mesh_lines
from t5x_lite.train.state import state_shardings
from t5x_lite.train.step import check_batch
from t5x_lite.types import PyTree


def describe(
    model: ModelConfig,
    *,
    task: Trainable | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    loss: Loss = CrossEntropy(),  # noqa: B008 - frozen
    microbatches: int = 1,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 - frozen
    rules: str | Rules = "fsdp",
    pipeline_microbatches: int | None = None,
    ema_decay: float | int | None = None,
    devices: int | None = None,
    console: Console | None = None,
) -> None:
    """Prints every parameter with its part on a device, and what a device holds in all.

    Nothing is allocated, and the devices needn't be there. Rows that pad the vocabulary are neither
    shown nor counted, but held.

    Args:
        model: the model's config.
        task: what gives the batches their entries; needs no data.
        optimizer: whose state is counted.
        batch_size: rows a batch. Without these four, activations are left out.
        length: tokens a row.
        loss: the training loss.
        microbatches: parts of a batch.
        mesh: devices along each mesh axis.
        rules: which mesh axes split what.
        pipeline_microbatches: as in `train`.
        ema_decay: as in `train`; None: no average is held.
        devices: how many there are; None: as many as `mesh` says, or, with -1, as are here.
        console: where to print.

    Raises:
        UserError: a mesh that doesn't fit the devices, the model or the batch.
    """
    console = console or Console(width=None if Console().is_terminal else 200)
    abstract = mesh.abstract(devices or mesh.size or jax.device_count())
    sharding = Sharding(abstract, rules, pipeline_microbatches)
    held, lines, activations = {}, [*mesh_lines(mesh, sharding)], {}
    if task is not None and batch_size and length:
        batch = task.for_family(model.kind).batches(
            "train", batch_size=batch_size, length=length, seed=0
        )
        check_batch(batch_size, microbatches, sharding)
        rows = batch_size // microbatches
        lines += filter(None, [check_layout(model, sharding, rows, lengths_of(batch.shapes))])
        size = stored_bytes(model, loss, batch.shapes, sharding, microbatches)
        activations = {"activations": size}
    if optimizer is not None:
        held = _state_bytes(model, optimizer, sharding, ema_decay is not None)
    lines += _summary(held | activations, sharding.mesh.size)
    lines += mup_lines(optimizer)
    print_parameters(model, sharding, console, lines, optimizer)


def print_parameters(
    model: ModelConfig,
    sharding: Sharding,
    console: Console,
    notes: Sequence[str] = (),
    optimizer: Optimizer | None = None,
) -> None:
    """Prints every parameter's name, shape, logical axes, PartitionSpec, count and bytes a device.

    The PartitionSpec has the mesh axes of each axis, `fsdp·tensor`, or - where it is whole. After
    the table come the notes and the number of parameters. Under muP there are, besides, each
    parameter's class and what its initial values and its learning rate are multiplied by.
    """
    shapes, axes = parameters.abstract(model)
    table = Table("parameter", "shape", "axes", "PartitionSpec", box=None, pad_edge=False)
    table.add_column("bytes/device", justify="right")
    table.add_column("count", justify="right")
    scales = _scales(optimizer)
    for title in ("muP", "initial ×", "rate ×") if scales else ():
        table.add_column(title, justify="right")
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(shapes),
        jax.tree.leaves(axes, is_leaf=parameters.is_axes),
        strict=True,
    ):
        shape = parameters.published_shape(model, leaf.shape, names)
        row = [path_name(path), " × ".join(map(str, shape)), " ".join(names)]
        where = sharding.named(names, leaf.shape)
        row += [_spec(where.spec), f"{_bytes(leaf, where):,}"]
        row.append(f"{math.prod(shape):,}")
        if scales:
            scale = scales[path_name(path)]
            row += [scale.kind, _factor(scale.drawn), _factor(scale.rate)]
        table.add_row(*row)
    console.print(table)
    total = f"total parameters: {parameters.count(model):,}"
    console.print(*notes, total, sep="\n", highlight=False)


def mup_lines(optimizer: Optimizer | None) -> Iterator[str]:
    """What is said of muP: how much wider than its base the model is, and how slow it learns."""
    scales = _scales(optimizer)
    if not scales:
        return
    base, model = optimizer.base, optimizer.model
    rates: dict[tuple[str, str], int] = {}
    for scale in scales.values():
        key = scale.kind, _factor(scale.rate)
        rates[key] = rates.get(key, 0) + 1
    yield f"muP: width {model.width}, of the base {base.width}; rates are multiplied by"
    for (kind, rate), count in sorted(rates.items()):
        yield f"  {rate:<12}in {count} {kind} parameter{'s' * (count > 1)}"


def _scales(optimizer: Optimizer | None) -> dict[str, mup.Scale]:
    """path → muP's scale; empty without muP."""
    if not isinstance(optimizer, MuP):
        return {}
    tree = mup.scales(optimizer.model, optimizer.base)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=mup.is_scale)
    return {path_name(path): scale for path, scale in leaves}


def _factor(values: Any) -> str:
    """0.25, or, where the last of several layers is another than the others, 1 … 0.25."""
    return " … ".join(dict.fromkeys(f"{value:.4g}" for value in np.ravel(values)))


def _spec(spec: jax.sharding.PartitionSpec) -> str:
    # A PartitionSpec gives a single mesh axis as its bare name.
    groups = [(g,) if isinstance(g, str) else g or ("-",) for g in spec]
    return " ".join("·".join(group) for group in groups)


def _bytes(leaf: jax.ShapeDtypeStruct, where: jax.sharding.NamedSharding) -> int:
    return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _state_bytes(
    model: ModelConfig, optimizer: Optimizer, sharding: Sharding, ema: bool
) -> dict[str, int]:
    """Bytes a device of each part of the train state, and of the gradients."""
    state, shardings = state_shardings(model, optimizer, sharding, ema)

    def total(part: str) -> int:
        trees: tuple[PyTree, PyTree] = (getattr(state, part), getattr(shardings, part))
        return sum(_bytes(*pair) for pair in zip(*map(jax.tree.leaves, trees), strict=True))

    held = {"parameters": total("params"), "optimizer state": total("opt_state")}
    return held | ({"average (EMA)": total("ema")} if ema else {}) | {"gradients": total("params")}


_ESTIMATE = (
    "estimated: what a microbatch's forward pass keeps for its backward pass, without the "
    "compiler's temporaries"
)


def _summary(held: dict[str, int], devices: int) -> Iterator[str]:
    """Lines of the table of what one device holds."""
    if not held:
        return
    yield f"each of {devices} device{'s' * (devices > 1)} holds"
    for name, size in {**held, "in all": sum(held.values())}.items():
        note = f"  {_ESTIMATE}" if name == "activations" else ""
        yield f"  {name:<16}{_readable(size):>10}{note}"


def _readable(size: int) -> str:
    """12.3 MiB."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.1f} {units[0]}" if units[0] != "B" else f"{size} B"
