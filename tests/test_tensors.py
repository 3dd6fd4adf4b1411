import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite.tensors import digest, flatten, unflatten

DTYPES = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.uint16, jnp.bool_, jnp.float8_e4m3fn]


def of(x):
    return digest({"x": x})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    size = 24
    raw = np.random.default_rng(0).integers(0, 256, size * jnp.dtype(dtype).itemsize, np.uint8)
    raw = raw % 2 if dtype == jnp.bool_ else raw
    bits = range(1) if dtype == jnp.bool_ else range(8)

    def tensor(data):
        return jnp.asarray(np.frombuffer(data.tobytes(), jnp.dtype(dtype)).reshape(4, 6))

    seen = {of(tensor(raw))}
    for byte in range(len(raw)):
        for bit in bits:
            flipped = raw.copy()
            flipped[byte] ^= 1 << bit
            seen.add(of(tensor(flipped)))
    assert len(seen) == 1 + len(raw) * len(bits)


def test_order_counts():
    x = jnp.arange(60, dtype=jnp.float32).reshape(5, 12)
    others = [
        x[::-1],
        x[:, ::-1],
        x.at[0, 0].set(x[4, 11]).at[4, 11].set(x[0, 0]),
        x.T.reshape(5, 12),
    ]
    assert len({of(x), *map(of, others)}) == 5


def test_zeros_of_either_sign_and_nans_differ():
    values = [0.0, -0.0, float("nan"), float("inf")]
    assert len({of(jnp.full(3, v)) for v in values}) == 4


@pytest.mark.parametrize("shape", [(8,), (16, 4), (8, 2, 8)])
def test_no_mesh_changes_it(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    devices = np.array(jax.devices())
    layouts = [
        (devices[:1], ("a",), PartitionSpec()),
        (devices, ("a",), PartitionSpec("a")),
        (devices.reshape(4, 2), ("a", "b"), PartitionSpec("b")),
        (devices.reshape(2, 4), ("a", "b"), PartitionSpec(*[None] * (len(shape) - 1), "b")),
    ]
    found = {of(jax.device_put(x, NamedSharding(Mesh(d, n), spec))) for d, n, spec in layouts}
    assert found == {of(x)}


def test_it_is_the_sum_that_the_format_says():
    """Spelt out in Python integers: old checkpoints stand or fall by this."""

    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    x = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    words = x.reshape(-1).view(np.uint32).tolist()
    want = sum(mix(w ^ mix((i + 0x9E3779B9) % 2**32)) for i, w in enumerate(words)) % 2**32
    assert of(jnp.asarray(x)) == want


keys = st.text(st.characters(exclude_characters="/", codec="utf-8"), min_size=1, max_size=3)
leaves = st.integers(1, 3).map(lambda n: jax.ShapeDtypeStruct((n,), jnp.float32))
trees = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=6)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(keys, trees, max_size=3))
def test_names_and_trees_are_inverse(tree):
    flat = flatten(tree)
    assert list(flat) == sorted(flat)
    assert unflatten(tree, flat) == tree
