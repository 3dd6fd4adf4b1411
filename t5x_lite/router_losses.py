"""Loss terms of models with experts: they keep routers balanced and their logits small."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from t5x_lite.errors import UserError
from t5x_lite.losses import Apply, CrossEntropy, Loss, Sums
from t5x_lite.nn import loads
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.moe import MoEConfig
from t5x_lite.types import Batch, KeyArray, Params


@dataclasses.dataclass(frozen=True)
class Routed:
    """`loss` and what it costs to route badly; terms whose coefficient is 0 are left out.

    An encoder with experts has terms of its own, `encoder_load_balance` and so on, with the same
    coefficients. Padding counts nowhere.

    Attributes:
        loss: any loss.
        load_balance: of `loads.load_balance` (Fedus et al. 2021, §2.2, who take 0.01; Mixtral
            0.02). No sum over rows: it is computed in each microbatch, over all of its devices, and
            averaged by their tokens, so that MICROBATCHES changes it. Several microbatches ask for
            more: that each be balanced, not just the batch.
        row_balance: of `loads.row_balance`, the same of each row by itself, averaged by rows'
            tokens; whatever the microbatches. DeepSeek-V3, beside its corrections, takes 1e-4 /
            top_k (§2.1.2 and §4.2).
        z_loss: of the mean log²Z of a router's logits (Zoph et al. 2022, §3.1, who take 0.001);
            whatever the microbatches.
    """

    loss: Loss = dataclasses.field(default_factory=CrossEntropy)
    load_balance: float | int = 0.01
    row_balance: float | int = 0.0
    z_loss: float | int = 0.001

    def __post_init__(self):
        for name in ("load_balance", "row_balance", "z_loss"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{name}={getattr(self, name)} must not be negative; 0 turns it off."
                )

    @property
    def heads(self) -> tuple[str, ...]:
        """As in `Loss`."""
        return self.loss.heads

    @property
    def reads(self) -> tuple[str, ...]:
        """As in `Loss`."""
        return self.loss.reads

    @property
    def plain(self) -> Loss:
        """As in `Loss`: without any router's terms."""
        return getattr(self.loss, "plain", self.loss)

    @property
    def coefficients(self) -> Mapping[str, float]:
        """The loss's own and, of every stack that may have experts, the routers'."""
        routers = {
            f"{prefix}{name}": float(coefficient)
            for prefix in ("", "encoder_")
            for name, coefficient in self._coefficients.items()
        }
        return {**self.loss.coefficients, **routers}

    @property
    def _coefficients(self) -> dict[str, float | int]:
        values = {
            "load_balance": self.load_balance,
            "row_balance": self.row_balance,
            "router_z_loss": self.z_loss,
        }
        return {name: value for name, value in values.items() if value}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Of routers' terms the number of tokens, of each stack that the batch is for."""
        routers = {
            f"{prefix}{name}": _tokens(batch, prefix)
            for prefix in ("", "encoder_")
            if _first(batch, prefix) is not None
            for name in self._coefficients
        }
        return {**self.loss.weights(batch), **routers}

    def __call__(
        self, apply: Apply, params: Params, state: Any, batch: Batch, keys: KeyArray | None
    ) -> Sums:
        """Sums over the microbatch, as `loss` has them, and the routers'."""
        output = apply(params, batch, keys)
        sums = self.loss(lambda *_: output, params, state, batch, keys)
        terms = {
            f"{prefix}{name}": _TERMS[name](aux)
            for prefix, aux in loads.stacks(output.aux)
            for name in self._coefficients
        }
        return sums.replace(terms={**sums.terms, **terms})

    def check_model(self, model: ModelConfig) -> None:
        """Raises `UserError` for a model without experts."""
        stacks = filter(None, (model.encoder, model.decoder))
        if not any(isinstance(b.ffn, MoEConfig) for stack in stacks for b in stack.blocks):
            raise UserError(
                "loss Routed is for models with experts, and this one has none; bind LOSS to "
                f"@losses.{type(self.loss).__name__}()."
            )


def _tokens(batch: Batch, prefix: str) -> Array:
    """How many tokens of a batch aren't padding."""
    segments_BT = batch.get(f"{prefix}segments")
    if segments_BT is None:
        rows, length = _first(batch, prefix).shape[:2]
        return jnp.asarray(rows * length, jnp.float32)
    return jnp.sum((segments_BT > 0).astype(jnp.float32))


def _first(batch: Batch, prefix: str) -> Array | None:
    """A stack's input, if the batch has one."""
    return batch.get(f"{prefix}tokens", batch.get(f"{prefix}features"))


# Each is a sum over tokens: the mean of a microbatch, or of a row, times its tokens.
_TERMS: Mapping[str, Callable[[loads.Aux], Array]] = {
    "load_balance": lambda aux: loads.load_balance(aux) * jnp.sum(loads.tokens(aux)),
    "row_balance": lambda aux: jnp.sum(loads.row_balance(aux) * loads.tokens(aux)),
    "router_z_loss": lambda aux: jnp.sum(loads.router_z(aux)),
}
