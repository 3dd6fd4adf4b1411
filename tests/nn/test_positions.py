"""Relative-position buckets, rotary angles, learned places."""

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.positions import (
    LearnedPositions,
    LinearRotary,
    LongRotary,
    Rotary,
    Sinusoidal,
    last_position,
    relative_bucket,
    rotate,
)

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


def test_an_offset_skips_rows_of_the_table():
    module = LearnedPositions(3, offset=2).build(4, 8, True, COMMON, "positions")
    table = jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)), jnp.float32)
    placed = module.apply({"params": {"embedding": table}}, jnp.arange(3)[None], 6, method="embed")
    np.testing.assert_array_equal(placed[0], table[2:])
    with pytest.raises(UserError, match="offset=-1"):
        LearnedPositions(3, offset=-1)


def test_linear_scaling_is_slower_time():
    slow, plain = LinearRotary(100.0, factor=4.0), Rotary(100.0)
    np.testing.assert_allclose(4 * slow.frequencies(8), plain.frequencies(8), rtol=1e-7)
    with pytest.raises(UserError, match="factor=0 must be positive"):
        LinearRotary(factor=0)


LONG = LongRotary(
    100.0, short=(1.0, 1.5, 2.0, 3.0), long=(2.0, 5.0, 9.0, 30.0), original_length=4, factor=8.0
)


def long_rotation(positions):
    module = LONG.build(4, 8, True, COMMON, "rotary")
    return module.apply({}, jnp.asarray(positions, jnp.int32), method="rotate")


def test_a_document_s_last_position():
    # Two documents, padding that stays at 0, and one that began before this call.
    at = jnp.asarray([[0, 1, 2, 0, 1, 0, 0], [7, 8, 9, 0, 1, 2, 3]], jnp.int32)
    assert last_position(at).tolist() == [[2, 2, 2, 1, 1, 0, 0], [9, 9, 9, 3, 3, 3, 3]]


@pytest.mark.parametrize(("length", "factors"), [(4, LONG.short), (5, LONG.long)])
def test_long_rotations_depend_on_the_document_s_length(length, factors):
    sin, cos = long_rotation(np.arange(length)[None])
    angle = np.arange(length)[:, None] / (np.array(factors) * 100.0 ** (np.arange(4) / 4))
    amplitude = np.sqrt(1 + np.log(8) / np.log(4))  # Ding et al. 2024, §3.3
    np.testing.assert_allclose(sin[0], amplitude * np.sin(angle), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cos[0], amplitude * np.cos(angle), rtol=1e-5, atol=1e-6)


def test_long_rotations_of_packed_documents_are_those_of_each_alone():
    packed = long_rotation([[*range(6), *range(3)], [*range(3), *range(6)]])
    for part, long, short in zip(
        packed, long_rotation([range(6)]), long_rotation([range(3)]), strict=True
    ):
        np.testing.assert_array_equal(part[0], np.concatenate([long[0], short[0]]))
        np.testing.assert_array_equal(part[1], np.concatenate([short[0], long[0]]))


def test_long_rotations_need_a_factor_for_every_pair():
    with pytest.raises(UserError, match="4 and 4 factors; head_dim=10 needs 5 of each"):
        LONG.build(4, 10, True, COMMON, "rotary")


def test_sines_and_cosines_are_those_of_the_paper():
    module = Sinusoidal().build(4, 8, True, COMMON, "positions")
    at = np.array([0, 1, 63, 511])
    got = module.apply({}, jnp.asarray(at, jnp.int32)[None], 12, method="embed")[0]
    angle = at[:, None] / 10_000.0 ** (2 * np.arange(6) / 12)
    np.testing.assert_allclose(got[:, :6], np.sin(angle), atol=4e-5)
    np.testing.assert_allclose(got[:, 6:], np.cos(angle), atol=4e-5)
    with pytest.raises(UserError, match="sinusoidal positions need an even width, not 9"):
        module.apply({}, jnp.asarray(at, jnp.int32)[None], 9, method="embed")
