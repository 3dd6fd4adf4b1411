"""What a step keeps: the state's buffers are used again, and what is small stays accurate."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from t5x_lite import losses, optim, schedules
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.state import TrainState, state_shardings
from t5x_lite.train.step import accumulate, make_train_step, model_apply
from t5x_lite.types import Output, Unembedding

RATE = schedules.linear(0.01, 10, 2)


@pytest.fixture(scope="module")
def sharded_step(tiny, initial, batch_of):
    """`sharded_step(microbatches)`: a compiled step over fsdp=4, the state's shardings, results."""
    config = tiny("gpt2")
    sharding = Sharding(MeshConfig(fsdp=4).build(jax.devices()[:4]), "fsdp")
    optimizer = optim.AdamW(RATE, epsilon=1e-5, moment_dtype="bfloat16")
    shapes, shardings = state_shardings(config, optimizer, sharding)
    batch = batch_of(config, 0)
    batch = {k: jax.device_put(v, sharding.batch(v.shape, k)) for k, v in batch.items()}

    @functools.cache
    def make(microbatches):
        start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        state = jax.device_put(start.replace(params=initial(config)), shardings)
        step = make_train_step(
            model_apply(config, sharding), losses.CrossEntropy(),
            optimizer.build(parameters.abstract(config)[1]), RATE, microbatches, None, sharding,
        )  # fmt: skip
        jitted = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
        compiled = jitted.lower(state, batch, jax.random.key(1)).compile()
        size = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        state, metrics = compiled(state, batch, jax.random.key(1))
        return compiled.memory_analysis(), size, jax.tree.map(np.asarray, (state, metrics))

    return make, batch


def test_the_whole_state_is_donated(sharded_step):
    """Every byte that a device holds of it becomes the next state's."""
    memory, size, _ = sharded_step[0](1)
    assert memory.alias_size_in_bytes == size


def test_microbatches_of_unequal_token_counts_equal_one_batch_over_a_mesh(sharded_step):
    make, batch = sharded_step
    rows = np.sum(np.asarray(batch["weights"]), axis=1)
    assert len({sum(rows[part::2]) for part in range(2)}) == 2
    (state, metrics), (others, other_metrics) = (make(k)[2] for k in (2, 1))
    for name in ("loss", "grad_norm", "accuracy"):
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-5, err_msg=name)
    found, expected = (optim_paths(s.params) for s in (state, others))
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=3e-5, err_msg=path)


def optim_paths(tree):
    return {optim.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


# --- accumulation

V, D, ROWS = 11, 4, 16


def bfloat16_apply(params, batch, keys):
    del keys
    embedding, kernel = (params[name].astype(jnp.bfloat16) for name in ("embedding", "kernel"))
    return Output(embedding[batch["tokens"]], Unembedding(kernel, None, V))


def test_gradients_of_bfloat16_are_accumulated_in_float32():
    rng = np.random.default_rng(3)
    params = {name: rng.standard_normal((V, D), np.float32) for name in ("embedding", "kernel")}
    batch = {name: rng.integers(0, V, (ROWS, 6), np.int32) for name in ("tokens", "targets")}
    batch["weights"] = np.ones((ROWS, 6), np.float32)
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    state = TrainState(jnp.zeros((), jnp.int32), params, ())
    loss = losses.CrossEntropy()

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(batch, microbatches):
        return accumulate(loss, bfloat16_apply, state, batch, None, microbatches)[0]

    found = gradients(batch, ROWS)
    parts = [gradients({k: v[i : i + 1] for k, v in batch.items()}, 1) for i in range(ROWS)]
    for name, value in found.items():
        assert value.dtype == jnp.float32
        each = np.stack([np.asarray(part[name]) for part in parts]) / ROWS
        scale = np.abs(each.sum(axis=0)).max()
        np.testing.assert_allclose(value, each.sum(axis=0), atol=3e-6 * scale, err_msg=name)
        rounded = np.zeros((V, D), ml_dtypes.bfloat16)
        for part in each:
            rounded = (rounded + part.astype(ml_dtypes.bfloat16)).astype(ml_dtypes.bfloat16)
        assert np.abs(rounded.astype(np.float32) - value).max() > 1e-3 * scale


# --- moments


def test_moments_in_bfloat16_are_rounded_between_steps_and_nowhere_else():
    """Adam by hand in float32, its moments rounded by ml_dtypes."""
    rng = np.random.default_rng(0)
    param = rng.standard_normal((3, 5)).astype(np.float32)
    optimizer = optim.AdamW(
        schedules.constant(0.1), b2=0.99, weight_decay=0, clip_norm=None, moment_dtype="bfloat16"
    )
    transform = optimizer.build({"kernel": ("embed", "mlp")})
    params = {"kernel": jnp.asarray(param)}
    state = transform.init(params)
    update = jax.jit(transform.update)
    m = v = np.zeros((3, 5), ml_dtypes.bfloat16)
    for count in range(1, 6):
        gradient = rng.standard_normal((3, 5)).astype(np.float32)
        m = np.float32(0.9) * m.astype(np.float32) + np.float32(0.1) * gradient
        v = np.float32(0.99) * v.astype(np.float32) + np.float32(0.01) * gradient**2
        step = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.99**count)) + 1e-8)
        m, v = (x.astype(ml_dtypes.bfloat16) for x in (m, v))
        updates, state = update({"kernel": jnp.asarray(gradient)}, state, params)
        assert updates["kernel"].dtype == jnp.float32
        np.testing.assert_allclose(updates["kernel"], -0.1 * step, rtol=1e-5)
        adam = next(s for s in state if hasattr(s, "mu"))
        assert adam.mu["kernel"].dtype == adam.nu["kernel"].dtype == jnp.bfloat16
        # A unit in the last place: what is rounded may lie at the edge between two numbers.
        np.testing.assert_allclose(
            adam.mu["kernel"].astype(np.float32), m.astype(np.float32), rtol=8e-3
        )
        np.testing.assert_allclose(
            adam.nu["kernel"].astype(np.float32), v.astype(np.float32), rtol=8e-3
        )
        m, v = np.asarray(adam.mu["kernel"]), np.asarray(adam.nu["kernel"])


def test_moments_that_rounding_would_freeze_are_refused():
    with pytest.raises(UserError, match=r"b2=0\.999 decays by 0\.001 a step.*below 0\.9961"):
        optim.AdamW(RATE, b2=0.999, moment_dtype="bfloat16")
    with pytest.raises(UserError, match=r"moment_dtype='float16' must be one of float32, bfloat16"):
        optim.AdamW(RATE, moment_dtype="float16")
    # The largest that isn't refused does shrink every moment, and the smallest that is doesn't.
    numbers = np.linspace(1, 2, 129, dtype=np.float32)[:-1].astype(ml_dtypes.bfloat16)
    for b, shrinks in ((0.99609, True), (0.9981, False)):
        less = (np.float32(b) * numbers.astype(np.float32)).astype(ml_dtypes.bfloat16) < numbers
        assert np.all(less) == shrinks
