"""The device mesh, and which mesh axes each logical axis of an array is split over.

Every parameter and every activation that matters names its axes ("embed", "heads", …) once, where
it is made. A rule table, plain data, says which mesh axes a logical axis is split over. Flax's own
resolver is silent about an unknown name, a mesh axis used twice or a wrong rank; this one raises.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import UserError

MESH_AXES = ("replica", "fsdp", "expert", "sequence", "tensor", "stage")

# Axes of parameters, then axes of activations. A batch is always split over the data axes.
_NOWHERE = {
    **dict.fromkeys(["layers", "embed", "vocab", "heads", "kv_heads", "head_dim", "mlp"], ()),
    **dict.fromkeys(["norm", "positions", "buckets", "token_types", "features", "labels"], ()),
    **dict.fromkeys(["expert", "router", "latent", "bottleneck"], ()),
    **dict.fromkeys(["length", "act_embed", "act_heads", "act_mlp", "act_vocab"], ()),
    "batch": ("replica", "fsdp"),
}
_FSDP = {"embed": ("fsdp",), "latent": ("fsdp",)}
_EXPERT = {"expert": ("expert",)}
_TENSOR = dict.fromkeys(
    ("vocab", "heads", "kv_heads", "mlp", "act_heads", "act_mlp", "act_vocab"), ("tensor",)
)

RULES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "dp": _NOWHERE,
        "fsdp": {**_NOWHERE, **_FSDP, **_EXPERT},
        "tp": {**_NOWHERE, **_TENSOR, **_EXPERT},
        "fsdp_tp": {**_NOWHERE, **_FSDP, **_TENSOR, **_EXPERT},
    }
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; at most one is -1: what remains."""

    replica: int = 1
    fsdp: int = -1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    stage: int = 1

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Arranges `devices` (default: all) as a mesh.

        Raises:
            UserError: the axes don't multiply out to the number of devices.
        """
        devices = jax.devices() if devices is None else list(devices)
        sizes = self._sizes(len(devices))
        grid = np.asarray(devices).reshape(sizes)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def _sizes(self, devices: int) -> tuple[int, ...]:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        shown = " × ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True) if s != 1)
        if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise UserError(f"mesh {shown}: axes are positive, and at most one is -1 (the rest).")
        fixed = math.prod(s for s in sizes if s > 0)
        if -1 in sizes and devices % fixed == 0:
            sizes[sizes.index(-1)] = devices // fixed
        if math.prod(sizes) != devices:
            raise UserError(
                f"mesh {shown or '1'} asks for {fixed} devices (or a multiple, with -1), but there "
                f"are {devices}; set one axis to -1 or make the product {devices}."
            )
        return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and a rule table: turns logical axis names into shardings.

    Hashable, so that a function compiled under one table is never reused under another.
    """

    mesh: Mesh
    table: str = "fsdp"

    def __post_init__(self):
        if self.table not in RULES:
            raise UserError(f"no rule table {self.table!r}; there are {', '.join(RULES)}.")

    def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """The PartitionSpec of an array of this `shape` with these logical axis `names`.

        Raises:
            UserError: unknown name, wrong rank, a mesh axis used twice, or a size that the mesh
                axes don't divide.
        """
        if len(names) != len(shape):
            raise UserError(f"logical axes {tuple(names)} name {len(names)} axes, but the array "
                            f"has shape {tuple(shape)}.")  # fmt: skip
        axes = [self._mesh_axes(name) for name in names]
        used = [axis for group in axes for axis in group]
        if len(used) != len(set(used)):
            raise UserError(f"rule table {self.table!r} uses a mesh axis twice for {tuple(names)}: "
                            f"{axes}.")  # fmt: skip
        for name, size, group in zip(names, shape, axes, strict=True):
            parts = math.prod(self.mesh.shape[axis] for axis in group)
            if size % parts:
                raise UserError(
                    f"{name}={size} doesn't divide by the {parts} parts of mesh axes "
                    f"{' × '.join(group)}; change the size, the mesh or the rule table."
                )
        return PartitionSpec(*(group or None for group in axes))

    def _mesh_axes(self, name: str | None) -> tuple[str, ...]:
        if name is None:
            return ()
        rules = RULES[self.table]
        if name not in rules:
            raise UserError(f"unknown logical axis {name!r}; there are {', '.join(rules)}.")
        return rules[name]

    def named(self, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """`spec`, on this mesh."""
        return NamedSharding(self.mesh, self.spec(names, shape))

    def replicated(self) -> NamedSharding:
        """Every device holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, shape: Sequence[int]) -> NamedSharding:
        """Rows over the data axes, everything else whole."""
        return self.named(("batch", *(None,) * (len(shape) - 1)), shape)


def constrain(x: jax.Array, names: Sequence[str | None], sharding: Sharding | None) -> jax.Array:
    """Pins an activation's layout; without a mesh (one device, tests of modules) a no-op."""
    if sharding is None or sharding.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.named(names, x.shape))
