"""Relative-position buckets, rotary angles, learned places."""

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.positions import LearnedPositions, Rotary, relative_bucket, rotate

COMMON = layers.Common("float32", layers.FanIn())


def buckets(distance, bidirectional):
    """Bucket of keys `distance` places after the query."""
    return np.asarray(relative_bucket(jnp.asarray(distance), 32, 128, bidirectional))


def starts(values):
    """The first distance of each bucket, which is the place where the bucket changes."""
    return [int(i) for i in np.flatnonzero(np.diff(values, prepend=-1))]


def test_bidirectional_buckets():
    # The facts: 0-7 are themselves, then a bucket begins at each of these distances.
    before = buckets(-np.arange(300), bidirectional=True)
    assert before.max() == 15
    assert starts(before) == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    after = buckets(np.arange(1, 300), bidirectional=True)
    np.testing.assert_array_equal(after, before[1:] + 16)


def test_causal_buckets():
    # Hugging Face transformers 5.23, T5Attention._relative_position_bucket, distances 0 to 200.
    before = buckets(-np.arange(300), bidirectional=False)
    reference = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert before.max() == 31
    assert starts(before) == reference
    assert np.all(buckets(np.arange(1, 300), bidirectional=False) == 0)


def rotation(positions, head_dim=8):
    module = Rotary().build(4, head_dim, True, COMMON, "rotary")
    return module.apply({}, jnp.asarray(positions, jnp.int32)[None], method="rotate")


def test_rotary_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = (
        jnp.asarray(np.tile(rng.normal(size=(1, 1, 2, 8)), (1, 6, 1, 1)), jnp.float32)
        for _ in range(2)
    )

    def scores(queries, keys):
        return jnp.einsum("BTNH,BTNH->BTN", rotate(q, rotation(queries)), rotate(k, rotation(keys)))

    at = np.array([0, 3, 10, 50, 200, 1000])
    np.testing.assert_allclose(scores(at + 7, at), jnp.tile(scores(at + 7, at)[:, :1], (1, 6, 1)),
                               atol=2e-4)  # fmt: skip
    assert np.ptp(scores(at, 0 * at)[0, :, 0]) > 0.1


def test_rotary_keeps_norms_and_leaves_position_0():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 2, 8)), jnp.float32)
    turned = rotate(x, rotation([0, 5, 99]))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_rotary_angles_are_those_of_the_paper():
    sin, cos = rotation([0, 1, 257])
    angle = np.array([0, 1, 257])[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-5)
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-5)


def test_rotary_tells_neighbours_apart_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = rotate(x, rotation([256, 257]))
    assert turned.dtype == jnp.bfloat16
    assert not np.array_equal(turned[0, 0], turned[0, 1])


def test_an_odd_head_cannot_be_rotated():
    with pytest.raises(UserError, match="even head_dim, not 7"):
        Rotary().build(4, 7, True, COMMON, "rotary")


def test_learned_positions_are_rows_of_the_table():
    module = LearnedPositions(5).build(4, 8, True, COMMON, "positions")
    table = jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)), jnp.float32)
    at = jnp.asarray([[0, 4, 2], [1, 1, 3]], jnp.int32)
    placed = module.apply({"params": {"embedding": table}}, at, 6, method="embed")
    np.testing.assert_array_equal(placed, np.asarray(table)[np.asarray(at)])
