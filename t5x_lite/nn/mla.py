"""Multi-head latent attention: keys and values are made of one short vector a token, the cache.

DeepSeek-AI 2024 (DeepSeek-V2), §2.1.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.attend import attend
from t5x_lite.nn.attention import LayerInputs, write
from t5x_lite.nn.positions import rotate
from t5x_lite.nn.remat import checkpoint_name
from t5x_lite.partitioning import constrain
from t5x_lite.types import KeyArray


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Attention whose cache holds a latent and one rotary key a token, whatever the heads.

    Attributes:
        heads: N.
        content_dim: of queries and keys, without a position.
        rotary_dim: of queries and of the key that all heads share, rotated by positions.
        value_dim: of values.
        kv_rank: R, of the latent that keys and values are made of.
        query_rank: of the latent that queries are made of; None: they are made of the input.
        norm: of the latents.
        scale: what query · key is multiplied by; None: (content_dim + rotary_dim)^-0.5.
        bias: on the way into the latents and out of the heads.
        dropout: of the probabilities.
    """

    heads: int
    content_dim: int
    rotary_dim: int
    value_dim: int
    kv_rank: int
    query_rank: int | None = None
    norm: layers.NormConfig = dataclasses.field(default_factory=layers.RMSNorm)
    scale: float | int | None = None
    bias: bool = False
    dropout: float | int = 0.0

    def __post_init__(self):
        layers.require_rate("dropout", self.dropout)
        for name in ("heads", "content_dim", "rotary_dim", "value_dim", "kv_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.query_rank is not None and self.query_rank < 1:
            raise UserError(f"query_rank={self.query_rank} must be at least 1, or None.")

    @property
    def head_dim(self) -> int:
        """Of what the stack's positions rotate."""
        return self.rotary_dim

    @property
    def logit_scale(self) -> float:
        """What query · key is multiplied by."""
        return (self.content_dim + self.rotary_dim) ** -0.5 if self.scale is None else self.scale

    def build(self, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _MLA(self, common, name=name)

    def init_cache(self, batch: int, slots: int, dtype: str) -> dict[str, Array]:
        """Latents [B, S, R] and rotary keys [B, S, r] of one layer, all zero."""
        sizes = {"latent": self.kv_rank, "rotary_key": self.rotary_dim}
        return {name: jnp.zeros((batch, slots, size), dtype) for name, size in sizes.items()}


class _MLA(nn.Module):
    config: MLAConfig
    common: layers.Common

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], cache: Any, inputs: LayerInputs, keys: KeyArray | None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the attended values, and the layer's cache with this call's latents."""
        c = self.config
        content_BTNC, q_BTNr = self._queries(x_BTD, inputs)
        latent_BSR, k_BSr = self._latents(x_BTD, inputs)
        if cache is not None:
            cache = write(cache, inputs.cache_index, latent=latent_BSR, rotary_key=k_BSr)
            latent_BSR, k_BSr = cache["latent"], cache["rotary_key"]
        shape = (c.kv_rank, c.heads, c.content_dim + c.value_dim)
        up_RNH = _Up(shape, self.common, name="up")()
        key_up, value_up = up_RNH[..., : c.content_dim], up_RNH[..., c.content_dim :]
        # §2.1.2: instead of keys and values of every slot, the few queries of a step of decoding
        # are brought to the latents. That costs more a query and slot, so not for long prompts.
        absorb = cache is not None and x_BTD.shape[1] <= c.content_dim
        if absorb:
            content_BTNC = jnp.einsum("BTNC,RNC->BTNR", content_BTNC, key_up)
            k_BSKH = jnp.concatenate([latent_BSR, k_BSr], axis=-1)[:, :, None, :]
            v_BSKH = latent_BSR[:, :, None, :]
        else:
            k_BSNC = jnp.einsum("BSR,RNC->BSNC", latent_BSR, key_up)
            shared = (*k_BSNC.shape[:3], c.rotary_dim)
            k_BSKH = jnp.concatenate([k_BSNC, jnp.broadcast_to(k_BSr[:, :, None], shared)], axis=-1)
            v_BSKH = jnp.einsum("BSR,RNh->BSNh", latent_BSR, value_up)
        q_BTNH = jnp.concatenate([content_BTNC, q_BTNr], axis=-1)
        out_BTNH = attend(
            q_BTNH, k_BSKH, v_BSKH, inputs.sees, inputs.bias, scale=c.logit_scale,
            dropout=c.dropout, dropout_keys=layers.fold_in(keys, 0), sharding=self.common.sharding,
            kernel=self.common.attention_kernel, platform=self.common.platform,
        )  # fmt: skip
        if absorb:
            out_BTNH = jnp.einsum("BTNR,RNh->BTNh", out_BTNH, value_up)
        out_BTNH = constrain(
            out_BTNH, ("batch", "length", "act_heads", "head_dim"), self.common.sharding
        )
        out = layers.Linear(
            (x_BTD.shape[-1],), ("heads", "head_dim"), ("embed",), c.bias, self.common,
            self.common.residual_gain, name="out",
        )  # fmt: skip
        return out(out_BTNH), cache

    def _queries(self, x_BTD: Array, inputs: LayerInputs) -> tuple[Array, Array]:
        """[B, T, N, content_dim], and [B, T, N, rotary_dim] rotated."""
        c, axis = self.config, "embed"
        if c.query_rank is not None:
            x_BTD, axis = self._down("query", c.query_rank, x_BTD), "latent"
            x_BTD = c.norm.build(self.common, "query_norm")(x_BTD)
        projection = layers.Linear(
            (c.heads, c.content_dim + c.rotary_dim), (axis,), ("heads", "head_dim"), False,
            self.common, name="query",
        )  # fmt: skip
        q_BTNH = checkpoint_name(projection(x_BTD), "query")
        return q_BTNH[..., : c.content_dim], rotate(q_BTNH[..., c.content_dim :], inputs.rotation)

    def _latents(self, x_BTD: Array, inputs: LayerInputs) -> tuple[Array, Array]:
        """[B, T, R], and the key [B, T, r] that all heads share, rotated."""
        c = self.config
        both = checkpoint_name(self._down("kv", c.kv_rank + c.rotary_dim, x_BTD), "latent")
        latent_BTR = c.norm.build(self.common, "kv_norm")(both[..., : c.kv_rank])
        return latent_BTR, rotate(both[:, :, None, c.kv_rank :], inputs.rotation)[:, :, 0]

    def _down(self, name: str, rank: int, x_BTD: Array) -> Array:
        return layers.Linear(
            (rank,), ("embed",), ("norm",), self.config.bias, self.common, name=f"{name}_down"
        )(x_BTD)


class _Up(nn.Module):
    """The kernel [R, N, content_dim + value_dim] from the latent to keys and values."""

    shape: tuple[int, int, int]
    common: layers.Common

    @nn.compact
    def __call__(self) -> Array:
        init = layers.truncated_normal(self.common.init.stddev(self.shape[0]))
        axes = ("latent", "heads", "head_dim")
        kernel = layers.param(self, "kernel", init, axes, self.shape, axes[:1])
        return kernel.astype(self.common.dtype)
