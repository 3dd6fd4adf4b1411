"""What a compiled program holds, computes, moves and sends, as `compile` reports it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from t5x_lite.aot import count, hlo, roofline
from t5x_lite.aot.chips import Chip
from t5x_lite.aot.topology import Topology
from t5x_lite.errors import UserError
from t5x_lite.partitioning import MeshConfig, Sharding


def memory(executable: jax.stages.Compiled, chip: Chip) -> dict[str, int]:
    """Bytes a chip by what holds them; `total` is what must be at most `capacity`."""
    stats = executable.memory_analysis()
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    # What of the output takes the arguments' place is in both, and is held once.
    total = sum(sizes.values()) - 2 * sizes["alias"]
    return {**sizes, "total": total, "capacity": chip.capacity}


_NEEDS = (
    r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
    r"\(([\d.]+)([KMGT])\) exceeds available HBM",
)


def refused(message: str, chip: Chip) -> dict[str, Any]:
    """What the compiler says of a program that doesn't fit: one figure in all.

    Raises:
        UserError: it is another memory than HBM that isn't enough.
    """
    needs = next(filter(None, (re.search(form, message) for form in _NEEDS)), None)
    if needs is None:
        said = message.strip().splitlines()[0]
        raise UserError(f"the compiler finds no room for this program: {said[:300]}")
    total = int(float(needs[1]) * 2 ** (10 * (1 + "KMGT".index(needs[2]))))
    parts = dict.fromkeys(("arguments", "temporaries", "output"))
    return {**parts, "total": total, "capacity": chip.capacity}


def costs(
    text: str,
    jaxpr: ClosedJaxpr,
    turns: int | None,
    mesh: MeshConfig,
    sharding: Sharding,
    target: Topology,
    dtype: str,
) -> dict[str, Any]:
    """FLOPs, bytes and collectives of a program, and the modelled time of a step.

    Args:
        text: the compiled program's.
        jaxpr: the traced program.
        turns: how often a loop runs whose trip count isn't known.
        mesh: as it was asked for.
        sharding: with the mesh of the program.
        target: what it was compiled for.
        dtype: of its matrix products.
    """
    flops, moved = count.flops(jaxpr, turns), hlo.hbm_bytes(text, turns)
    found = hlo.collectives(text, turns)
    times = roofline.model(flops.matmul, moved, found, places(sharding, target), target, dtype)
    resources = ("compute", "hbm", "ici", "dcn", "awaited")
    return {
        **{"flops": flops.total, "matmul_flops": flops.matmul, "hbm_bytes": moved},
        **{"collectives": sent(found, mesh, sharding.mesh.shape), "kernels": kernels(text)},
        "seconds": {name: getattr(times, name) for name in resources},
        **{"step_seconds": times.step, "bound": times.bound},
    }


def places(sharding: Sharding, target: Topology) -> np.ndarray:
    """[chips of a slice, dimensions]: where the first slice's are, in the order of the mesh."""
    devices = list(sharding.mesh.devices.flat)
    first = getattr(devices[0], "slice_index", None)
    inside = (each for each in devices if getattr(each, "slice_index", None) == first)
    return np.asarray([each.coords[: len(target.shape)] for each in inside])


def sent(
    found: Sequence[hlo.Collective], mesh: MeshConfig, sizes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Collectives by kind, mesh axes and network, with executions and bytes a chip and step."""
    across = {axis: getattr(mesh, f"dcn_{axis}", 1) for axis in sizes}
    inside = {axis: size // across[axis] for axis, size in sizes.items()}
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for each in found:
        network, split = ("dcn", across) if each.slices > 1 else ("ici", inside)
        every = tuple(axis for axis, size in split.items() if size > 1)
        axis = "·".join(each.axes(inside) if each.groups else every) or "-"
        first = {"kind": each.kind, "axis": axis, "network": network}
        counts = {"count": 0, "bytes": 0, "awaited_bytes": 0}
        row = rows.setdefault((each.kind, axis, network), first | counts)
        row["count"] += each.times
        row["bytes"] += each.times * each.bytes
        row["awaited_bytes"] += 0 if each.overlaps else each.times * each.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def kernels(text: str) -> list[str]:
    """Names of the Pallas kernels in a compiled program."""
    called = r'^\s+(?:ROOT )?%([\w\-]+)[\w.\-]* = .*custom_call_target="tpu_custom_call"'
    return sorted(set(re.findall(called, text, re.MULTILINE)))
