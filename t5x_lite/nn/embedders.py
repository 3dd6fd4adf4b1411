"""What turns a batch's tokens, or features, into vectors."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.nn import layers


@dataclasses.dataclass(frozen=True)
class TokenEmbedder:
    """A row of a table for each token, plus one for its type where there are several (BERT)."""

    standard_deviation: float | int = 0.02
    scale: float | int = 1.0
    types: int = 0

    def build(self, vocab: int, width: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return TokenEmbedding(self, vocab, width, common, name=name)


class TokenEmbedding(nn.Module):
    """The table that a tied head shares."""

    config: TokenEmbedder
    vocab: int
    width: int
    common: layers.Common

    def setup(self):
        """Declares the tables here, because the head reads one of them too."""
        init = layers.truncated_normal(self.config.standard_deviation)
        self.table_VD = layers.param(
            self, "embedding", init, ("vocab", "embed"), (self.vocab, self.width)
        )
        if self.config.types:
            shape, names = (self.config.types, self.width), ("token_types", "embed")
            self.types = layers.param(self, "token_types", init, names, shape)

    def __call__(self, inputs: Mapping[str, Array]) -> Float[Array, "B T D"]:
        """Embeds `tokens` and, where there are types, `token_types` (default: type 0)."""
        tokens_BT: Int[Array, "B T"] = inputs["tokens"]
        x_BTD = self.table_VD[tokens_BT].astype(self.common.dtype) * self.config.scale
        if self.config.types:
            types = inputs.get("token_types")
            types_BT = jnp.zeros_like(tokens_BT) if types is None else types
            x_BTD = x_BTD + self.types[types_BT].astype(self.common.dtype)
        return x_BTD


@dataclasses.dataclass(frozen=True)
class FeatureEmbedder:
    """A linear map of the batch's float `features` [B, T, size]: sound, images."""

    size: int

    def build(self, vocab: int, width: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        del vocab
        return _FeatureEmbedding(self, width, common, name=name)


class _FeatureEmbedding(nn.Module):
    config: FeatureEmbedder
    width: int
    common: layers.Common

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array]) -> Float[Array, "B T D"]:
        linear = layers.Linear((self.width,), ("features",), ("embed",), True, self.common)
        return linear(inputs["features"])


Embedder = TokenEmbedder | FeatureEmbedder
