"""What turns a batch's tokens, or features, into vectors."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.lookup import lookup


@dataclasses.dataclass(frozen=True)
class TokenEmbedder:
    """A row of a table for each token, plus one for its type where there are several (BERT)."""

    standard_deviation: float | int = 0.02
    scale: float | int = 1.0
    types: int = 0
    width: int | None = None  # of the tables; None: the model's. Else the stack projects (ALBERT)

    def __post_init__(self):
        if self.width is not None and self.width < 1:
            raise UserError(f"width={self.width} must be at least 1; None is the model's.")

    def build(self, vocab: int, width: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return TokenEmbedding(self, vocab, self.width or width, common, name=name)


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
        x_BTD = _rows(self.table_VD, tokens_BT, "vocab", self.common) * self.config.scale
        if self.config.types:
            types = inputs.get("token_types")
            types_BT = jnp.zeros_like(tokens_BT) if types is None else types
            x_BTD = x_BTD + _rows(self.types, types_BT, "token_types", self.common)
        return x_BTD


@dataclasses.dataclass(frozen=True)
class TrigramEmbedder:
    """A linear map of a token's and both its neighbours' rows of a narrow table.

    Plus one vector for the token's type (MobileBERT: Sun et al. 2020, §3.1). A neighbour in
    another document, or in padding, counts as zero, as one beyond the row's end does.
    """

    width: int  # of the table
    types: int = 0
    standard_deviation: float | int = 0.02

    def __post_init__(self):
        if self.width < 1:
            raise UserError(f"width={self.width} must be at least 1.")

    def build(self, vocab: int, width: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _TrigramEmbedding(self, vocab, width, common, name=name)


class _TrigramEmbedding(nn.Module):
    """The head reads its table too."""

    config: TrigramEmbedder
    vocab: int
    width: int
    common: layers.Common

    def setup(self):
        """Declares the tables here, because the head reads one of them too."""
        c = self.config
        init = layers.truncated_normal(c.standard_deviation)
        shape = (self.vocab, c.width)
        self.table_VD = layers.param(self, "embedding", init, ("vocab", "embed"), shape)
        self.projection = layers.Linear((self.width,), ("features",), ("embed",), True, self.common)
        if c.types:
            shape, names = (c.types, self.width), ("token_types", "embed")
            self.types = layers.param(self, "token_types", init, names, shape)

    def __call__(self, inputs: Mapping[str, Array]) -> Float[Array, "B T D"]:
        """Embeds `tokens` and, where there are types, `token_types` (default: type 0)."""
        tokens_BT: Int[Array, "B T"] = inputs["tokens"]
        rows_BTd = _rows(self.table_VD, tokens_BT, "vocab", self.common)
        segments_BT = inputs.get("segments", jnp.ones_like(tokens_BT))
        trigram_BTd = [
            _neighbour(rows_BTd, segments_BT, 1), rows_BTd, _neighbour(rows_BTd, segments_BT, -1)
        ]  # fmt: skip
        x_BTD = self.projection(jnp.concatenate(trigram_BTd, axis=-1))
        if self.config.types:
            types_BT = inputs.get("token_types", jnp.zeros_like(tokens_BT))
            x_BTD = x_BTD + _rows(self.types, types_BT, "token_types", self.common)
        return x_BTD


def _rows(table_VD: Array, ids_BT: Array, axis: str, common: layers.Common) -> Array:
    return lookup(table_VD, ids_BT, (axis, "embed"), common.sharding, common.dtype)


def _neighbour(rows_BTd: Array, segments_BT: Array, step: int) -> Array:
    """The row `step` places on, zero beyond the ends of a document."""
    slots = jnp.arange(rows_BTd.shape[1]) + step
    inside = (slots >= 0) & (slots < rows_BTd.shape[1])
    same_BT = (jnp.roll(segments_BT, -step, axis=1) == segments_BT) & inside[None]
    return jnp.where(same_BT[:, :, None], jnp.roll(rows_BTd, -step, axis=1), 0)


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


@dataclasses.dataclass(frozen=True)
class InputProjection:
    """A linear map of what a stack takes in to the model's width (ALBERT: Lan et al. 2020, §3.1).

    The tables of a narrower embedding, its norm and its dropout come before it.
    """

    bias: bool = True

    def build(self, width: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return layers.Linear((width,), ("features",), ("embed",), self.bias, common, name=name)


Embedder = TokenEmbedder | TrigramEmbedder | FeatureEmbedder
