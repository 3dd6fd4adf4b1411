"""Tensors at rest: their names, the digests that prove their bits, and how they are read back.

A tensor's name is its path in the state joined by "/": `params/decoder/layers/attention/query`.

Reading goes through TensorStore rather than Orbax's own restore, which casts a changed dtype
without a word and, on a damaged file, prints tracebacks from threads that outlive the error.
"""

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Tree = Mapping[str, Any]


class UnusableError(Exception):
    """A checkpoint cannot be used; the message says which tensor or file, and why."""


def digest(tree: Tree) -> dict[str, int]:
    """A 32-bit digest of the bits of each array, by path; the same on every mesh and device count.

    Each 32-bit word is mixed with its row-major position, then all are summed modulo 2³². The mix
    is one-to-one, so any change to a single element shows for certain.
    """
    # One program per shape, dtype and sharding: parameters and their moments share theirs. Each is
    # waited for before the next: emulated CPU devices share few threads, and several programs that
    # sum over devices at the same time would wait for each other for ever.
    return {path: int(_leaf_digest(leaf, _is_large(leaf))) for path, leaf in flatten(tree).items()}


LARGE = SLICE_BYTES = 64 << 20  # from here on memory matters


def _is_large(x: jax.Array) -> bool:
    """Whether to go row by row: XLA's CPU backend stores the mixed words, twice the array's size.

    Not where devices share the array: rows may lie on several.
    """
    return x.ndim > 1 and x.nbytes > LARGE and len(x.sharding.device_set) == 1


@functools.partial(jax.jit, static_argnames="by_row")
def _leaf_digest(x: jax.Array, by_row: bool) -> jax.Array:
    if not by_row:
        return _sum_of_mixed(_words(x), jnp.uint32(0))
    size = math.prod(x.shape[1:]) * (2 if jax.dtypes.itemsize_bits(x.dtype) == 64 else 1)

    def add(total, numbered):
        number, row = numbered
        return total + _sum_of_mixed(_words(row), number * jnp.uint32(size % 2**32)), None

    rows = jnp.arange(x.shape[0], dtype=jnp.uint32)
    return lax.scan(add, jnp.uint32(0), (rows, x))[0]


def _sum_of_mixed(words: jax.Array, start: jax.Array) -> jax.Array:
    """Of words whose first one stands at position `start`."""
    position, stride = jnp.full(words.shape, start), 1
    for axis in reversed(range(words.ndim)):
        steps = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + steps * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(position + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    narrow = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
    return lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)  # 64 bits: a last axis of 2


def _mix(h: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby): a bijection in which every bit reaches every other.

    Source: https://github.com/aappleby/smhasher, `fmix32`.
    """
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Every leaf (jax array or `ShapeDtypeStruct`) under its name, sorted by name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        part = flatten(value, prefix + key + "/") if inner else {prefix + key: value}
        for path, leaf in part.items():
            if path in flat:
                raise ValueError(f"two tensors have the name {path!r}")
            if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                raise TypeError(f"{path} must be a jax array, not {type(leaf).__name__}")
            if leaf.size == 0:
                raise ValueError(f"{path} is an empty array, which Orbax cannot store")
            flat[path] = leaf
    return dict(sorted(flat.items()))


def unflatten(like: Tree, leaves: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree of `like` with the leaves of those names."""
    return {
        key: unflatten(value, leaves, f"{prefix}{key}/")
        if isinstance(value, Mapping)
        else leaves[prefix + key]
        for key, value in like.items()
    }


def signature(leaf: Any) -> dict[str, Any]:
    """The JSON form of a tensor's dtype and shape."""
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any], partial: bool) -> str:
    """How the checkpoint's tensors differ from the model's, on one line; empty if they don't."""

    def show(kind: Mapping[str, Any]) -> str:
        return f"{kind['dtype']}{list(kind['shape'])}"

    found = []
    for path in sorted({*stored, *wanted}):
        if path not in stored:
            found.append(f"{path} is only in the model")
        elif path not in wanted:
            found += [] if partial else [f"{path} is only in the checkpoint"]
        elif show(stored[path]) != show(signature(wanted[path])):
            here, there = show(stored[path]), show(signature(wanted[path]))
            found.append(f"{path} is {here} in the checkpoint and {there} in the model")
    more = f", and {len(found) - 4} more" if len(found) > 4 else ""
    return ", ".join(found[:4]) + more


def read(folder: Path, wanted: Mapping[str, Any]) -> Iterator[tuple[str, jax.Array]]:
    """Each tensor of `wanted`, with its sharding; a few are read ahead of the one being placed."""
    import tensorstore as ts

    # A context of its own, so that no block comes from an earlier read of the same files.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})
    base = {"driver": "file", "path": f"{folder}/"}
    stores = {}
    for path in wanted:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        stores[path] = ts.open(spec, open=True, read=True, context=context)
    paths, ahead = list(wanted), {}
    for i, path in enumerate(paths):
        for later in paths[i : i + 8]:
            if later not in ahead:
                ahead[later] = _request(later, stores.pop(later), wanted[later], folder)
        yield path, _place(path, ahead[path], wanted[path], folder)
        ahead[path] = None


def write(folder: Path, path: str, value: np.ndarray) -> None:
    """Adds one tensor to a store that `read` understands, in slices that keep memory low."""
    import tensorstore as ts

    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    rows = max(1, SLICE_BYTES // max(1, value.nbytes // max(1, len(value) if value.ndim else 1)))
    chunks = [min(rows, value.shape[0]), *value.shape[1:]] if value.ndim else []
    store = ts.open(
        {
            "driver": "zarr",
            "kvstore": {**kvstore, "path": f"{path}/"},
            "metadata": {"chunks": chunks, "compressor": {"id": "zstd", "level": 1}},
        },
        create=True,
        dtype=value.dtype.name,
        shape=value.shape,
    ).result()
    if not value.ndim:
        store.write(value).result()
    for start in range(0, len(value) if value.ndim else 0, rows):
        part = value[start : start + rows]
        store[start : start + len(part)].write(part).result()


def _request(path: str, opening: Any, like: Any, folder: Path) -> dict[Any, Any]:
    """Starts to read the blocks that this process's devices hold: {their bounds: future}."""
    with _read_errors(path, folder):
        store = opening.result()
        if (store.dtype.name, store.shape) != (str(like.dtype), like.shape):
            raise UnusableError(
                f"{path} is stored as {store.dtype.name}{list(store.shape)}, saved as "
                f"{like.dtype}{list(like.shape)}"
            )
        blocks = {_bounds(index, like.shape): index for index in _indices(like).values()}
        return {bounds: store[index].read() for bounds, index in blocks.items()}


def _place(path: str, blocks: dict[Any, Any], like: Any, folder: Path) -> jax.Array:
    with _read_errors(path, folder):
        values = {bounds: np.asarray(future.result()) for bounds, future in blocks.items()}
    indices = _indices(like)
    shards = [jax.device_put(values[_bounds(i, like.shape)], d) for d, i in indices.items()]
    return jax.make_array_from_single_device_arrays(like.shape, _sharding(like), shards)


def _sharding(like: Any) -> jax.sharding.Sharding:
    return like.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _indices(like: Any) -> dict[Any, Any]:
    return _sharding(like).addressable_devices_indices_map(like.shape)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


@contextlib.contextmanager
def _read_errors(path: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        named = re.findall(rf'"{re.escape(str(folder))}/([^"]+)"', text)
        where = f" in state/{named[-1]}" if named else ""
        raise UnusableError(f"{path} cannot be read{where} ({gist(error)})") from error


def gist(error: BaseException) -> str:
    """One clause out of an error that may carry pages of TensorStore's specifications."""
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    text = text.split(" [")[0].rstrip(".")
    # "OUT_OF_RANGE: Error writing … : Error writing … : No space left on device"
    return text.split(": ")[-1] if re.match("[A-Z_]+: ", text) else text
