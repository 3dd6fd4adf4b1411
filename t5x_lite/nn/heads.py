"""What stands on top of the last layer.

A head maps (x [B, T, D], HeadInputs) to an Output. Language-model heads leave the product with the
vocabulary to the loss; the others put float32 results into `aux` and leave `unembedding` None.
Those that give one result a row take the row for one document: padding (segment 0) changes
nothing, packed documents would be mixed.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.types import KeyArray, Output, Unembedding

POOLINGS = ("first", "last", "mean")
Segments = Int[Array, "_ T"] | None


@flax.struct.dataclass
class HeadInputs:
    """What a head may read besides the last layer's output."""

    table_VD: Array  # the token embedding
    segments_BT: Array | None = None  # 0 is padding; None: there is none
    dropout_keys: KeyArray | None = None  # one a row


@dataclasses.dataclass(frozen=True)
class LMHead:
    """hidden · scale · kernelᵀ; a tied head's kernel is the token embedding."""

    tied: bool
    scale: float | int = 1.0
    bias: bool = False
    soft_cap: float | int | None = None  # logits become cap · tanh(logits / cap) (Gemma 2, §2)

    def __post_init__(self):
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise UserError(f"soft_cap={self.soft_cap} must be positive; None caps nothing.")

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _LMHead(self, vocab_size, physical, common, name=name)


@dataclasses.dataclass(frozen=True)
class FixedBiasLMHead(LMHead):
    """With a bias that no gradient moves: a published buffer, mostly zero (BART, Marian)."""


class _LMHead(nn.Module):
    config: LMHead
    vocab_size: int
    physical: int
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        """The unembedding is left to the loss, which need not store the logits."""
        table_VD = inputs.table_VD
        if not self.config.tied:
            init = layers.truncated_normal(self.common.init.stddev(x_BTD.shape[-1]))
            shape = (self.physical, x_BTD.shape[-1])
            table_VD = layers.param(self, "kernel", init, ("vocab", "embed"), shape, ("embed",))
        bias = None
        if self.config.bias:
            bias = layers.param(self, "bias", nn.initializers.zeros, ("vocab",), (self.physical,))
        if isinstance(self.config, FixedBiasLMHead):
            init = nn.initializers.zeros
            fixed = layers.param(self, "fixed_bias", init, ("vocab",), (self.physical,))
            fixed = jax.lax.stop_gradient(fixed)
            bias = fixed if bias is None else bias + fixed
        unembedding = Unembedding(
            table_VD.astype(self.common.dtype), bias, self.vocab_size, self.config.soft_cap,
            self.common.sharding,
        )  # fmt: skip
        return Output(x_BTD * self.config.scale, unembedding)


@dataclasses.dataclass(frozen=True)
class MaskedLMHead:
    """BERT's: a linear map, activation and norm, then the token embedding with a bias."""

    activation: str
    norm: layers.NormConfig
    transform_bias: bool | None = None  # of the linear map; None: it has one

    def __post_init__(self):
        layers.require_activation(self.activation)

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _MaskedLMHead(self, vocab_size, physical, common, name=name)


class _MaskedLMHead(nn.Module):
    config: MaskedLMHead
    vocab_size: int
    physical: int
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        return self._words(x_BTD, inputs)

    def _words(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        c, kernel_VD = self.config, self._kernel(x_BTD.shape[-1], inputs.table_VD)
        bias = c.transform_bias is not False
        transform = layers.Linear(
            (kernel_VD.shape[-1],), ("embed",), ("norm",), bias, self.common, name="transform"
        )
        x_BTD = layers.ACTIVATIONS[c.activation](transform(x_BTD))
        x_BTD = c.norm.build(self.common, "norm")(x_BTD)
        bias = layers.param(self, "bias", nn.initializers.zeros, ("vocab",), (self.physical,))
        kernel_VD = kernel_VD.astype(self.common.dtype)
        sharding = self.common.sharding
        return Output(x_BTD, Unembedding(kernel_VD, bias, self.vocab_size, sharding=sharding))

    def _kernel(self, width: int, table_VD: Array) -> Array:
        """Of the unembedding, as wide as the transformed outputs must be."""
        del width
        return table_VD


@dataclasses.dataclass(frozen=True)
class ExtendedMaskedLMHead(MaskedLMHead):
    """One whose kernel is the token embedding, extended to the model's width (MobileBERT)."""

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _ExtendedMaskedLMHead(self, vocab_size, physical, common, name=name)


class _ExtendedMaskedLMHead(_MaskedLMHead):
    def _kernel(self, width: int, table_VD: Array) -> Array:
        init = layers.truncated_normal(self.common.init.stddev(width))
        shape = (self.physical, width - table_VD.shape[-1])
        extra_VD = layers.param(self, "kernel", init, ("vocab", "embed"), shape, ("embed",))
        return jnp.concatenate([table_VD, extra_VD], axis=-1)


@dataclasses.dataclass(frozen=True)
class PairedLMHead(MaskedLMHead):
    """BERT's and ALBERT's while they are pre-trained: masked words, and how two texts belong.

    Besides what a `MaskedLMHead` gives, `aux["pair_logits"]`, float32 [B, 2], from the first token
    by a dense layer with tanh: 0, the second text follows the first; 1, it doesn't (Devlin et al.
    2019, §3.1, task 2) or the two are swapped (Lan et al. 2020, §3.1).
    """

    dropout: float | int = 0.0  # of what the last product reads

    def __post_init__(self):
        super().__post_init__()
        layers.require_rate("dropout", self.dropout)

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _PairedLMHead(self, vocab_size, physical, common, name=name)


class _PairedLMHead(_MaskedLMHead):
    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        # The names of a SequenceClassifier's, which begins with this pooler when it is fine-tuned.
        pooled_BD = pool(x_BTD, inputs.segments_BT, "first")
        pooled_BD = Dense("tanh").connect(pooled_BD, self.common, None)
        pooled_BD = layers.dropout(pooled_BD, self.config.dropout, inputs.dropout_keys)
        logits_BC = _scores(pooled_BD, 2, True, self.common, "pairs")
        return self._words(x_BTD, inputs).replace(aux={"pair_logits": logits_BC})


@dataclasses.dataclass(frozen=True)
class Pooler:
    """BERT's encoder by itself: tanh of a linear map of the first token, in `aux["pooled"]`."""

    activation: str | None = "tanh"  # None: the first token as it is (MobileBERT)

    def __post_init__(self):
        if self.activation is not None:
            layers.require_activation(self.activation)

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab_size, physical
        return _Pooler(self, common, name=name)


class _Pooler(nn.Module):
    config: Pooler
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        pooled_BD = pool(x_BTD, inputs.segments_BT, "first")
        if self.config.activation is not None:
            dense = layers.Linear(
                (x_BTD.shape[-1],), ("embed",), ("norm",), True, self.common, name="pooler"
            )
            pooled_BD = layers.ACTIVATIONS[self.config.activation](dense(pooled_BD))
        return Output(x_BTD, aux={"pooled": pooled_BD.astype(jnp.float32)})


@dataclasses.dataclass(frozen=True)
class NoHead:
    """The last layer's output is the result: DistilBERT and ModernBERT by themselves."""

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab_size, physical, common
        return _NoHead(name=name)


class _NoHead(nn.Module):
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        del inputs
        return Output(x_BTD)


def pool(x_BTD: Float[Array, "B T D"], segments_BT: Segments, pooling: str) -> Array:
    """One vector a row, [B, D]: its first or last real token's, or the mean of them, in float32."""
    batch, length, _ = x_BTD.shape
    real_BT = jnp.ones((batch, length), bool) if segments_BT is None else segments_BT > 0
    if pooling == "mean":
        sum_BD = jnp.sum(jnp.where(real_BT[:, :, None], x_BTD.astype(jnp.float32), 0.0), axis=1)
        return sum_BD / jnp.maximum(jnp.sum(real_BT, axis=1, dtype=jnp.float32), 1.0)[:, None]
    slot_B = jnp.argmax(real_BT, axis=1)
    if pooling == "last":
        slot_B = length - 1 - jnp.argmax(real_BT[:, ::-1], axis=1)
    return jnp.take_along_axis(x_BTD, slot_B[:, None, None], axis=1)[:, 0]


def require_pooling(name: str) -> None:
    """Raises `UserError` for a name that `POOLINGS` lacks."""
    if name not in POOLINGS:
        raise UserError(f"unknown pooling {name!r}; there are {', '.join(POOLINGS)}.")


def require_labels(labels: int) -> None:
    """Raises `UserError` where there is nothing to choose from."""
    if labels < 1:
        raise UserError(f"labels={labels} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Dense:
    """A hidden layer below a classifier: activation(linear(x)), then a norm where there is one."""

    activation: str
    norm: layers.NormConfig | None = None
    bias: bool = True
    input_dropout: float | int = 0.0

    def __post_init__(self):
        layers.require_activation(self.activation)
        layers.require_rate("input_dropout", self.input_dropout)

    def connect(self, x: Array, common: layers.Common, keys: KeyArray | None) -> Array:
        """Called inside the head's module, which then holds `pooler` and `pooler_norm`."""
        x = layers.dropout(x, self.input_dropout, keys)
        linear = layers.Linear(
            (x.shape[-1],), ("embed",), ("norm",), self.bias, common, name="pooler"
        )
        x = layers.ACTIVATIONS[self.activation](linear(x))
        return x if self.norm is None else self.norm.build(common, "pooler_norm")(x)


def _classify(x: Array, count: int, c: "HeadConfig", common: layers.Common, keys) -> Array:
    """Float32 scores of `count` labels by a head's dense layer, dropout and last product."""
    if c.dense is not None:
        x = c.dense.connect(x, common, layers.fold_in(keys, 0))
    x = layers.dropout(x, c.dropout, layers.fold_in(keys, 1))
    return _scores(x, count, c.bias, common, "classifier")


def _scores(x: Array, count: int, bias: bool, common: layers.Common, name: str) -> Array:
    # In float32 whatever the model's dtype: the product is small, and its result is the answer.
    common = dataclasses.replace(common, dtype="float32")
    return layers.Linear((count,), ("embed",), ("labels",), bias, common, name=name)(x)


@dataclasses.dataclass(frozen=True)
class SequenceClassifier:
    """Scores of labels for each row, [B, labels], in `aux["logits"]`.

    A dense layer with tanh on the first token is BERT's (Devlin et al. 2019, §4.1), one product
    without bias on the last token is GPT's and Llama's.
    """

    labels: int = 2
    pooling: str = "first"
    dense: Dense | None = None
    dropout: float | int = 0.0  # of what the last product reads
    bias: bool = True

    def __post_init__(self):
        require_labels(self.labels)
        require_pooling(self.pooling)
        layers.require_rate("dropout", self.dropout)

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab_size, physical
        return _SequenceClassifier(self, common, name=name)


class _SequenceClassifier(nn.Module):
    config: SequenceClassifier
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        c = self.config
        pooled_BD = pool(x_BTD, inputs.segments_BT, c.pooling)
        logits_BC = _classify(pooled_BD, c.labels, c, self.common, inputs.dropout_keys)
        return Output(x_BTD, aux={"logits": logits_BC})


@dataclasses.dataclass(frozen=True)
class TokenClassifier:
    """Scores of labels for each token, [B, T, labels], in `aux["logits"]` (BERT, §5.3)."""

    labels: int = 2
    dense: Dense | None = None
    dropout: float | int = 0.0
    bias: bool = True

    def __post_init__(self):
        require_labels(self.labels)
        layers.require_rate("dropout", self.dropout)

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab_size, physical
        return _TokenClassifier(self, common, name=name)


class _TokenClassifier(nn.Module):
    config: TokenClassifier
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        c = self.config
        logits_BTC = _classify(x_BTD, c.labels, c, self.common, inputs.dropout_keys)
        return Output(x_BTD, aux={"logits": logits_BTC})


@dataclasses.dataclass(frozen=True)
class QuestionAnswering:
    """Where an answer starts and ends (Devlin et al. 2019, §4.2).

    `aux["start_logits"]` and `aux["end_logits"]`, [B, T] each; padding is scored too.
    """

    dense: Dense | None = None
    dropout: float | int = 0.0
    bias: bool = True

    def __post_init__(self):
        layers.require_rate("dropout", self.dropout)

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab_size, physical
        return _QuestionAnswering(self, common, name=name)


class _QuestionAnswering(nn.Module):
    config: QuestionAnswering
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        scores_BTC = _classify(x_BTD, 2, self.config, self.common, inputs.dropout_keys)
        aux = {"start_logits": scores_BTC[..., 0], "end_logits": scores_BTC[..., 1]}
        return Output(x_BTD, aux=aux)


@dataclasses.dataclass(frozen=True)
class SentenceEmbedding:
    """One vector a row, [B, D], in `aux["embedding"]` (Reimers and Gurevych 2019, §3)."""

    pooling: str = "mean"
    normalized: bool = False  # to length 1, so that products are cosines

    def __post_init__(self):
        require_pooling(self.pooling)

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab_size, physical, common
        return _SentenceEmbedding(self, name=name)


class _SentenceEmbedding(nn.Module):
    config: SentenceEmbedding

    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        pooled_BD = pool(x_BTD, inputs.segments_BT, self.config.pooling).astype(jnp.float32)
        if self.config.normalized:
            # The floor keeps a row of zeros, which is all padding, zeros.
            square_B1 = jnp.sum(jnp.square(pooled_BD), axis=1, keepdims=True)
            pooled_BD = pooled_BD * jax.lax.rsqrt(jnp.maximum(square_B1, 1e-24))
        return Output(x_BTD, aux={"embedding": pooled_BD})


@dataclasses.dataclass(frozen=True)
class Reward:
    """A scalar a row, [B], from its last real token, in `aux["reward"]` (Stiennon et al. 2020)."""

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab_size, physical
        return _Reward(self, common, name=name)


class _Reward(nn.Module):
    config: Reward
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], inputs: HeadInputs) -> Output:
        last_BD = pool(x_BTD, inputs.segments_BT, "last")
        reward_B1 = _scores(last_BD, 1, False, self.common, "classifier")
        return Output(x_BTD, aux={"reward": reward_B1[:, 0]})


LanguageModelHead = LMHead | FixedBiasLMHead | MaskedLMHead
HeadConfig = (
    LanguageModelHead
    | Pooler
    | NoHead
    | SequenceClassifier
    | TokenClassifier
    | QuestionAnswering
    | SentenceEmbedding
    | Reward
)
