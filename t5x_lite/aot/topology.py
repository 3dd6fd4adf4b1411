"""TPU slices by the names that the cloud gives them, and their chips as devices to compile for."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from t5x_lite.aot.chips import TPUS, Chip
from t5x_lite.errors import UserError

# Number of chips to their arrangement (Google Cloud's pages of each TPU, "Supported configurations"
# and "Configurations").
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
         256: (16, 16)}  # fmt: skip
_CUBIC = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
          192: (4, 4, 12), 256: (4, 8, 8), 384: (4, 8, 12), 512: (8, 8, 8), 768: (8, 8, 12),
          1024: (8, 8, 16), 1536: (8, 12, 16), 2048: (8, 16, 16)}  # fmt: skip
_POD = 16  # chips along a side of a whole v5e or v6e pod, the only ones that close to a ring


@dataclasses.dataclass(frozen=True)
class _Family:
    """How the TPUs of a generation are named.

    Attributes:
        topology: libtpu's name.
        shapes: chips to arrangement.
        cores: TensorCores of a chip, which the cloud's names of some generations count.
        options: of every topology of it.
    """

    topology: str
    shapes: Mapping[int, tuple[int, ...]]
    cores: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        # Without megacore a v4 chip's two cores would be devices of their own.
        "v4": _Family("v4", _CUBIC, 2, {"chip_config_name": "megacore"}),
        "v5e": _Family("v5e", _FLAT),
        "v5p": _Family("v5", _CUBIC | {3072: (12, 16, 16), 4096: (16, 16, 16), 6144: (16, 16, 24)},
                       2),
        "v6e": _Family("v6e", _FLAT),
    }
)  # fmt: skip
_ALIASES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of TPU chips.

    Attributes:
        name: as on the cloud.
        kind: the generation, "v5p".
        chip: what each can do.
        shape: chips along each dimension of a slice.
        slices: how many slices there are.
        libtpu: the topology's name there.
        options: what else libtpu asks for.
    """

    name: str
    kind: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    libtpu: str
    options: Mapping[str, Any]

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the last chip is a neighbour of the first."""
        if len(self.shape) == 2:
            return tuple(size == _POD for size in self.shape)
        # Whole cubes of 4 × 4 × 4 are joined by switches, which close the rings.
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)

    def devices(self) -> Sequence[jax.Device]:
        """The chips, to compile for; nothing runs on them.

        Raises:
            UserError: libtpu, the TPU's compiler, isn't installed.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("no libtpu, which has the TPU's compiler and needs no TPU: "
                            "pip install 't5x_lite[tpu]'.")  # fmt: skip
        # The compiler alone takes no chip: it needs no lock against another process, and no log.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_LOG_DIR", "disabled")
        from jax.experimental.topologies import get_topology_desc

        name = f"{self.libtpu}:{'x'.join(map(str, self.shape))}"
        wrap = (*self.wraps, False, False)[:3]
        options = {**self.options, "wrap": wrap, "num_slices": self.slices}
        return get_topology_desc(platform="tpu", topology_name=name, **options).devices


def find(name: str) -> Topology:
    """The topology of this name: v5p-128, v5litepod-16, or of several slices 2xv5e-256.

    Raises:
        UserError: no TPU of the cloud's is called so.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(v\d\w*)-(\d+)", name)
    kind = match and _ALIASES.get(match[2], match[2])
    if kind not in _FAMILIES:
        raise UserError(f"unknown topology {name!r}; there are {known()}, and slices of them: "
                        "2xv5e-256.")  # fmt: skip
    family, chip = _FAMILIES[kind], TPUS[kind]
    slices, count = int(match[1] or 1), int(match[3]) / family.cores
    if count not in family.shapes or slices < 1:
        raise UserError(f"unknown topology {name!r}; of {kind} there are {_names(kind)}.")
    if slices > 1 and chip.network.dcn is None:
        raise UserError(f"{name}: what a {kind} chip sends between slices isn't published, so its "
                        "time can't be modelled; try one slice, or v5e, v5p or v6e.")  # fmt: skip
    shape = family.shapes[int(count)]
    # A host has four chips, unless the slice is smaller.
    bounds = tuple(min(2, size) for size in (*shape, 1)[:3])
    options = {**family.options, "chips_per_host_bounds": (*bounds[:2], 1)}
    return Topology(name, kind, chip, shape, slices, family.topology, options)


def known() -> str:
    """Every name, for a person."""
    return "; ".join(map(_names, _FAMILIES))


def _names(kind: str) -> str:
    sizes = [str(chips * _FAMILIES[kind].cores) for chips in _FAMILIES[kind].shapes]
    return f"{kind}-{{{','.join(sizes)}}}"
