"""Multi-head attention: grouped heads, masks, biases, rotation and an explicit cache."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.attend import attend
from t5x_lite.nn.masks import Visibility
from t5x_lite.nn.positions import PositionsConfig, rotate
from t5x_lite.nn.remat import checkpoint_name
from t5x_lite.partitioning import constrain
from t5x_lite.types import KeyArray


@flax.struct.dataclass
class LayerInputs:
    """What all layers of a stack share in one call."""

    sees: Visibility | None = None  # None: every query sees every key
    bias: Any = ()  # terms of the logits, such as positions.BucketBias
    rotation: Any = None  # (sin, cos), each [B or 1, T, H / 2]
    positions_BT: Any = None  # of the queries; one row may serve the batch
    segments_BT: Any = None  # of the queries; None: no padding
    memory_BSD: Any = None  # what cross-attention reads
    memory_sees: Visibility | None = None
    cache_index: Any = None  # the slot of the first query
    dropout_keys: Any = None  # one key a row, [B]
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    capture: bool = flax.struct.field(pytree_node=False, default=False)  # keep layers' outputs

    def stored(self) -> "LayerInputs":
        """The same with masks and biases computed once, for layers that will ask for all of them.

        XLA doesn't move them out of a loop over layers by itself.
        """
        return self.replace(
            sees=self.sees.stored(),
            bias=tuple(part.stored(self.sees) for part in self.bias),
            memory_sees=None if self.memory_sees is None else self.memory_sees.stored(),
        )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Scaled dot-product attention (Vaswani et al. 2017, §3.2; grouped: Ainslie et al. 2023)."""

    heads: int
    head_dim: int
    kv_heads: int | None = None  # None: as many as heads
    bias: bool = False
    out_bias: bool = False
    scale: float | int | None = None  # None: head_dim^-0.5
    dropout: float | int = 0.0
    positions: PositionsConfig | None = None  # this layer's own, beside those of its stack
    window: int | None = None  # keys at a distance below it, on either side
    soft_cap: float | int | None = None  # logits become cap · tanh(logits / cap)
    qk_norm: layers.NormConfig | None = None  # of queries and keys, over the head's dimension

    def __post_init__(self):
        layers.require_rate("dropout", self.dropout)
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window} must be at least 1; None looks everywhere.")
        if min(self.heads, self.head_dim, self.keys) < 1:
            raise UserError(
                f"heads={self.heads}, kv_heads={self.keys} and head_dim={self.head_dim} must be at "
                "least 1."
            )
        if self.heads % self.keys:
            best = max(k for k in range(1, self.keys + 1) if self.heads % k == 0)
            raise UserError(
                f"heads={self.heads} must be a multiple of kv_heads={self.keys}; "
                f"try kv_heads={best}."
            )

    @property
    def keys(self) -> int:
        """K, the number of key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def logit_scale(self) -> float:
        """What query · key is multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def build(self, common: layers.Common, name: str, cross: bool = False) -> nn.Module:
        """The module that does it; `cross` reads keys and values from the encoder."""
        return Attention(self, common, cross, name=name)

    def init_cache(self, batch: int, slots: int, dtype: str) -> dict[str, Array]:
        """Keys and values of one layer, [B, S, K, H], all zero."""
        shape = (batch, slots, self.keys, self.head_dim)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


class Attention(nn.Module):
    """Self-attention over the stack's own inputs, or cross-attention over the encoder's outputs."""

    config: AttentionConfig
    common: layers.Common
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cache: Any,
        inputs: LayerInputs,
        keys: KeyArray | None,
        values_BTd: Float[Array, "B T d"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the attended values, and the layer's cache with this call's keys and values.

        `values_BTd`: what values are made of; None: `x_BTD`, of which queries and keys are made.
        """
        c = self.config
        q_BTNH = self._normed("query", self._project("query", c.heads, "heads", x_BTD))
        if self.cross:
            cache = self._memory(cache, inputs)
            k_BSKH, v_BSKH, sees, bias = cache["key"], cache["value"], inputs.memory_sees, ()
        else:
            sees, bias, rotation = self._look(inputs)
            q_BTNH = rotate(q_BTNH, rotation)
            k_BSKH = self._normed("key", self._project("key", c.keys, "kv_heads", x_BTD))
            k_BSKH = rotate(k_BSKH, rotation)
            values_BTd = x_BTD if values_BTd is None else values_BTd
            v_BSKH = self._project("value", c.keys, "kv_heads", values_BTd)
            if cache is not None:
                cache = write(cache, inputs.cache_index, key=k_BSKH, value=v_BSKH)
                k_BSKH, v_BSKH = cache["key"], cache["value"]
        out_BTNH = attend(
            q_BTNH, k_BSKH, v_BSKH, sees, bias, scale=c.logit_scale, soft_cap=c.soft_cap,
            dropout=c.dropout, dropout_keys=layers.fold_in(keys, 0), sharding=self.common.sharding,
            kernel=self.common.attention_kernel, platform=self.common.platform,
        )  # fmt: skip
        out_BTNH = constrain(
            out_BTNH, ("batch", "length", "act_heads", "head_dim"), self.common.sharding
        )
        return self._out(out_BTNH, x_BTD.shape[-1]), cache

    def _look(self, inputs: LayerInputs):
        """Sight, bias and rotation: the stack's, narrowed by a window, or by the layer's own."""
        c, bias, rotation = self.config, inputs.bias, inputs.rotation
        sees = inputs.sees if c.window is None else inputs.sees.near(c.window)
        if c.positions is not None:
            own = c.positions.build(c.heads, c.head_dim, inputs.causal, self.common, "positions")
            bias = (*bias, *own.bias())
            rotation = own.rotate(inputs.positions_BT) or rotation
        return sees, bias, rotation

    def _normed(self, name: str, x_BTNH: Array) -> Array:
        norm = self.config.qk_norm
        return x_BTNH if norm is None else norm.build(self.common, f"{name}_norm")(x_BTNH)

    def _memory(self, cache, inputs: LayerInputs):
        """The encoder's keys and values: projected where it has just run, else from the cache."""
        if inputs.memory_BSD is None:
            return cache
        memory, c = inputs.memory_BSD, self.config
        return {
            "key": self._project("key", c.keys, "kv_heads", memory),
            "value": self._project("value", c.keys, "kv_heads", memory),
        }

    def _project(self, name: str, heads: int, axis: str, x_BTD: Array) -> Array:
        c = self.config
        # T5 leaves the logits unscaled and starts with smaller queries instead: whatever the scale,
        # the logits start with the same variance.
        gain = 1.0 if name != "query" else c.head_dim**-0.5 / c.logit_scale
        projection = layers.Linear(
            (heads, c.head_dim), ("embed",), (axis, "head_dim"), c.bias, self.common, gain,
            name=name,
        )  # fmt: skip
        return checkpoint_name(projection(x_BTD), name)

    def _out(self, x_BTNH: Array, width: int) -> Array:
        return layers.Linear(
            (width,), ("heads", "head_dim"), ("embed",), self.config.out_bias, self.common,
            self.common.residual_gain, name="out",
        )(x_BTNH)  # fmt: skip


def write(cache: dict[str, Array], index: Array, **new: Array) -> dict[str, Array]:
    """Puts what this call makes of each name, [B, T, …], into slots index, index + 1, …"""
    update = jax.lax.dynamic_update_slice_in_dim
    return {name: update(cache[name], value, index, axis=1) for name, value in new.items()}
