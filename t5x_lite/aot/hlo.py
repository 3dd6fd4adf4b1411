"""What a compiled program sends between devices and moves in memory, read from its HLO text.

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
        overlaps: whether it is started and awaited later, or is part of other work; a program
            waits for one that doesn't.
        slices: of several TPU slices, how many it joins, over the network between them; such a one
            has no groups. 1: it stays inside of a slice, and groups count the slice's devices.
    """

    kind: str
    bytes: int
    shapes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    times: int
    source: str
    overlaps: bool = False
    slices: int = 1

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
    is_root: bool


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class _Module(dict[str, dict[str, _Instruction]]):
    """Every computation's instructions by name.

    `turns` is how often a loop runs whose trip count the text doesn't say.
    """

    turns: int | None = None


def collectives(text: str, turns: int | None = None) -> list[Collective]:
    """Every collective that the program runs, with how often it does.

    Args:
        text: of the compiled program.
        turns: how often a loop runs whose trip count isn't known, one that waits for a condition.

    Raises:
        UserError: no HLO module, or such a loop and no `turns`.
    """
    module, entry = _parse(text)
    module.turns = turns
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


def hbm_bytes(text: str, turns: int | None = None) -> int:
    """Bytes that one device reads from and writes to its main memory in one run.

    Each instruction reads its operands and writes its results once; what a fusion holds inside
    stays inside, and of an array that is sliced, updated or gathered in place only that part moves.
    Loops count every turn, of a conditional's branches the larger. Arrays in another memory, such
    as a TPU's VMEM (S(1) in their layout) or its host's, don't count. A kernel may read its
    operands more than once; that isn't seen. Arguments and errors as of `collectives`.
    """
    module, entry = _parse(text)
    module.turns = turns
    return _traffic(module, entry)


def _parse(text: str) -> tuple[_Module, str]:
    """Every computation's instructions by name, and the name of the first that runs."""
    module = _Module()
    entry, here = None, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = module.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif here is not None and (found := _LINE.match(line)):
            root, name, kind, opcode, rest = found.groups()
            inside, attributes = _split_operands(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside,)
            here[name] = _Instruction(name, kind, opcode, operands, attributes, bool(root))
    if entry is None:
        raise UserError("this is no HLO module: it has no ENTRY computation.")
    return module, entry


def _split_operands(rest: str) -> tuple[str, str]:
    """What stands before and after the parenthesis that closes the operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _walk(
    module, name: str, times: int, fused: bool = False, overlaps: bool = False
) -> Iterator[tuple[str, Collective]]:
    """Collectives of a computation and of what it calls.

    The TPU's compiler divides one collective into several fusions, in which other work goes on
    meanwhile; each comes with the channel that such parts have in common, others with "".
    """
    here = module[name]
    for each in here.values():
        kind = each.opcode.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            found = _collective(kind, each, here, times)
            apart = overlaps or fused or kind != each.opcode
            yield (
                channel[1] if fused and channel else "",
                dataclasses.replace(found, overlaps=apart),
            )
            continue
        if each.opcode == "send" and "_xla_megascale_transfer_type" in each.attributes:
            yield "", _between_slices(each, here, times)
            continue
        inner = _CALLED.findall(each.attributes)
        if branches := _BRANCHES.search(each.attributes):
            inner += re.findall(r"%?([\w.\-]+)", branches[1])
        repeats = _trips(module, each) if each.opcode == "while" else 1
        is_scatter = each.opcode == "fusion" and inner[0].startswith("all-reduce-scatter")
        is_part = each.opcode == "fusion" and not is_scatter
        for called in filter(module.__contains__, inner):
            apart = overlaps or each.opcode == "async-start"
            for part, one in _walk(module, called, times * repeats, is_part, apart):
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


# As the TPU's compiler names what a host sends to hosts of other slices.
_TRANSFERS = {
    **{"ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "ALL_TO_ALL": "all-to-all"},
    **{"REDUCE_SCATTER": "reduce-scatter", "ONE_TO_ONE": "collective-permute"},
}


def _between_slices(each: _Instruction, here, times: int) -> Collective:
    """A collective among slices: what a device's host sends, while the device goes on."""
    written = re.search(r'_xla_megascale_transfer_type="(\w+)"', each.attributes)[1]
    if written not in _TRANSFERS:
        raise UserError(f"unknown transfer between slices: {written}.")
    kind = _TRANSFERS[written]
    target = re.search(r"_xla_megascale_target=(\{\{[^=]*\}\}|\"[^\"]*\")", each.attributes)[1]
    if kind == "collective-permute":  # {{100000->200000},…}: a slice's number, then a device's
        slices = len({int(number) // 100_000 for number in re.findall(r"\d+", target)})
    else:  # "{1,2}x{0:3}": slices, and devices of each
        slices = _count_of(re.match(r"\"\{([\d,:]+)\}x", target)[1])
    arrays = _ARRAY.findall(here[each.operands[0]].type)
    size = sum(_bytes(*array) for array in arrays) * (slices if kind == "all-gather" else 1)
    shapes = tuple(f"{dtype}[{sizes}]" for dtype, sizes in arrays)
    source = re.search(r'_rendezvous="([^"]*)"', each.attributes)
    return Collective(kind, size, shapes, (), times, source[1], True, slices)


def _count_of(ranges: str) -> int:
    """How many numbers 1,3:5 are."""
    pairs = ([int(end) for end in part.split(":")] for part in ranges.split(","))
    return sum(pair[-1] - pair[0] + 1 for pair in pairs)


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
    if len(found) != 1 and module.turns is not None:
        return module.turns
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


# --- memory

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency", "get-dimension-size", "domain",
}  # fmt: skip
_PARTS = ("dynamic-slice", "slice", "gather")  # read of their first operand what they return
_LAID_OUT = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


def _traffic(module, name: str) -> int:
    """Bytes that a computation, and what it calls, moves to and from main memory."""
    return sum(_moved(module, module[name], each) for each in module[name].values())


def _moved(module, here, each: _Instruction) -> int:
    called = [one for one in _CALLED.findall(each.attributes) if one in module]
    if branches := _BRANCHES.search(each.attributes):
        called += re.findall(r"%?([\w.\-]+)", branches[1])
    if each.opcode == "while":
        condition = re.search(r"condition=%?([\w.\-]+)", each.attributes)[1]
        return _trips(module, each) * sum(_traffic(module, one) for one in (*called, condition))
    if each.opcode == "conditional":
        return max(_traffic(module, one) for one in called)
    if each.opcode in ("call", "async-start"):
        return sum(_traffic(module, one) for one in called)
    if each.opcode in _FREE or each.opcode in ("async-done", "async-update") or _allocates(each):
        return 0
    # The TPU's compiler also has fusions that start and await a collective, and says so by name.
    apart = each.name if each.name.startswith("async-collective") else each.opcode
    apart = apart.split(".")[0]
    if each.opcode == "fusion" and apart == each.opcode:
        return _moved_by_fusion(module, here, each, module[called[0]])
    # What is started and awaited reads when it starts and has written when it is done.
    reads, writes = not apart.endswith("-done"), not apart.endswith("-start")
    operands = [_in_memory(here[one].type) for one in each.operands if one in here]
    result = sum(_in_memory(each.type)) if writes else 0
    if each.opcode.removesuffix("-start") in _PARTS:
        # One that is started gives its operands again, then what it is to return.
        part = _sizes(each.type)[0 if writes else len(each.operands)]
        return min(sum(operands[0]), part) + sum(map(sum, operands[1:])) + result
    if each.opcode == "dynamic-update-slice":
        return sum(map(sum, operands[1:])) + min(result, _size(here[each.operands[1]].type))
    if each.opcode == "scatter":  # (array, places, updates): reads and writes what it updates
        return sum(map(sum, operands[1:])) + 2 * min(result, sum(operands[2]))
    return (sum(map(sum, operands)) if reads else 0) + result


def _moved_by_fusion(module, here, each: _Instruction, body) -> int:
    places = {one.operands[0]: one.name for one in body.values() if one.opcode == "parameter"}
    total = 0
    for number, operand in enumerate(each.operands):
        if operand in here:
            size = sum(_in_memory(here[operand].type))
            total += min(size, _read(module, body, places[str(number)]))
    root = next(one for one in body.values() if one.is_root)
    results = root.operands if root.opcode == "tuple" else (root.name,)
    written, kept = [_written(body, body[name]) for name in results], _in_memory(each.type)
    if len(written) != len(kept):  # one operation with several results
        return total + sum(kept)
    return total + sum(map(min, zip(kept, written, strict=True)))


def _read(module, body, name: str) -> int:
    """Bytes of a fused computation's value that are read: all, if not only parts of it."""
    whole, total = _size(body[name].type), 0
    for user in body.values():
        if name not in user.operands or user.opcode == "parameter":
            continue
        if user.opcode == "bitcast":
            total += _read(module, body, user.name)
        elif user.opcode == "fusion":
            inner = module[_CALLED.findall(user.attributes)[0]]
            total += sum(
                _read(module, inner, one.name)
                for one in inner.values()
                if one.opcode == "parameter" and user.operands[int(one.operands[0])] == name
            )
        elif user.opcode in _PARTS and user.operands.count(name) == 1 and user.operands[0] == name:
            total += _size(user.type)
        elif not _is_updated(body, user, name):
            return whole
    return min(whole, total)


def _is_updated(body, user: _Instruction, name: str) -> bool:
    """Whether a value is updated in place, and so only written."""
    is_target = user.opcode == "dynamic-update-slice" and user.operands[0] == name
    return is_target and _is_result(body, user)


def _is_result(body, each: _Instruction) -> bool:
    """Whether a value leaves its fusion without passing anything else."""
    users = [one for one in body.values() if each.name in one.operands]
    return all(one.opcode in ("bitcast", "tuple") and _is_result(body, one) for one in users)


def _written(body, each: _Instruction) -> int:
    """Bytes of a fusion's result that are written: an update's, if it is one."""
    if each.opcode == "bitcast":
        return _written(body, body[each.operands[0]])
    changed = body[each.operands[1]] if each.opcode == "dynamic-update-slice" else each
    return _size(changed.type)


def _allocates(each: _Instruction) -> bool:
    """A custom call that does no more than reserve memory."""
    return 'custom_call_target="AllocateBuffer"' in each.attributes


def _size(kind: str) -> int:
    return sum(_sizes(kind))


def _in_memory(kind: str) -> list[int]:
    """Bytes of each array of a type in main memory: 0 of one that is in another."""
    layouts = (layout for _, _, layout in _LAID_OUT.findall(kind))
    return [
        0 if re.search(r"S\([1-9]", layout) else size
        for size, layout in zip(_sizes(kind), layouts, strict=True)
    ]


def _sizes(kind: str) -> list[int]:
    """Bytes of each array of a type, with what fills up a TPU's tiles.

    `{1,0:T(8,128)}` has tiles of 8 along axis 0 and 128 along axis 1, which moves fastest.
    """
    found = []
    for dtype, sizes, layout in _LAID_OUT.findall(kind):
        dims = _numbers(sizes) if sizes else []
        if tile := re.match(r"([\d,]+):T\(([\d,]+)\)", layout):
            for axis, size in zip(_numbers(tile[1]), reversed(_numbers(tile[2])), strict=False):
                dims[axis] += -dims[axis] % size
        found.append(_bytes(dtype, ",".join(map(str, dims))))
    return found
