"""Losses: named sums that the train step divides by the whole batch's weights.

A loss gives sums over examples, never means: the step knows each term's weight over the whole batch
before the first microbatch, so that accumulation, data parallelism, packing and padding agree.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite import cross_entropy
from t5x_lite.cross_entropy import NEVER, Scores
from t5x_lite.errors import UserError
from t5x_lite.nn import loads
from t5x_lite.types import Batch, KeyArray, Output, Params

Apply = Callable[..., Output]  # apply(params, batch, dropout_keys) -> Output


@flax.struct.dataclass
class Sums:
    """What a loss returns for one microbatch.

    `terms`: name → sum over examples. `metrics`: name → (sum, weight), reported and not trained.
    `loads`: `loads.of(output.aux)`, how often each expert was picked, which moves corrections.
    """

    terms: Any
    metrics: Any
    loads: Any = flax.struct.field(default_factory=dict)


@runtime_checkable
class Loss(Protocol):
    """A training loss, Σ coefficient · sum / weight over its terms.

    It may also have `heads`, what the model's head must predict (`ModelConfig.predicts`); `reads`,
    which entries of the batch it reads; `plain`, the same without what regularises training; and
    `check_model(model)`, which raises `UserError` for one that it isn't for.
    """

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


def logits(output: Output) -> Float[Array, "B T V"]:
    """Float32 logits over the physical vocabulary; its padding is never chosen.

    All of them at once, for decoding and inspection: losses call `score` or `token_logprobs`.
    """
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
    real = jnp.arange(logits_BTV.shape[-1])[None, None, :] < head.vocab_size
    return jnp.where(real, logits_BTV, NEVER)


def score(output: Output, targets_BT: Int[Array, "B T"]) -> Scores:
    """Each target's logit and what normalises it, in chunks: see `cross_entropy.score`."""
    return cross_entropy.score(output.hidden_BTD, output.unembedding, targets_BT)


def token_logprobs(output: Output, targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """log p(target) of each position, float32, in nats."""
    scores = score(output, targets_BT)
    return scores.target - scores.log_z


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Mean negative log-likelihood of the weighted targets, in nats per token.

    `label_smoothing` ε mixes the target with the uniform distribution (Szegedy et al. 2016, §7);
    `z_loss` adds coefficient · log²Z, which keeps logits from drifting (Chowdhery et al. 2022, §5);
    both parts are then reported, `cross_entropy` and `z_loss`.
    """

    heads: ClassVar[tuple[str, ...]] = ("next", "masked", "pairs")
    reads: ClassVar[tuple[str, ...]] = ("targets", "weights")
    label_smoothing: float | int = 0.0
    z_loss: float | int = 0.0

    def __post_init__(self):
        _check_smoothing(self.label_smoothing)
        if self.z_loss < 0:
            raise UserError(f"z_loss={self.z_loss} must not be negative; 0 turns it off.")

    @property
    def plain(self) -> "CrossEntropy":
        """As in `Loss`."""
        return CrossEntropy()

    @property
    def coefficients(self) -> Mapping[str, float]:
        """One term, which the z-loss is part of: one gradient serves both."""
        return {"cross_entropy": 1.0}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The number of weighted targets, for each term."""
        return dict.fromkeys(self.coefficients, jnp.sum(batch["weights"]))

    def __call__(
        self, apply: Apply, params: Params, state: Any, batch: Batch, keys: KeyArray | None
    ) -> Sums:
        """Sums over the microbatch's targets."""
        del state
        output, weights_BT = apply(params, batch, keys), batch["weights"]
        total, scores = cross_entropy.total(
            output.hidden_BTD, output.unembedding, batch["targets"], weights_BT, self._of_each
        )
        right = (scores.target >= scores.highest).astype(jnp.float32)
        parts = {"accuracy": right}
        if self.z_loss:
            parts |= {"cross_entropy": self._likelihood(scores), "z_loss": scores.log_z**2}
        weight = jnp.sum(weights_BT)
        metrics = {name: (jnp.sum(part * weights_BT), weight) for name, part in parts.items()}
        return Sums({"cross_entropy": total}, metrics, loads.of(output.aux))

    def _of_each(self, scores: Scores, weights_BT: Array) -> Array:
        """What is summed up."""
        value_BT = self._likelihood(scores)
        if self.z_loss:
            value_BT += self.z_loss * jnp.square(scores.log_z)
        return value_BT * weights_BT

    def _likelihood(self, scores: Scores) -> Array:
        smooth = self.label_smoothing
        aim = (1 - smooth) * scores.target + smooth * scores.mean if smooth else scores.target
        return scores.log_z - aim


def _check_smoothing(label_smoothing: float | int) -> None:
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing={label_smoothing} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class _OfRows:
    """What losses of one result a row share: a term, weighted by the batch's `label_weights`."""

    term: ClassVar[str]

    @property
    def coefficients(self) -> Mapping[str, float]:
        """One term."""
        return {self.term: 1.0}

    @property
    def plain(self) -> "Loss":
        """As in `Loss`."""
        return type(self)()

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The number of rows that aren't padding."""
        return {self.term: jnp.sum(batch["label_weights"])}

    def __call__(
        self, apply: Apply, params: Params, state: Any, batch: Batch, keys: KeyArray | None
    ) -> Sums:
        """Sums over the microbatch's rows."""
        del state
        output = apply(params, batch, keys)
        losses_B, metrics = self._of_each(output, batch)
        weights_B = batch["label_weights"]
        sums = {name: (jnp.sum(v_B * weights_B), jnp.sum(weights_B)) for name, v_B in metrics}
        return Sums({self.term: jnp.sum(losses_B * weights_B)}, sums, loads.of(output.aux))

    def _of_each(
        self, output: Output, batch: Batch
    ) -> tuple[Float[Array, " B"], list[tuple[str, Float[Array, " B"]]]]:
        """Each row's loss and metrics."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Classification(_OfRows):
    """Mean negative log-likelihood of each row's label, in nats; for a SequenceClassifier's scores.

    `label_smoothing` is as in `CrossEntropy`. `accuracy` is the share of labels that score highest.
    """

    heads: ClassVar[tuple[str, ...]] = ("labels",)
    reads: ClassVar[tuple[str, ...]] = ("labels", "label_weights")
    term: ClassVar[str] = "cross_entropy"
    label_smoothing: float | int = 0.0

    def __post_init__(self):
        _check_smoothing(self.label_smoothing)

    def _of_each(self, output: Output, batch: Batch):
        scores_BC = output.aux["logits"]
        target_B, log_z_B, right_B = _choice(scores_BC, batch["labels"])
        smooth = self.label_smoothing
        aim_B = (1 - smooth) * target_B + smooth * jnp.mean(scores_BC, axis=-1)
        return log_z_B - aim_B, [("accuracy", right_B)]


@dataclasses.dataclass(frozen=True)
class Regression(_OfRows):
    """Mean squared error of each row's number; for a SequenceClassifier of 1 label.

    `absolute_error` is the mean distance.
    """

    heads: ClassVar[tuple[str, ...]] = ("labels",)
    reads: ClassVar[tuple[str, ...]] = ("labels", "label_weights")
    term: ClassVar[str] = "squared_error"

    def _of_each(self, output: Output, batch: Batch):
        error_B = output.aux["logits"][:, 0] - batch["labels"]
        return jnp.square(error_B), [("absolute_error", jnp.abs(error_B))]


@dataclasses.dataclass(frozen=True)
class SpanExtraction(_OfRows):
    """Mean negative log-likelihood of an answer's first and last token (Devlin et al. 2019, §4.2).

    The two are averaged. Padding isn't a candidate. `accuracy` is the share of rows whose first and
    last token both score highest.
    """

    heads: ClassVar[tuple[str, ...]] = ("spans",)
    reads: ClassVar[tuple[str, ...]] = ("spans", "label_weights")
    term: ClassVar[str] = "cross_entropy"

    def _of_each(self, output: Output, batch: Batch):
        losses, rights = [], []
        for place, name in enumerate(("start_logits", "end_logits")):
            scores_BT = output.aux[name]
            if "segments" in batch:
                scores_BT = jnp.where(batch["segments"] > 0, scores_BT, NEVER)
            target_B, log_z_B, right_B = _choice(scores_BT, batch["spans"][:, place])
            losses.append(log_z_B - target_B)
            rights.append(right_B)
        return (losses[0] + losses[1]) / 2, [("accuracy", rights[0] * rights[1])]


@dataclasses.dataclass(frozen=True)
class MaskedAndPairs:
    """BERT's and ALBERT's pre-training: masked tokens, and how two texts belong; added up.

    Each is a mean of its own, `cross_entropy` over the masked tokens and `pairs` over the rows
    (Devlin et al. 2019, §A.2). `accuracy` is that of the tokens, `pairs_accuracy` that of the rows.
    """

    heads: ClassVar[tuple[str, ...]] = ("pairs",)
    reads: ClassVar[tuple[str, ...]] = ("targets", "weights", "labels", "label_weights")

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Both count alike."""
        return {"cross_entropy": 1.0, "pairs": 1.0}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The number of masked tokens, and of rows that aren't padding."""
        return CrossEntropy().weights(batch) | {"pairs": jnp.sum(batch["label_weights"])}

    def __call__(
        self, apply: Apply, params: Params, state: Any, batch: Batch, keys: KeyArray | None
    ) -> Sums:
        """Sums over the microbatch's targets, and over its rows."""
        output = apply(params, batch, keys)
        words = CrossEntropy()(lambda *_: output, params, state, batch, keys)
        target_B, log_z_B, right_B = _choice(output.aux["pair_logits"], batch["labels"])
        weights_B = batch["label_weights"]
        pairs = jnp.sum((log_z_B - target_B) * weights_B)
        right = jnp.sum(right_B * weights_B), jnp.sum(weights_B)
        metrics = words.metrics | {"pairs_accuracy": right}
        return words.replace(terms=words.terms | {"pairs": pairs}, metrics=metrics)


def _choice(scores_BC: Float[Array, "B C"], labels_B: Int[Array, " B"]) -> tuple[Array, ...]:
    """Of each row the label's score, the log of the sum of exponentials, 1 if none is higher."""
    numbers_1C = jnp.arange(scores_BC.shape[-1], dtype=jnp.int32)[None, :]
    target_B = jnp.sum(jnp.where(numbers_1C == labels_B[:, None], scores_BC, 0.0), axis=-1)
    right_B = (target_B >= jnp.max(scores_BC, axis=-1)).astype(jnp.float32)
    return target_B, jax.nn.logsumexp(scores_BC, axis=-1), right_B
