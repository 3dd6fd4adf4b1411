"""What a compiled program sends between devices, read from its HLO text.

`jax.jit(f).lower(…).compile().as_text()` gives the text. XLA's CPU and TPU compilers differ: the
TPU's says reduce-scatter as a fusion around an all-reduce, starts collectives and awaits them
later, and gives no trip count of a loop, which then is the only integer that its condition compares
with.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from t5x_lite.errors import UserError

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "token": 0}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: of `KINDS`.
        bytes: of the largest array that each device has before or after it: what is gathered, or
            what is yet to be reduced and scattered.
        shapes: of each array that a device puts in, such as "f32[2,8]".
        groups: the devices that exchange, by their place in the mesh's array of devices; of a
            collective-permute, pairs of sender and receiver.
        times: how often it runs, if inside of loops.
        source: the operation in the JAX program that it belongs to.
    """

    kind: str
    bytes: int
    shapes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    times: int
    source: str

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which it exchanges; `mesh` gives each axis's size, in order."""
        sizes = tuple(mesh.values())
        places = [np.stack(np.unravel_index(group, sizes)) for group in self.groups if group]
        varies = [any(len(set(p[axis])) > 1 for p in places) for axis in range(len(sizes))]
        return tuple(name for name, moved in zip(mesh, varies, strict=True) if moved)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def collectives(text: str) -> list[Collective]:
    """Every collective that the program runs, with how often it does.

    Raises:
        UserError: no HLO module, or a loop whose trip count isn't known.
    """
    module, entry = _parse(text)
    if entry is None:
        raise UserError("this is no HLO module: it has no ENTRY computation.")
    found: dict[tuple, Collective] = {}
    for part, each in _walk(module, entry, 1):
        key = (part, each.kind, each.shapes, each.source) if part else (len(found),)
        found[key] = max(each, found.get(key, each), key=lambda each: each.times)
    alone = {each for each in found.values() if each.groups and max(map(len, each.groups)) == 1}
    return [each for each in found.values() if each not in alone]


def summary(
    found: Iterable[Collective], mesh: Mapping[str, int]
) -> list[tuple[str, str, int, int]]:
    """(kind, mesh axes, executions, bytes) of each kind along each axis, most bytes first."""
    times: collections.Counter = collections.Counter()
    sizes: collections.Counter = collections.Counter()
    for each in found:
        key = each.kind, "·".join(each.axes(mesh)) or "-"
        times[key] += each.times
        sizes[key] += each.times * each.bytes
    return [(*key, times[key], size) for key, size in sizes.most_common()]


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str | None]:
    """Every computation's instructions by name, and the name of the first that runs."""
    module: dict[str, dict[str, _Instruction]] = {}
    entry, here = None, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = module.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif here is not None and (found := _LINE.match(line)):
            name, kind, opcode, rest = found.groups()
            inside, attributes = _split_operands(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside,)
            here[name] = _Instruction(name, kind, opcode, operands, attributes)
    return module, entry


def _split_operands(rest: str) -> tuple[str, str]:
    """What stands before and after the parenthesis that closes the operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _walk(module, name: str, times: int, fused: bool = False) -> Iterator[tuple[str, Collective]]:
    """Collectives of a computation and of what it calls.

    The TPU's compiler divides one collective into several fusions, in which other work goes on
    meanwhile; each comes with the channel that such parts have in common, others with "".
    """
    here = module[name]
    for each in here.values():
        kind = each.opcode.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            yield channel[1] if fused and channel else "", _collective(kind, each, here, times)
            continue
        inner = _CALLED.findall(each.attributes)
        if branches := _BRANCHES.search(each.attributes):
            inner += re.findall(r"%?([\w.\-]+)", branches[1])
        repeats = _trips(module, each) if each.opcode == "while" else 1
        is_scatter = each.opcode == "fusion" and inner[0].startswith("all-reduce-scatter")
        is_part = each.opcode == "fusion" and not is_scatter
        for called in filter(module.__contains__, inner):
            for part, one in _walk(module, called, times * repeats, is_part):
                # The TPU's reduce-scatter: an all-reduce, of which each device takes its part.
                yield part, dataclasses.replace(one, kind="reduce-scatter") if is_scatter else one


def _collective(kind: str, each: _Instruction, here, times: int) -> Collective:
    arrays = [_ARRAY.findall(here[operand].type) for operand in each.operands if operand in here]
    arrays = list(itertools.chain(*arrays))
    groups = _groups(each.attributes)
    size = sum(_bytes(*array) for array in arrays)
    if kind == "all-gather":
        size *= len(groups[0]) if groups else 1
    source = re.search(r'op_name="([^"]*)"', each.attributes)
    shapes = tuple(f"{dtype}[{sizes}]" for dtype, sizes in arrays)
    return Collective(kind, size, shapes, groups, times, source[1] if source else "")


def _bytes(dtype: str, sizes: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Groups of devices, in any of the ways in which XLA writes them."""
    written = re.search(r"(?:replica_groups|source_target_pairs)=(.*)", attributes)
    if not written:
        return ()
    if listed := re.match(r"\{(\{[\d,{} ]*\})\}", written[1]):  # {{0,1},{2,3}}
        groups = re.findall(r"\{([\d, ]+)\}", listed[1])
        return tuple(tuple(int(n) for n in group.split(",")) for group in groups)
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", written[1]):
        ids = _iota(iota[2], iota[3])
        return tuple(map(tuple, ids.reshape(_numbers(iota[1])).tolist()))
    mesh = re.match(r"mesh\[('[^\]]*)\](?:, device_ids=\(([^)]*\)?)\))?\s*\{([^}]*)\}", written[1])
    if mesh:
        groups, ids = _groups_of_mesh(mesh[1], mesh[3]), _device_ids(mesh[2])
        return tuple(tuple(ids[n] for n in group) for group in groups) if ids else groups
    if written[1].startswith("{}"):  # all devices, whose number isn't said
        return ()
    raise UserError(f"unknown way to write groups of devices: {written[1][:80]}.")


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",")]


def _iota(shape: str, order: str | None) -> np.ndarray:
    """0, 1, … of this shape, its axes transposed to this order."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _device_ids(written: str | None) -> list[int]:
    """The devices of a mesh in its order: 0,2,1,3 or [2,2]T(1,0); none: as they are counted."""
    if not written:
        return []
    if iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", written):
        return _iota(iota[1], iota[2]).ravel().tolist()
    return _numbers(written)


def _groups_of_mesh(sizes: str, axes: str) -> tuple[tuple[int, ...], ...]:
    """Groups along some axes of a mesh: 'a'=4,'b'=2 and 'b', or a part of an axis, 'a':(2)2."""
    dims = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    places = np.indices(tuple(dims.values())).reshape(len(dims), -1)
    kept = list(places)  # where a device is, but for its place in its group
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        number, dim = list(dims).index(name), dims[name]
        size, before = int(size or dim), int(before or 1)
        after = dim // (before * size)
        place = places[number]
        kept[number] = place // (after * size) * after + place % after
    groups: dict[tuple[int, ...], list[int]] = {}
    for device, key in enumerate(zip(*(each.tolist() for each in kept), strict=True)):
        groups.setdefault(key, []).append(device)
    return tuple(map(tuple, groups.values()))


def _trips(module, loop: _Instruction) -> int:
    """How often a loop's body runs."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]
    found = set(_integers(module, condition))
    if len(found) != 1:
        raise UserError(f"loop {loop.name} runs an unknown number of times: its condition "
                        f"compares with {sorted(found) or 'no constant'}.")  # fmt: skip
    return found.pop()


def _integers(module, name: str) -> Iterator[int]:
    """Integer constants of a computation and of what it calls."""
    for each in module[name].values():
        if each.opcode == "constant" and re.match(r"[su]32\[\]", each.type):
            yield int(each.operands[0])
        for called in _CALLED.findall(each.attributes):
            yield from _integers(module, called)
