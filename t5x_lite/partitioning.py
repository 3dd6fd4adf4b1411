"""The device mesh, and which mesh axes each logical axis of an array is split over.

Every parameter and every activation that matters names its axes ("embed", "heads", …) once, where
it is made. A rule table, plain data, says which mesh axes a logical axis is split over. Flax's own
resolver is silent about an unknown name, a mesh axis used twice or a wrong rank; this one raises.

A table is composed of parts, one for each form of parallelism, and named by them: "fsdp_tp" splits
parameters over the axes fsdp and tensor. Rows of a batch are split over the data axes in all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import UserError

MESH_AXES = ("replica", "fsdp", "expert", "sequence", "tensor", "stage")
# Each device of their product has rows of its own: what holds experts computes on rows, too.
DATA_AXES = ("replica", "fsdp", "expert")
# Least traffic first, as `mesh_utils` wants them: what comes last gets the nearest devices.
_BY_TRAFFIC = ("stage", "replica", "fsdp", "expert", "sequence", "tensor")

MeshAxes = tuple[str, ...]

# Axes of parameters, then axes of activations.
LOGICAL_AXES = (
    *("layers", "embed", "vocab", "heads", "kv_heads", "head_dim", "mlp"),
    *("norm", "positions", "buckets", "token_types", "features", "labels"),
    *("expert", "router", "latent", "bottleneck"),
    *("batch", "length", "act_embed", "act_heads", "act_mlp", "act_vocab"),
)

# What each part of a table splits, beside rows.
PARTS: Mapping[str, Mapping[str, MeshAxes]] = MappingProxyType(
    {
        # Every device holds all parameters.
        "dp": {},
        # Parameters and optimizer state, gathered where they are used (Rajbhandari et al. 2020).
        "fsdp": dict.fromkeys(("embed", "latent"), ("fsdp",)),
        # Heads, FFN units and vocabulary (Shoeybi et al. 2019).
        "tp": dict.fromkeys(
            ("vocab", "heads", "kv_heads", "mlp", "act_heads", "act_mlp", "act_vocab"), ("tensor",)
        ),
        # Whole experts; their tokens come to them (Lepikhin et al. 2020).
        "ep": {"expert": ("expert",)},
        # Tokens of a row; keys and values go round a ring (Liu et al. 2023).
        "sp": {"length": ("sequence",)},
        # Runs of layers, through which microbatches pass (Huang et al. 2019). What isn't in them,
        # embedding and head, is data-parallel over the stages too.
        "pp": {"layers": ("stage",), "batch": (*DATA_AXES, "stage")},
    }
)


@dataclasses.dataclass(frozen=True)
class Rules:
    """A rule table: parts, and what is changed of them.

    `changes` gives logical axes other mesh axes: {"vocab": ("tensor", "fsdp")}, or () for none.
    """

    parts: str = "fsdp"
    changes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        _compose(self.parts)
        for name, axes in self.changes.items():
            if name not in LOGICAL_AXES:
                raise UserError(f"rules change {name!r}, which is no logical axis; there are "
                                f"{', '.join(LOGICAL_AXES)}.")  # fmt: skip
            if unknown := [axis for axis in axes if axis not in MESH_AXES]:
                raise UserError(f"the rule for {name!r} names {unknown[0]!r}, which is no mesh "
                                f"axis; there are {', '.join(MESH_AXES)}.")  # fmt: skip

    def __str__(self) -> str:
        """As it is printed at start."""
        changed = (f"{name}: {'·'.join(axes) or '-'}" for name, axes in self.changes.items())
        return " with ".join(filter(None, (self.parts, ", ".join(changed))))

    @property
    def axes(self) -> Mapping[str, MeshAxes]:
        """The mesh axes of every logical axis."""
        return {**_compose(self.parts), **{name: tuple(a) for name, a in self.changes.items()}}


@functools.cache
def _compose(parts: str) -> Mapping[str, MeshAxes]:
    """The table of these parts, such as "fsdp_tp"."""
    names = parts.split("_")
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(
            f"no rule table {parts!r}: {unknown[0]!r} is none of its parts {', '.join(PARTS)}, "
            "which are joined by _, as in 'fsdp_tp'."
        )
    if len(names) != len(set(names)):
        raise UserError(f"rule table {parts!r} names a part twice.")
    table = dict.fromkeys(LOGICAL_AXES, ()) | {"batch": DATA_AXES}
    for name in names:
        table |= PARTS[name]
    return MappingProxyType(table)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; at most one is -1: what remains.

    The network between TPU slices, DCN, is slow. An axis that crosses it has `dcn_…` parts of its
    size in each slice: fsdp=8 and dcn_fsdp=2 are 16 devices, 8 in each of two slices.
    """

    replica: int = 1
    fsdp: int = -1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    stage: int = 1
    dcn_replica: int = 1
    dcn_fsdp: int = 1
    dcn_stage: int = 1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes) or min(self._dcn) < 1:
            raise UserError(f"mesh {self}: axes are positive, and at most one is -1 (the rest); "
                            "parts across slices (dcn_…) are positive.")  # fmt: skip

    def __str__(self) -> str:
        """The axes that aren't 1, `fsdp=-1 × tensor=2`."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return " × ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "1"

    @property
    def _dcn(self) -> tuple[int, ...]:
        """Each mesh axis's part across slices."""
        return tuple(getattr(self, f"dcn_{axis}", 1) for axis in MESH_AXES)

    @property
    def size(self) -> int | None:
        """How many devices it has; None: it takes as many as there are."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        return None if -1 in sizes else math.prod(sizes) * self.slices

    @property
    def slices(self) -> int:
        """Parts of the mesh that only the slow network joins."""
        return math.prod(self._dcn)

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Arranges `devices` (default: all) as a mesh; nearer ones where there is more traffic.

        Raises:
            UserError: the axes don't multiply out to the number of devices, or the parts across
                slices to the number of slices.
        """
        devices = jax.devices() if devices is None else list(devices)
        inner = dict(zip(MESH_AXES, self._inside(len(devices)), strict=True))
        outer = dict(zip(MESH_AXES, self._dcn, strict=True))
        self._check_slices(devices)
        grid = _arrange(
            devices, [inner[axis] for axis in _BY_TRAFFIC], [outer[axis] for axis in _BY_TRAFFIC]
        )
        grid = grid.transpose([_BY_TRAFFIC.index(axis) for axis in MESH_AXES])
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def abstract(self, devices: int) -> AbstractMesh:
        """The mesh of so many devices that aren't there: enough for shapes and shardings.

        Raises:
            UserError: as `build`.
        """
        sizes = [i * o for i, o in zip(self._inside(devices), self._dcn, strict=True)]
        return AbstractMesh(tuple(sizes), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))

    def _inside(self, devices: int) -> tuple[int, ...]:
        """Sizes of the axes inside a slice, -1 replaced."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        fixed = math.prod(s for s in sizes if s > 0) * self.slices
        if -1 in sizes and devices % fixed == 0:
            sizes[sizes.index(-1)] = devices // fixed
        if math.prod(sizes) * self.slices != devices:
            more = " or a multiple" if -1 in sizes else ""
            raise UserError(
                f"mesh {self} asks for {fixed} devices{more}, but there are {devices}; set one "
                f"axis to -1 or make the product {devices}."
            )
        return tuple(sizes)

    def _check_slices(self, devices: Sequence[jax.Device]) -> None:
        found = len({getattr(device, "slice_index", None) for device in devices})
        # Devices without slices, such as emulated ones, count as many as are asked for.
        if _have_slices(devices) and found != self.slices:
            raise UserError(
                f"mesh {self} has {self.slices} parts across slices, but the {len(devices)} "
                f"devices form {found}; set dcn_replica={found} or another dcn_… axis."
            )


def _have_slices(devices: Sequence[jax.Device]) -> bool:
    return devices[0].platform == "tpu" and hasattr(devices[0], "slice_index")


def _arrange(
    devices: Sequence[jax.Device], inner: Sequence[int], outer: Sequence[int]
) -> np.ndarray:
    """Devices as an array [i · o of each axis]; along each, a slice's devices are neighbours."""
    if len(devices) == 1:
        return np.asarray(devices).reshape(inner)
    slices = math.prod(outer)
    if slices == 1:
        # On a torus a mesh axis may be half of one of its own: True allows it where need be.
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    if _have_slices(devices):
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    grid = np.asarray(devices).reshape(*outer, *inner)  # each slice a run of devices
    count = len(inner)
    paired = grid.transpose([axis + part for axis in range(count) for part in (0, count)])
    return paired.reshape([o * i for o, i in zip(outer, inner, strict=True)])


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and a rule table: turns logical axis names into shardings.

    Hashable, so that a function compiled under one table is never reused under another.

    `pipeline_microbatches`: parts of a batch that follow each other through the stages of "pp";
    None: see `nn.pipeline.microbatches`.

    Raises:
        UserError: an unknown table, or a mesh axis that it makes no use of.
    """

    mesh: Mesh | AbstractMesh
    table: str | Rules = "fsdp"
    pipeline_microbatches: int | None = None

    def __post_init__(self):
        if isinstance(self.table, str):
            object.__setattr__(self, "table", Rules(self.table))
        used = {axis for group in self.table.axes.values() for axis in group}
        for axis, size in self.mesh.shape.items():
            if size > 1 and axis not in used:
                parts = (repr(part) for part, rules in PARTS.items() if (axis,) in rules.values())
                raise UserError(
                    f"mesh axis {axis}={size} under rules '{self.table}', which split nothing over "
                    f"it: its {size} devices would do the same work {size} times; add the part "
                    f"{next(parts, 'that does')} or set {axis}=1."
                )

    def axes(self, name: str | None) -> MeshAxes:
        """The mesh axes that a logical axis is split over.

        Raises:
            UserError: no logical axis has this name.
        """
        if name is None:
            return ()
        rules = self.table.axes
        if name not in rules:
            raise UserError(f"unknown logical axis {name!r}; there are {', '.join(rules)}.")
        manual = getattr(self.mesh, "manual_axes", ())  # already split, inside of shard_map
        return tuple(axis for axis in rules[name] if axis not in manual)

    def parts(self, name: str) -> int:
        """How many parts a logical axis is split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def inside(self) -> "Sharding":
        """The same for use inside of `jax.shard_map`, where some mesh axes are manual."""
        return dataclasses.replace(self, mesh=jax.sharding.get_abstract_mesh())

    def shard_map(self, work: Callable, ins: Any, outs: Any, check_vma: bool = False) -> Callable:
        """`work` on each device's parts of arrays, as a function of whole ones: `jax.shard_map`.

        Over all mesh axes that aren't manual already, as the stages are inside of a pipeline.

        Args:
            work: a function of parts.
            ins: a PartitionSpec for each argument, or a tree of them.
            outs: the same for what it returns.
            check_vma: follow over which axes values vary. It refuses loops that begin with
                constants, and Pallas kernels, which say nothing of it.
        """
        free = {*self.mesh.axis_names} - {*getattr(self.mesh, "manual_axes", ())}
        return jax.shard_map(
            work, mesh=self.mesh, in_specs=ins, out_specs=outs, axis_names=free, check_vma=check_vma
        )

    def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """The PartitionSpec of an array of this `shape` with these logical axis `names`.

        Raises:
            UserError: unknown name, wrong rank, a mesh axis used twice, or a size that the mesh
                axes don't divide.
        """
        if len(names) != len(shape):
            raise UserError(f"logical axes {tuple(names)} name {len(names)} axes, but the array "
                            f"has shape {tuple(shape)}.")  # fmt: skip
        axes = [self.axes(name) for name in names]
        used = [axis for group in axes for axis in group]
        if len(used) != len(set(used)):
            raise UserError(f"rule table '{self.table}' uses a mesh axis twice for {tuple(names)}: "
                            f"{axes}.")  # fmt: skip
        for name, size, group in zip(names, shape, axes, strict=True):
            parts = math.prod(self.mesh.shape[axis] for axis in group)
            if size % parts:
                raise UserError(
                    f"{name}={size} doesn't divide by the {parts} parts of mesh axes "
                    f"{' × '.join(group)}; change the size, the mesh or the rule table."
                )
        return PartitionSpec(*(group or None for group in axes))

    def named(self, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """`spec`, on this mesh."""
        return NamedSharding(self.mesh, self.spec(names, shape))

    def replicated(self) -> NamedSharding:
        """Every device holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, shape: Sequence[int], name: str = "tokens") -> NamedSharding:
        """Of a batch's entry `name`, [B, …]: rows over the data axes; tokens where "length" is."""
        return self.named(batch_axes(name, len(shape)), shape)


def batch_axes(name: str, rank: int) -> tuple[str | None, ...]:
    """Logical axes of a batch's entry: rows, then tokens, but for the two ends of an answer."""
    second = None if name == "spans" else "length"
    return ("batch", second, *(None,) * (rank - 2))[:rank]


def constrain(x: jax.Array, names: Sequence[str | None], sharding: Sharding | None) -> jax.Array:
    """Pins an activation's layout; without a mesh (one device, tests of modules) a no-op."""
    if sharding is None or sharding.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.named(names, x.shape))
