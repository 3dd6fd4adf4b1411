"""Laws of the train step, dropout on: what may not change what a run computes."""

import dataclasses
import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses, optim, schedules
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.state import TrainState, state_shardings, to_tree
from t5x_lite.train.step import (
    accumulate,
    check_batch,
    make_eval_step,
    make_train_step,
    model_apply,
)
from t5x_lite.types import Output, Unembedding

RATE = schedules.linear(0.01, 10, 2)
# The epsilons are raised because some gradients are zero but for rounding (those of the biases of
# keys), and both rules would blow that up to a full step.
OPTIMIZERS = {
    "adamw": optim.AdamW(RATE, epsilon=1e-5),
    "adafactor": optim.Adafactor(RATE, min_factored=4, epsilon=1e-10, weight_decay=0.1),
}
MESHES = {
    "dp": MeshConfig(replica=2, fsdp=4),
    "fsdp": MeshConfig(fsdp=8),
    "tp": MeshConfig(fsdp=4, tensor=2),
    "fsdp_tp": MeshConfig(replica=2, fsdp=2, tensor=2),
}
LOSS = losses.CrossEntropy(0.1, 1e-3)
DECAY = 0.9

# Compiling a step takes seconds. So each family here changes several things at once that may not
# change a run; the grid (pytest -m grid) has them one by one, for every optimizer.
AT_ONCE = [
    ("t5", "adafactor", {"scan": False, "rules": "fsdp_tp", "microbatches": 2}),
    ("bert", "adamw", {"scan": False, "rules": "fsdp"}),
    ("gpt2", "adafactor", {"scan": False, "rules": "dp"}),
    ("llama", "adamw", {"scan": False, "rules": "tp", "microbatches": 2}),
    ("llama", "adamw", {"microbatches": 4}),
]
ONE_BY_ONE = [
    (family, name, change)
    for family in ("t5", "bert", "gpt2", "llama")
    for name in OPTIMIZERS
    for change in ({"scan": False}, {"microbatches": 4}, *({"rules": rules} for rules in MESHES))
]


@dataclasses.dataclass
class Trainer:
    """A compiled step with what it needs to begin anew."""

    start: TrainState  # NumPy
    shardings: TrainState
    step: object
    sharding: Sharding

    def run(self, batches, key=1, start=0):
        """(metrics, state) after each batch, on the host; `start` is the first one's step."""
        state = self.start.replace(step=np.asarray(start, np.int32))
        state, history = jax.device_put(state, self.shardings), []
        for batch in batches:
            placed = {k: jax.device_put(v, self.sharding.batch(v.shape)) for k, v in batch.items()}
            state, metrics = self.step(state, placed, jax.random.key(key))
            history.append(jax.tree.map(np.asarray, (metrics, state)))
        return history


@pytest.fixture(scope="module")
def trainer(tiny, initial):
    @functools.cache
    def make(family, name, scan=True, rules=None, microbatches=1, ema=None):
        config, optimizer = tiny(family, scan=scan), OPTIMIZERS[name]
        mesh = MESHES[rules].build() if rules else MeshConfig().build(jax.devices()[:1])
        sharding = Sharding(mesh, rules or "dp")
        shapes, shardings = state_shardings(config, optimizer, sharding, ema is not None)
        start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        params = initial(config)
        start = start.replace(params=params, ema=params if ema else {})
        step = make_train_step(
            model_apply(config, sharding), LOSS,
            optimizer.build(parameters.abstract(config)[1]),
            optimizer.schedule, microbatches, ema, sharding,
        )  # fmt: skip
        jitted = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
        return Trainer(start, shardings, jitted, sharding)

    return make


@pytest.fixture(scope="module")
def batches(tiny, batch_of):
    return lambda family: [batch_of(tiny(family), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def plain(trainer, batches):
    """Three steps on one device, layers scanned, one microbatch: what all others are to equal."""

    @functools.cache
    def make(family, name):
        return trainer(family, name, ema=DECAY).run(batches(family))

    return make


def leaves(tree):
    return {optim.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected
    )


def assert_same_run(found, expected):
    for (metrics, _), (others, _) in zip(found, expected, strict=True):
        for name, value in others.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    # Layers are stacked in both; the moments are compared with the parameters.
    found, expected = (leaves(to_tree(run[-1][1].replace(ema={}))) for run in (found, expected))
    assert found.keys() == expected.keys()
    # One element in thousands, whose gradient is small, moves by 1.3e-5 more or less: AdamW divides
    # gradients by their own size, rounding included. A step is up to 1e-2.
    for path, value in expected.items():
        close = np.isclose(found[path], value, rtol=1e-4, atol=1e-5)
        assert np.mean(~close) <= 1e-3, path
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=3e-5, err_msg=path)


@pytest.mark.parametrize(
    ("family", "name", "change"),
    AT_ONCE + [pytest.param(*case, marks=pytest.mark.grid) for case in ONE_BY_ONE],
)
def test_layout_does_not_change_the_run(trainer, batches, plain, family, name, change):
    """Unrolled equals scanned, eight devices equal one, microbatches equal one batch.

    Rows have as many different numbers of targets; with four microbatches, one has none.
    """
    assert_same_run(trainer(family, name, **change).run(batches(family)), plain(family, name))


def test_dropout_is_on_and_follows_the_key_and_the_step(trainer, batches):
    """Otherwise the laws above would say little; and the same key gives the same bits."""
    llama = trainer("llama", "adamw", ema=DECAY)
    first, again, other = (llama.run(batches("llama"), key=key) for key in (1, 1, 2))
    later = llama.run(batches("llama")[:1], start=1)
    assert abs(first[0][0]["loss"] - later[0][0]["loss"]) > 1e-3
    found = leaves(again)
    for path, value in leaves(first).items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    for (metrics, _), (others, _) in zip(first, other, strict=True):
        assert abs(metrics["loss"] - others["loss"]) > 1e-3


@pytest.mark.parametrize(("family", "name", "_"), AT_ONCE[:4])
def test_padding_changes_nothing(trainer, batches, plain, family, name, _):
    """Neither tokens outside all documents nor targets of weight 0, whatever they are."""

    def scramble(batch):
        rng, batch = np.random.default_rng(5), dict(batch)
        other = rng.integers(1, 100, batch["targets"].shape, np.int32)
        batch["targets"] = np.where(batch["weights"] == 0, other, batch["targets"])
        for prefix in {name.removesuffix("tokens") for name in batch if name.endswith("tokens")}:
            padding = batch[f"{prefix}segments"] == 0
            for part, high in (("tokens", 100), ("positions", 8)):
                value = batch[f"{prefix}{part}"]
                other = rng.integers(0, high, value.shape, np.int32)
                batch[f"{prefix}{part}"] = np.where(padding, other, value)
        return batch

    scrambled = [scramble(batch) for batch in batches(family)]
    found = leaves(trainer(family, name, ema=DECAY).run(scrambled))
    for path, value in leaves(plain(family, name)).items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize(("family", "name", "_"), [AT_ONCE[1], AT_ONCE[3]])
def test_padding_of_the_vocabulary_never_learns(plain, tiny, family, name, _):
    """AdamW's moments, sums of all gradients, stay zero there."""
    state, seen = leaves(plain(family, name)[-1][1].opt_state), 0
    for path, value in state.items():
        if path.endswith(("embedder/embedding", "head/kernel", "head/bias")):
            assert value.shape[0] == 104
            assert not np.any(value[100:]), path
            assert np.any(value[:100]), path
            seen += 1
    assert seen == 4


@pytest.mark.parametrize(("family", "name", "_"), AT_ONCE[:2])
def test_average_of_parameters_equals_its_recurrence(plain, initial, tiny, family, name, _):
    average = initial(tiny(family))
    for _, state in plain(family, name):
        assert np.any(state.params["embedder"]["embedding"] != average["embedder"]["embedding"])
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, state.params)
        found = leaves(state.ema)
        for path, value in leaves(average).items():
            np.testing.assert_allclose(found[path], value, atol=1e-6, err_msg=path)


def test_metrics_of_a_step(plain):
    for step, (metrics, state) in enumerate(plain("llama", "adamw")):
        assert state.step == step + 1
        assert metrics["learning_rate"] == pytest.approx(float(RATE(step)))
        total = metrics["cross_entropy"] + 1e-3 * metrics["z_loss"]
        assert metrics["loss"] == pytest.approx(total, rel=1e-6)
        assert 0 <= metrics["accuracy"] <= 1
        assert metrics["grad_norm"] > 0


# --- the step's own parts, on a model of two tables, which compiles in no time

V, D = 7, 4


def toy_apply(params, batch, keys):
    hidden = params["embedding"][batch["tokens"]]
    if keys is not None:
        noise = jax.vmap(lambda key: jax.random.normal(key, hidden.shape[1:]))(keys)
        hidden = hidden * (1 + 0.5 * noise)
    return Output(hidden, Unembedding(params["kernel"], None, V))


@pytest.fixture(scope="module")
def toy():
    """Parameters, and a batch of eight rows with different numbers of targets, two with none."""
    rng = np.random.default_rng(3)
    params = {name: rng.standard_normal((V, D), np.float32) for name in ("embedding", "kernel")}
    batch = {name: rng.integers(0, V, (8, 6), np.int32) for name in ("tokens", "targets")}
    count = np.asarray([0, 3, 2, 6, 0, 1, 5, 4])
    batch["weights"] = (np.arange(6)[None] < count[:, None]).astype(np.float32)
    return jax.tree.map(jnp.asarray, (params, batch))


def gradients(loss, toy, microbatches=1, rng=None):
    params, batch = toy
    state = TrainState(jnp.zeros((), jnp.int32), params, ())
    step = jax.jit(lambda state: accumulate(loss, toy_apply, state, batch, rng, microbatches)[:2])
    return jax.tree.map(np.asarray, step(state))


class TwoTerms:
    """A loss whose terms are averaged over different tokens, as BERT's two were."""

    coefficients = MappingProxyType({"first": 1.0, "second": 0.5})

    def masks(self, batch):
        second = jnp.where(batch["targets"] > 2, batch["weights"], 0.0)
        return {"first": batch["weights"], "second": second}

    def weights(self, batch):
        return jax.tree.map(jnp.sum, self.masks(batch))

    def __call__(self, apply, params, state, batch, keys):
        logprobs = losses.token_logprobs(apply(params, batch, keys), batch["targets"])
        powers = {"first": -logprobs, "second": logprobs**2}
        sums = {name: jnp.sum(powers[name] * mask) for name, mask in self.masks(batch).items()}
        return losses.Sums(sums, {})


@pytest.mark.parametrize("loss", [losses.CrossEntropy(0.1, 0.1), TwoTerms()])
def test_microbatches_add_up(toy, loss):
    """Eight microbatches have two without any target."""
    whole, halves, rows = (gradients(loss, toy, k, jax.random.key(0)) for k in (1, 2, 8))
    assert_close(halves, whole)
    assert_close(rows, whole)


def test_each_term_is_divided_by_its_own_weight(toy):
    params, batch = toy
    found, metrics = gradients(TwoTerms(), toy)
    first, second = (np.flatnonzero(mask) for mask in TwoTerms().masks(batch).values())
    assert len(first) != len(second)

    @jax.jit
    @jax.value_and_grad
    def by_hand(params):
        log_p = losses.token_logprobs(toy_apply(params, batch, None), batch["targets"]).ravel()
        return jnp.mean(-log_p[first]) + 0.5 * jnp.mean(log_p[second] ** 2)

    value, expected = by_hand(params)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-6)
    assert metrics["loss"] == pytest.approx(metrics["first"] + 0.5 * metrics["second"], rel=1e-6)
    assert_close(found, expected)


def test_rows_of_padding_can_be_left_out(toy):
    params, batch = toy
    some = np.flatnonzero(np.sum(batch["weights"], axis=1))
    fewer = {name: value[some] for name, value in batch.items()}
    assert_close(gradients(LOSS, (params, fewer)), gradients(LOSS, (params, batch)))


def test_a_batch_without_targets_teaches_nothing(toy):
    params, batch = toy
    empty = batch | {"weights": jnp.zeros_like(batch["weights"])}
    found, metrics = gradients(LOSS, (params, empty), microbatches=2)
    assert metrics["loss"] == 0
    assert not any(np.any(gradient) for gradient in found.values())


def test_evaluation_gives_sums_without_dropout(toy):
    params, batch = toy
    step = jax.jit(make_eval_step(toy_apply, LOSS))
    whole = step(params, batch)
    halves = [step(params, {n: v[i::2] for n, v in batch.items()}) for i in range(2)]
    for name, (total, weight) in whole.items():
        assert float(total) == pytest.approx(sum(float(half[name][0]) for half in halves), rel=1e-6)
        assert float(weight) == sum(float(half[name][1]) for half in halves) == 21
    _, metrics = gradients(LOSS, toy)
    total, weight = whole["cross_entropy"]
    assert metrics["cross_entropy"] == pytest.approx(float(total / weight), rel=1e-6)


def test_batches_must_divide():
    sharding = Sharding(MESHES["tp"].build(), "tp")
    check_batch(8, 2, sharding)
    with pytest.raises(UserError, match="batch_size=20 doesn't divide into 2 microbatches on 4"):
        check_batch(20, 2, sharding)
    with pytest.raises(UserError, match="try BATCH_SIZE=16"):
        check_batch(20, 2, sharding)
    with pytest.raises(UserError, match="microbatches=0 must be at least 1"):
        check_batch(8, 0, sharding)
