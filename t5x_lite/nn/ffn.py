"""The feed-forward half of a block."""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float, Int

from t5x_lite.nn import layers
from t5x_lite.partitioning import constrain
from t5x_lite.types import KeyArray


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """activation(x · up) · down; gated: activation(x · gate) * (x · up) · down (Shazeer 2020)."""

    hidden: int
    activation: str
    gated: bool = False
    bias: bool = False
    dropout: float | int = 0.0  # on the hidden units, as T5 does

    def __post_init__(self):
        layers.require_activation(self.activation)
        layers.require_rate("dropout", self.dropout)

    def build(self, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _MLP(self, common, name=name)


class _MLP(nn.Module):
    config: MLPConfig
    common: layers.Common

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        keys: KeyArray | None,
        segments_BT: Int[Array, "_ T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns the result and named auxiliaries (none here; a router has some)."""
        del segments_BT  # a router's statistics leave out padding
        c = self.config
        activation = layers.ACTIVATIONS[c.activation]
        up_BTF = self._linear("up", c.hidden, "embed", "mlp", x_BTD)
        if c.gated:
            hidden_BTF = activation(self._linear("gate", c.hidden, "embed", "mlp", x_BTD)) * up_BTF
        else:
            hidden_BTF = activation(up_BTF)
        hidden_BTF = layers.dropout(hidden_BTF, c.dropout, layers.fold_in(keys, 0))
        hidden_BTF = constrain(hidden_BTF, ("batch", "length", "act_mlp"), self.common.sharding)
        return self._linear("down", x_BTD.shape[-1], "mlp", "embed", hidden_BTF), {}

    def _linear(self, name: str, features: int, in_axis: str, out_axis: str, x: Array) -> Array:
        gain = self.common.residual_gain if name == "down" else 1.0
        return layers.Linear(
            (features,), (in_axis,), (out_axis,), self.config.bias, self.common, gain, name=name
        )(x)
