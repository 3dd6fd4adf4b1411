"""Losses: named sums that the train step divides by the whole batch's weights.

A loss gives sums over examples, never means: the step knows each term's weight over the whole batch
before the first microbatch, so that accumulation, data parallelism, packing and padding agree.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.types import Batch, KeyArray, Output, Params

Apply = Callable[..., Output]  # apply(params, batch, dropout_keys) -> Output
_NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)


@flax.struct.dataclass
class Sums:
    """What a loss returns for one microbatch.

    `terms`: name → sum over examples. `metrics`: name → (sum, weight), reported and not trained.
    """

    terms: Any
    metrics: Any


@runtime_checkable
class Loss(Protocol):
    """A training loss, Σ coefficient · sum / weight over its terms."""

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Each term's coefficient."""

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Each term's weight over a whole batch; a scalar."""

    def __call__(
        self, apply: Apply, params: Params, state: Any, batch: Batch, keys: KeyArray | None
    ) -> Sums:
        """Sums over a microbatch.

        Args:
            apply: the model, `apply(params, batch, dropout_keys)`.
            params: what to differentiate with respect to.
            state: the train state, for `frozen` and `buffers`; its own params are not to be read.
            batch: a microbatch.
            keys: one dropout key a row, or None.
        """


@flax.struct.dataclass
class Scores:
    """What the softmax over the vocabulary says of each target; float32 [B, T]."""

    target: Any  # its logit
    log_z: Any  # log of the sum of exponentials
    highest: Any  # the largest logit
    mean: Any  # the mean logit


def logits(output: Output) -> Float[Array, "B T V"]:
    """Float32 logits over the physical vocabulary; its padding is never chosen."""
    head = output.unembedding
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", output.hidden_BTD, head.kernel_VD, preferred_element_type=jnp.float32
    )
    if head.bias_V is not None:
        logits_BTV += head.bias_V[None, None, :]
    if head.soft_cap is not None:
        logits_BTV = head.soft_cap * jnp.tanh(logits_BTV / head.soft_cap)
    if head.vocab_size == head.kernel_VD.shape[0]:
        return logits_BTV
    real = _vocabulary(logits_BTV) < head.vocab_size
    return jnp.where(real, logits_BTV, _NEVER)


def _vocabulary(logits_BTV: Array) -> Int[Array, "1 1 V"]:
    return jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32)[None, None, :]


def score(output: Output, targets_BT: Int[Array, "B T"]) -> Scores:
    """Each target's logit and what normalises it."""
    logits_BTV = logits(output)
    # Compared with every id instead of gathered: this keeps a vocabulary sharded over devices so.
    chosen = _vocabulary(logits_BTV) == targets_BT[:, :, None]
    size = output.unembedding.vocab_size
    return Scores(
        target=jnp.sum(jnp.where(chosen, logits_BTV, 0.0), axis=-1),
        log_z=jax.nn.logsumexp(logits_BTV, axis=-1),
        highest=jnp.max(logits_BTV, axis=-1),
        mean=jnp.sum(jnp.where(logits_BTV > _NEVER, logits_BTV, 0.0), axis=-1) / size,
    )


def token_logprobs(output: Output, targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """log p(target) of each position, float32, in nats."""
    scores = score(output, targets_BT)
    return scores.target - scores.log_z


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Mean negative log-likelihood of the weighted targets, in nats per token.

    `label_smoothing` ε mixes the target with the uniform distribution (Szegedy et al. 2016, §7);
    `z_loss` adds coefficient · log²Z, which keeps logits from drifting (Chowdhery et al. 2022, §5).
    """

    label_smoothing: float | int = 0.0
    z_loss: float | int = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing} must lie in [0, 1).")
        if self.z_loss < 0:
            raise UserError(f"z_loss={self.z_loss} must not be negative; 0 turns it off.")

    @property
    def coefficients(self) -> Mapping[str, float]:
        """The z-loss term is there only where it is asked for."""
        z_loss = {"z_loss": float(self.z_loss)} if self.z_loss else {}
        return {"cross_entropy": 1.0, **z_loss}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The number of weighted targets, for each term."""
        return dict.fromkeys(self.coefficients, jnp.sum(batch["weights"]))

    def __call__(
        self, apply: Apply, params: Params, state: Any, batch: Batch, keys: KeyArray | None
    ) -> Sums:
        """Sums over the microbatch's targets."""
        del state
        weights_BT = batch["weights"]
        scores = score(apply(params, batch, keys), batch["targets"])
        smooth = self.label_smoothing
        aim = (1 - smooth) * scores.target + smooth * scores.mean if smooth else scores.target
        terms = {"cross_entropy": jnp.sum((scores.log_z - aim) * weights_BT)}
        if self.z_loss:
            terms["z_loss"] = jnp.sum(jnp.square(scores.log_z) * weights_BT)
        right = (scores.target >= scores.highest).astype(jnp.float32)
        metrics = {"accuracy": (jnp.sum(right * weights_BT), jnp.sum(weights_BT))}
        return Sums(terms, metrics)
