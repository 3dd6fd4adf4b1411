"""A layer that works at a smaller width than the residual stream (MobileBERT)."""

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.attention import AttentionConfig, LayerInputs
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.remat import LAYER_INPUT, checkpoint_name
from t5x_lite.nn.residual import ResidualConfig
from t5x_lite.partitioning import constrain


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Down to `width`, attention, several FFNs, and up again (Sun et al. 2020, §3.1 and §3.2).

    Queries and keys come from a bottleneck of their own, values from the residual stream itself,
    and what attention is added to from a second bottleneck.
    """

    attention: AttentionConfig
    ffn: MLPConfig
    width: int
    norm: layers.NormConfig  # of both bottlenecks
    inner: ResidualConfig  # around attention and each FFN, at the bottleneck's width
    residual: ResidualConfig  # around the whole layer
    ffns: int = 4

    def __post_init__(self):
        if min(self.width, self.ffns) < 1:
            raise UserError(f"width={self.width} and ffns={self.ffns} must be at least 1.")

    @property
    def cross_attention(self) -> None:
        """Encoders only."""
        return None

    def module(self) -> type[nn.Module]:
        """The class of the module that does it; takes (config, common)."""
        return Bottleneck

    def init_cache(self, batch: int, slots: int, memory_slots: int | None, dtype: str):
        """The layer's empty cache."""
        del memory_slots
        return {"attention": self.attention.init_cache(batch, slots, dtype)}


class Bottleneck(nn.Module):
    """One layer; its dropout keys are folded with the layer and each sublayer's number."""

    config: BottleneckConfig
    common: layers.Common

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], cache: Any, layer: Array | int, inputs: LayerInputs
    ) -> tuple[Float[Array, "B T D"], tuple[Any, dict[str, Array]]]:
        """Returns the residual stream, and (the layer's cache, its auxiliaries)."""
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        c, keys = self.config, layers.fold_in(inputs.dropout_keys, layer)
        own = None if cache is None else cache["attention"]
        y_BTD, own = self._attend(x_BTD, own, inputs, keys)
        for number in range(c.ffns):
            ffn, site = c.ffn.build(self.common, f"ffn_{number}"), 2 * number + 2
            y_BTD, _ = c.inner.connect(
                y_BTD,
                lambda y, f=ffn, s=site: f(y, layers.fold_in(keys, s), inputs.segments_BT),
                layers.fold_in(keys, site + 1), self.common, f"ffn_{number}",
            )  # fmt: skip
        up = layers.Linear(
            (x_BTD.shape[-1],), ("bottleneck",), ("embed",), True, self.common,
            self.common.residual_gain, name="out",
        )  # fmt: skip
        x_BTD, _ = c.residual.connect(
            x_BTD, lambda _: (up(y_BTD), None), layers.fold_in(keys, 2 * c.ffns + 2), self.common,
            "out",
        )  # fmt: skip
        x_BTD = constrain(x_BTD, ("batch", "length", "act_embed"), self.common.sharding)
        aux = {"layer_outputs_BTD": x_BTD} if inputs.capture else {}
        return x_BTD, (None if cache is None else {"attention": own}, aux)

    def _attend(self, x_BTD: Array, cache: Any, inputs: LayerInputs, keys):
        c = self.config
        looks_BTD = self._down(x_BTD, "attention_input")
        attention = c.attention.build(self.common, "attention")
        site = layers.fold_in(keys, 1)
        return c.inner.connect(
            self._down(x_BTD, "input"),
            lambda _: attention(looks_BTD, cache, inputs, site, x_BTD),
            layers.fold_in(keys, 0), self.common, "attention",
        )  # fmt: skip

    def _down(self, x_BTD: Array, name: str) -> Array:
        linear = layers.Linear(
            (self.config.width,), ("embed",), ("bottleneck",), True, self.common, name=name
        )
        return self.config.norm.build(self.common, f"{name}_norm")(linear(x_BTD))
