"""What chips can do at most, as their makers publish it: the one table of such figures."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from t5x_lite.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Network:
    """How a TPU chip is joined to others.

    Attributes:
        dims: of the torus or mesh that a slice's chips form.
        link: one-way bytes/s of one link of the ICI; along each dimension a chip has two.
        dcn: bytes/s of a chip's share of the network between slices; None: not published.
    """

    dims: int
    link: float
    dcn: float | None = None


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        kinds: how JAX's `device_kind` begins, in any of its versions.
        peak: of dense matrix products, FLOP/s by dtype.
        capacity: bytes of HBM that a program may use. None, as below: not needed here.
        bandwidth: of HBM, bytes/s.
        network: of TPUs.
    """

    kinds: tuple[str, ...]
    peak: Mapping[str, float]
    capacity: int | None = None
    bandwidth: float | None = None
    network: Network | None = None

    def __post_init__(self):
        object.__setattr__(self, "peak", MappingProxyType(dict(self.peak)))


# Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" give peaks, HBM, its bandwidth,
# ICI and DCN; v4's links are those of Jouppi et al. 2023 ("TPU v4", table 4), and agree with the
# bisection bandwidth of its page. Their ICI "per chip" is of all links in both directions: v5p's
# 1,200 GB/s are 6 links × 2 × 100. DCN: v5p's page gives 50 Gbit/s a chip, v5e's and v6e's what a
# pod of 256 has. Capacity: what libtpu 0.0.42 lets a program use when it refuses one, a little less
# than what the chip has (32, 16, 95 and 32 GiB; v5p's page rounds down).
TPUS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": Chip(
            *(("TPU v4",), {"bfloat16": 275e12, "int8": 275e12}),
            *(int(30.75 * GIB), 1200e9, Network(3, 50e9)),
        ),
        "v5e": Chip(
            *(("TPU v5 lite", "TPU v5e"), {"bfloat16": 197e12, "int8": 393e12}),
            *(int(15.75 * GIB), 819e9, Network(2, 50e9, 6.4e12 / 8 / 256)),
        ),
        "v5p": Chip(
            *(("TPU v5",), {"bfloat16": 459e12, "int8": 918e12}),
            *(int(95.74 * GIB), 2765e9, Network(3, 100e9, 50e9 / 8)),
        ),
        "v6e": Chip(
            *(("TPU v6",), {"bfloat16": 918e12, "int8": 1836e12}),
            *(int(31.25 * GIB), 1640e9, Network(2, 100e9, 25.6e12 / 8 / 256)),
        ),
    }
)
# NVIDIA's data sheets, without sparsity.
GPUS = (
    Chip(("NVIDIA A100",), {"bfloat16": 312e12}),
    Chip(("NVIDIA H100",), {"bfloat16": 989e12}),
    Chip(("NVIDIA H200",), {"bfloat16": 989e12}),
)


def of_device(kind: str) -> Chip | None:
    """The chip of a JAX device of this `device_kind`; None: an unknown one."""
    names = {name: chip for chip in (*TPUS.values(), *GPUS) for name in chip.kinds}
    # The longest wins: "TPU v5" is how "TPU v5 lite" begins.
    found = max((name for name in names if kind.startswith(name)), key=len, default=None)
    return names.get(found)


def named(name: str) -> Chip:
    """The chip of this name, such as v5p or "NVIDIA H100".

    Raises:
        UserError: an unknown one.
    """
    chip = TPUS.get(name) or of_device(name)
    if chip is None:
        known = [*TPUS, *(kind for gpu in GPUS for kind in gpu.kinds)]
        raise UserError(f"no chip {name!r}; there are {', '.join(known)}.")
    return chip
