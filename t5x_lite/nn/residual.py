"""How a sublayer is joined to the residual stream."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from t5x_lite.nn import layers
from t5x_lite.types import KeyArray

Sublayer = Callable[[Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class PreNorm:
    """x + sublayer(norm(x)): T5, GPT-2, Llama."""

    norm: layers.NormConfig
    dropout: float | int = 0.0

    def __post_init__(self):
        layers.require_rate("dropout", self.dropout)

    def connect(
        self, x: Array, sublayer: Sublayer, keys: KeyArray | None, common: layers.Common, name: str
    ) -> tuple[Array, Any]:
        """Called inside a block's `compact` method, whose parameters the norm joins."""
        y, extra = sublayer(self.norm.build(common, f"{name}_norm")(x))
        return x + layers.dropout(y, self.dropout, keys), extra


@dataclasses.dataclass(frozen=True)
class PostNorm:
    """norm(x + sublayer(x)): the original transformer, BERT."""

    norm: layers.NormConfig
    dropout: float | int = 0.0

    def __post_init__(self):
        layers.require_rate("dropout", self.dropout)

    def connect(
        self, x: Array, sublayer: Sublayer, keys: KeyArray | None, common: layers.Common, name: str
    ) -> tuple[Array, Any]:
        """Called inside a block's `compact` method, whose parameters the norm joins."""
        y, extra = sublayer(x)
        x = x + layers.dropout(y, self.dropout, keys)
        return self.norm.build(common, f"{name}_norm")(x), extra


@dataclasses.dataclass(frozen=True)
class SandwichNorm:
    """x + out_norm(sublayer(norm(x))): Gemma 2 and 3."""

    norm: layers.NormConfig
    dropout: float | int = 0.0

    def __post_init__(self):
        layers.require_rate("dropout", self.dropout)

    def connect(
        self, x: Array, sublayer: Sublayer, keys: KeyArray | None, common: layers.Common, name: str
    ) -> tuple[Array, Any]:
        """Called inside a block's `compact` method, whose parameters the norms join."""
        y, extra = sublayer(self.norm.build(common, f"{name}_norm")(x))
        y = self.norm.build(common, f"{name}_out_norm")(y)
        return x + layers.dropout(y, self.dropout, keys), extra


ResidualConfig = PreNorm | PostNorm | SandwichNorm
