"""How long a step takes at best, modelled from what its program computes, moves and sends.

Nothing here is measured. Each resource works at its published peak, collectives take the links of
the torus that their groups lie along, nothing waits for latency, and a collective that the compiler
starts and awaits later (or divides among other work) goes on beside everything else. So

    step = max(compute, HBM, ICI beside it, DCN beside it) + collectives that the program waits for

is a bound from below, and the MFU that follows one from above.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from t5x_lite.aot.hlo import Collective
from t5x_lite.aot.topology import Topology

# How often a collective passes (n - 1) / n of its array through a chip.
_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "collective-broadcast": 1}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes of each resource.

    Attributes:
        compute: matrix products at the chips' peak.
        hbm: bytes at the memory's bandwidth.
        ici: collectives inside of slices.
        dcn: collectives between slices.
        awaited: what of the latter two nothing goes on beside.
        step: all in all.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float
    awaited: float
    step: float

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def model(
    matmul_flops: float | int,
    hbm_bytes: int,
    found: Iterable[Collective],
    places: np.ndarray,
    topology: Topology,
    dtype: str = "bfloat16",
) -> Roofline:
    """The roofline of one step.

    Args:
        matmul_flops: of the step's matrix products, on all chips together.
        hbm_bytes: that each chip reads and writes.
        found: what it sends.
        places: [chips of a slice, dimensions], where they are in the torus, in the order in which
            `Collective.groups` count them: the mesh's.
        topology: the chips and how they are joined.
        dtype: of the products, for the peak; a TPU multiplies float32 in passes of bfloat16.
    """
    chip = topology.chip
    beside, awaited = {"ici": 0.0, "dcn": 0.0}, {"ici": 0.0, "dcn": 0.0}
    turns = []
    for each in found:
        network = "dcn" if each.slices > 1 else "ici"
        if network == "ici" and each.overlaps and each.kind == "collective-permute":
            turns.append(each)
            continue
        once = _between(each, topology) if each.slices > 1 else inside(each, places, topology)
        (beside if each.overlaps else awaited)[network] += each.times * once
    beside["ici"] += _longest(turns, places, topology)
    compute = matmul_flops / topology.chips / chip.peak.get(dtype, chip.peak["bfloat16"])
    hbm = hbm_bytes / chip.bandwidth
    waits = sum(awaited.values())
    return Roofline(
        *(compute, hbm, *(beside[network] + awaited[network] for network in ("ici", "dcn"))),
        *(waits, max(compute, hbm, *beside.values()) + waits),
    )


def inside(each: Collective, places: np.ndarray, topology: Topology) -> float:
    """Seconds of a collective between chips of a slice.

    A gather or a reduction goes round rings in all dimensions of the torus that a group spans at
    once, in both directions where the ring is closed; an all-to-all is bounded by the links that
    divide the group in two; a permutation by its longest way.

    Args:
        each: the collective.
        places: [chips of the slice, dimensions] of the torus, in the order that groups count.
        topology: how long the dimensions are, and which are rings.
    """
    link = topology.chip.network.link
    groups = each.groups or (tuple(range(len(places))),)
    if each.kind == "collective-permute":
        ways = ([*_way(places[a], places[b], topology)] for a, b in groups)
        return each.bytes * max(map(len, ways), default=0) / link
    group = places[list(groups[0])]
    size = len(group)
    spans = {dim: len(set(group[:, dim].tolist())) for dim in range(group.shape[1])}
    ways = {
        dim: 2 if topology.wraps[dim] and span == topology.shape[dim] > 2 else 1
        for dim, span in spans.items()
        if span > 1
    }
    if size == 1 or not ways:
        return 0.0
    if each.kind in _PASSES:
        links = sum(ways.values())
        return _PASSES[each.kind] * each.bytes * (size - 1) / size / (links * link)
    return max(spans[dim] * each.bytes / (4 * ways[dim] * link) for dim in ways)


def _longest(found: Iterable[Collective], places: np.ndarray, topology: Topology) -> float:
    """Seconds that the busiest link needs for permutations that go on at the same time.

    Rings that turn both ways at once, of which a product with a gathered operand is made, use a
    link's two directions.
    """
    loads: collections.Counter[tuple[int, ...]] = collections.Counter()
    sizes: collections.Counter[tuple] = collections.Counter()
    for each in found:
        sizes[each.groups] += each.bytes * each.times
    for pairs, size in sizes.items():
        for sender, receiver in pairs:
            for step in _way(places[sender], places[receiver], topology):
                loads[step] += size
    return max(loads.values(), default=0) / topology.chip.network.link


def _way(start: np.ndarray, end: np.ndarray, topology: Topology) -> Iterator[tuple[int, ...]]:
    """The links from a chip to another, along one dimension after the other: from, dim, sign."""
    here = list(map(int, start))
    for dim, (size, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
        apart = int(end[dim]) - here[dim]
        if wraps and abs(apart) > size // 2:
            apart -= size if apart > 0 else -size
        sign = 1 if apart > 0 else -1
        for _ in range(abs(apart)):
            yield (*here, dim, sign)
            here[dim] = (here[dim] + sign) % size


def _between(each: Collective, topology: Topology) -> float:
    """Seconds of a collective between slices: each chip's share of it leaves the slice."""
    share = 1 if each.kind == "collective-permute" else (each.slices - 1) / each.slices
    return _PASSES.get(each.kind, 1) * each.bytes * share / topology.chip.network.dcn
