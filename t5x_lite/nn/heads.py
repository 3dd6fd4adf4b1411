"""What stands on top of the last layer."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.nn import layers
from t5x_lite.types import Output, Unembedding


@dataclasses.dataclass(frozen=True)
class LMHead:
    """hidden · scale · kernelᵀ; a tied head's kernel is the token embedding."""

    tied: bool
    scale: float | int = 1.0
    bias: bool = False

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _LMHead(self, vocab_size, physical, common, name=name)


class _LMHead(nn.Module):
    config: LMHead
    vocab_size: int
    physical: int
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], table_VD: Array) -> Output:
        """The unembedding is left to the loss, which need not store the logits."""
        if not self.config.tied:
            init = layers.truncated_normal(self.common.init.stddev(x_BTD.shape[-1]))
            shape = (self.physical, x_BTD.shape[-1])
            table_VD = layers.param(self, "kernel", init, ("vocab", "embed"), shape)
        bias = None
        if self.config.bias:
            bias = layers.param(self, "bias", nn.initializers.zeros, ("vocab",), (self.physical,))
        unembedding = Unembedding(table_VD.astype(self.common.dtype), bias, self.vocab_size)
        return Output(x_BTD * self.config.scale, unembedding)


@dataclasses.dataclass(frozen=True)
class MaskedLMHead:
    """BERT's: a linear map, activation and norm, then the token embedding with a bias."""

    activation: str
    norm: layers.NormConfig

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
    def __call__(self, x_BTD: Float[Array, "B T D"], table_VD: Array) -> Output:
        c, width = self.config, x_BTD.shape[-1]
        transform = layers.Linear(
            (width,), ("embed",), ("norm",), True, self.common, name="transform"
        )
        x_BTD = layers.ACTIVATIONS[c.activation](transform(x_BTD))
        x_BTD = c.norm.build(self.common, "norm")(x_BTD)
        bias = layers.param(self, "bias", nn.initializers.zeros, ("vocab",), (self.physical,))
        unembedding = Unembedding(table_VD.astype(self.common.dtype), bias, self.vocab_size)
        return Output(x_BTD, unembedding)


@dataclasses.dataclass(frozen=True)
class Pooler:
    """BERT's encoder by itself: tanh of a linear map of the first token, in `aux["pooled"]`."""

    activation: str = "tanh"

    def __post_init__(self):
        layers.require_activation(self.activation)

    def build(self, vocab_size: int, physical: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab_size, physical
        return _Pooler(self, common, name=name)


class _Pooler(nn.Module):
    config: Pooler
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], table_VD: Array) -> Output:
        del table_VD
        first_BD = x_BTD[:, 0]
        dense = layers.Linear(
            (x_BTD.shape[-1],), ("embed",), ("norm",), True, self.common, name="pooler"
        )
        pooled_BD = layers.ACTIVATIONS[self.config.activation](dense(first_BD))
        return Output(x_BTD, aux={"pooled": pooled_BD.astype(jnp.float32)})


HeadConfig = LMHead | MaskedLMHead | Pooler
