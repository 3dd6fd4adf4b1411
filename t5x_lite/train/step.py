"""The train step: a pure function of (state, batch, key), the same for every loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_lite.errors import UserError
from t5x_lite.losses import Apply, Loss
from t5x_lite.nn import loads
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.quantized import QuantizedTraining
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import Sharding, batch_axes, constrain
from t5x_lite.schedules import Schedule
from t5x_lite.train.corrections import Correct
from t5x_lite.train.state import TrainState
from t5x_lite.types import Batch, KeyArray, Params, PyTree

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, KeyArray], tuple[TrainState, Metrics]]


def model_apply(
    model: ModelConfig,
    sharding: Sharding | None = None,
    quantized: QuantizedTraining | None = None,
) -> Apply:
    """`apply(params, batch, dropout_keys) -> Output` of a model on a mesh."""
    module = Transformer(model, sharding, quantized)

    def apply(params: Params, batch: Batch, dropout_keys: KeyArray | None = None):
        return module.apply({"params": params}, batch, dropout_keys)

    return apply


def make_train_step(
    apply: Apply,
    loss: Loss,
    transform: optax.GradientTransformation,
    schedule: Schedule,
    microbatches: int = 1,
    ema_decay: float | int | None = None,
    sharding: Sharding | None = None,
    correct: Correct | None = None,
) -> TrainStep:
    """Puts a loss and an optimizer together; the result is pure and ready for `jax.jit`.

    `correct` is the rule that moves routers' corrections, which no optimizer does.
    """

    def train_step(state: TrainState, batch: Batch, base_rng: KeyArray):
        rng = jax.random.fold_in(base_rng, state.step)
        gradients, metrics, picks = accumulate(
            loss, apply, state, batch, rng, microbatches, sharding
        )
        updates, opt_state = transform.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = params if correct is None else correct(params, picks)
        metrics |= {
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
        }
        ema = state.ema
        if ema_decay is not None:
            ema = jax.tree.map(lambda a, p: ema_decay * a + (1 - ema_decay) * p, ema, params)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, metrics

    return train_step


def accumulate(
    loss: Loss,
    apply: Apply,
    state: TrainState,
    batch: Batch,
    rng: KeyArray | None,
    microbatches: int = 1,
    sharding: Sharding | None = None,
) -> tuple[PyTree, Metrics, loads.Loads]:
    """Gradients, metrics and experts' loads of one batch, in parts that fit into memory.

    Every term's sum is divided by its weight over the whole batch, known beforehand, so that the
    parts simply add up, whatever share of the targets each of them has.
    """
    weights = {name: _positive(weight) for name, weight in loss.weights(batch).items()}

    def objective(params: Params, part: Batch, keys: KeyArray | None):
        sums = loss(apply, params, state, part, keys)
        terms = {name: total / weights[name] for name, total in sums.terms.items()}
        value = sum(loss.coefficients[name] * term for name, term in terms.items())
        return value, (terms, sums.metrics, sums.loads)

    gradient = jax.value_and_grad(objective, has_aux=True)
    keys = _row_keys(rng, batch)
    if microbatches == 1:
        results = gradient(state.params, batch, keys)
    else:
        split = {name: _split(x, microbatches, sharding, name) for name, x in batch.items()}
        parts = (split, None if keys is None else _split(keys, microbatches))
        first = jax.eval_shape(gradient, state.params, *jax.tree.map(lambda x: x[0], parts))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(state.params, *part)), None

        results, _ = jax.lax.scan(add, zero, parts)
    (value, (terms, pairs, picks)), gradients = results
    means = {name: total / _positive(weight) for name, (total, weight) in pairs.items()}
    terms = terms if len(terms) > 1 else {}  # a loss's only term is the loss
    return gradients, {"loss": value, **terms, **means, **loads.summary(picks)}, picks


def _positive(weight: jax.Array) -> jax.Array:
    """A batch without any target has loss 0, not NaN."""
    return jnp.where(weight > 0, weight, jnp.ones_like(weight))


def _row_keys(rng: KeyArray | None, batch: Batch) -> KeyArray | None:
    """A dropout key for each row of the whole batch, so that no row's depends on its microbatch."""
    if rng is None:
        return None
    rows = jax.tree.leaves(batch)[0].shape[0]
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(rows))


def _split(
    x: jax.Array, parts: int, sharding: Sharding | None = None, name: str = "tokens"
) -> jax.Array:
    """[B, …] → [parts, B / parts, …]; part i has rows i, i + parts, …, so none changes device."""
    x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    return constrain(x, (None, *batch_axes(name, x.ndim - 1)), sharding)


def check_batch(batch_size: int, microbatches: int, sharding: Sharding) -> None:
    """Raises `UserError` where rows don't divide among microbatches and data-parallel devices."""
    if microbatches < 1:
        raise UserError(f"microbatches={microbatches} must be at least 1.")
    devices = sharding.parts("batch")
    parts = microbatches * devices
    if batch_size % parts:
        best = max(parts, batch_size // parts * parts)
        raise UserError(
            f"batch_size={batch_size} doesn't divide into {microbatches} microbatches on {devices} "
            f"data-parallel devices; try BATCH_SIZE={best} or another MICROBATCHES."
        )


def make_eval_step(apply: Apply, loss: Loss) -> Callable[[Params, Batch], dict[str, Any]]:
    """`eval_step(params, batch)`: each term's and metric's (sum, weight), without dropout.

    Sums over batches, divided once, are the mean over all targets.
    """

    def eval_step(params: Params, batch: Batch):
        sums = loss(apply, params, None, batch, None)
        weights = loss.weights(batch)
        terms = {name: (total, weights[name]) for name, total in sums.terms.items()}
        return {**terms, **sums.metrics}

    return eval_step
