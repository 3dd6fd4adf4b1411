"""A mixture of experts in the FFN's place: each token is sent to the few that its router picks.

Dropless: no expert has a capacity, so a token's result depends on no other token. Tokens are sorted
by expert, and one ragged product serves all experts (Gale et al. 2022, MegaBlocks).
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.partitioning import Sharding, constrain
from t5x_lite.types import KeyArray


@dataclasses.dataclass(frozen=True)
class GroupLimit:
    """Experts are picked from the `chosen` best of `groups` equal groups (DeepSeek-V2, §2.1.3).

    A group is as good as the sum of its `best` highest scores: 1 in V2, 2 in V3 (§2.1.2).
    """

    groups: int
    chosen: int
    best: int = 1

    def __post_init__(self):
        if not 1 <= self.chosen <= self.groups:
            raise UserError(f"chosen={self.chosen} must lie in 1 … groups={self.groups}.")
        if self.best < 1:
            raise UserError(f"best={self.best} must be at least 1.")

    def keep(self, scores_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Scores, with minus infinity outside the chosen groups."""
        grouped_BTge = scores_BTE.reshape(*scores_BTE.shape[:2], self.groups, -1)
        good_BTg = jnp.sum(jax.lax.top_k(grouped_BTge, self.best)[0], axis=-1)
        chosen = jax.lax.top_k(good_BTg, self.chosen)[1]
        kept_BTg = jnp.any(jax.nn.one_hot(chosen, self.groups, dtype=bool), axis=-2)
        return jnp.where(kept_BTg[..., None], grouped_BTge, -jnp.inf).reshape(scores_BTE.shape)


@dataclasses.dataclass(frozen=True)
class SoftmaxRouter:
    """The `top_k` most probable experts, weighted by their probability · `scale`.

    Normalized, the chosen probabilities sum to one before the scale (Mixtral: Jiang et al. 2024,
    §2.1, where this is the softmax over the chosen logits); else they stay as they are
    (DeepSeek-V2).
    """

    top_k: int
    normalized: bool = True
    scale: float | int = 1.0
    groups: GroupLimit | None = None

    def build(self, experts: int, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _Router(self, experts, common, name=name)

    def scores(self, logits_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Probabilities over all experts."""
        return jax.nn.softmax(logits_BTE, axis=-1)


@dataclasses.dataclass(frozen=True)
class SigmoidRouter(SoftmaxRouter):
    """Each expert's score by itself; a correction moves the choice, not the weights.

    DeepSeek-V3 (§2.1.2, auxiliary-loss-free load balancing). The correction takes no gradient: a
    rule moves it by the experts' load.
    """

    def scores(self, logits_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Sigmoids, which sum to anything."""
        return jax.nn.sigmoid(logits_BTE)


RouterConfig = SoftmaxRouter | SigmoidRouter


class _Router(nn.Module):
    config: RouterConfig
    experts: int
    common: layers.Common

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"]
    ) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"], Float[Array, "B T E"], Array]:
        """Returns the chosen experts, their weights, all scores and the logits; all in float32.

        Rounding decides between experts, so that bfloat16 would send tokens elsewhere (Fedus et
        al. 2021, §2.4).
        """
        c, width = self.config, x_BTD.shape[-1]
        init = layers.truncated_normal(self.common.init.stddev(width))
        kernel = layers.param(self, "kernel", init, ("embed", "router"), (width, self.experts))
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE", x_BTD.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST
        )
        scores_BTE = ranked_BTE = c.scores(logits_BTE)
        if isinstance(c, SigmoidRouter):
            zeros = nn.initializers.zeros
            correction = layers.param(self, "correction", zeros, ("router",), (self.experts,))
            ranked_BTE = scores_BTE + jax.lax.stop_gradient(correction)[None, None, :]
        ranked_BTE = ranked_BTE if c.groups is None else c.groups.keep(ranked_BTE)
        chosen_BTK = jax.lax.top_k(jax.lax.stop_gradient(ranked_BTE), c.top_k)[1]
        weights_BTK = jnp.take_along_axis(scores_BTE, chosen_BTK, axis=-1)
        if c.normalized:  # the tiny number: sigmoids may all be zero
            weights_BTK = weights_BTK / (jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20)
        return chosen_BTK, weights_BTK * c.scale, scores_BTE, logits_BTE


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """`experts` MLPs of which each token passes the few that `router` picks, and `shared` besides.

    Attributes:
        experts: E, how many there are.
        expert: each of them.
        router: picks and weighs them.
        shared: an MLP that every token passes (DeepSeekMoE: Dai et al. 2024, §3.2).
    """

    experts: int
    expert: MLPConfig
    router: RouterConfig
    shared: MLPConfig | None = None

    def __post_init__(self):
        picked, groups = self.router.top_k, self.router.groups
        if not 1 <= picked <= self.experts:
            raise UserError(f"top_k={picked} must lie in 1 … experts={self.experts}.")
        if self.expert.bias or self.expert.dropout:
            raise UserError("experts have neither bias nor dropout of their own; leave both out.")
        if groups is None:
            return
        if self.experts % groups.groups:
            raise UserError(
                f"experts={self.experts} don't divide into groups={groups.groups} of equal size."
            )
        size = self.experts // groups.groups
        if picked > groups.chosen * size or groups.best > size:
            raise UserError(
                f"{groups.chosen} groups of {size} experts have too few for top_k={picked} or "
                f"best={groups.best}; choose more groups."
            )

    def build(self, common: layers.Common, name: str) -> nn.Module:
        """The module that does it."""
        return _MoE(self, common, name=name)


class _MoE(nn.Module):
    config: MoEConfig
    common: layers.Common

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        keys: KeyArray | None,
        segments_BT: Int[Array, "_ T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Returns the result, and what a router's losses need of each row: see `statistics`."""
        c = self.config
        router = c.router.build(c.experts, self.common, "router")
        chosen_BTK, weights_BTK, scores_BTE, logits_BTE = router(x_BTD)
        run = _Experts(c.experts, c.expert, self.common, name="experts")
        out_BTD = run(x_BTD, chosen_BTK, weights_BTK)
        out_BTD = constrain(out_BTD, ("batch", "length", "act_embed"), self.common.sharding)
        if c.shared is not None:
            shared_BTD, _ = c.shared.build(self.common, "shared")(x_BTD, keys)
            out_BTD = out_BTD + shared_BTD
        return out_BTD, statistics(chosen_BTK, scores_BTE, logits_BTE, segments_BT)


class _Experts(nn.Module):
    count: int
    config: MLPConfig
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD: Array, chosen_BTK: Array, weights_BTK: Array) -> Array:
        c, width, dtype = self.config, x_BTD.shape[-1], self.common.dtype
        names = ("up", "gate", "down") if c.gated else ("up", "down")
        kernels = {name: self._kernels(name, width, c.hidden).astype(dtype) for name in names}
        return experts(
            x_BTD.astype(dtype), chosen_BTK, weights_BTK, kernels, c.activation,
            self.common.sharding,
        )  # fmt: skip

    def _kernels(self, name: str, width: int, hidden: int) -> Array:
        sizes, axes, gain = (width, hidden), ("embed", "mlp"), 1.0
        if name == "down":
            sizes, axes, gain = (hidden, width), ("mlp", "embed"), self.common.residual_gain
        init = layers.truncated_normal(gain * self.common.init.stddev(sizes[0]))
        return _Kernels(init, ("expert", *axes), (self.count, *sizes), name=name)()


class _Kernels(nn.Module):
    """All experts' kernels of one product, [E, inputs, outputs]."""

    initial: nn.initializers.Initializer
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        return layers.param(self, "kernel", self.initial, self.axes, self.shape)


def experts(
    x_BTD: Float[Array, "B T D"],
    chosen_BTK: Int[Array, "B T K"],
    weights_BTK: Float[Array, "B T K"],
    kernels: Mapping[str, Array],
    activation: str,
    sharding: Sharding | None = None,
) -> Float[Array, "B T D"]:
    """Σ over a token's experts of weight · expert(x).

    Args:
        x_BTD: the tokens.
        chosen_BTK: each token's experts.
        weights_BTK: their weights.
        kernels: "up" [E, D, F], "down" [E, F, D] and, of gated experts, "gate" [E, D, F].
        activation: of the gate, or of `up` where there is none.
        sharding: each data-parallel device sorts its own rows alone.
    """
    rows = _rows_of(activation)
    if sharding is None or sharding.mesh.size == 1:
        return rows(x_BTD, chosen_BTK, weights_BTK, dict(kernels))
    # Left to the compiler, one sort over the whole batch would bring every token to every device.
    spec = sharding.spec(("batch", None, None), x_BTD.shape)
    data = PartitionSpec(spec[0])
    names = {spec[0]} if isinstance(spec[0], str) else set(spec[0])
    split = jax.shard_map(
        rows, mesh=sharding.mesh, in_specs=(data, data, data, PartitionSpec()), out_specs=data,
        axis_names=names,
    )  # fmt: skip
    return split(x_BTD, chosen_BTK, weights_BTK, dict(kernels))


def _rows_of(activation: str):
    act = layers.ACTIVATIONS[activation]

    def rows(x_BTD, chosen_BTK, weights_BTK, kernels):
        width, picked = x_BTD.shape[-1], chosen_BTK.shape[-1]
        flat_M = chosen_BTK.reshape(-1)  # M = B · T · K
        order_M = jnp.argsort(flat_M)
        count = kernels["up"].shape[0]
        sizes_E = jnp.sum(jax.nn.one_hot(flat_M, count, dtype=jnp.int32), axis=0)
        sorted_MD = x_BTD.reshape(-1, width)[order_M // picked]
        hidden_MF = jax.lax.ragged_dot(sorted_MD, kernels["up"], sizes_E)
        if "gate" in kernels:
            hidden_MF = act(jax.lax.ragged_dot(sorted_MD, kernels["gate"], sizes_E)) * hidden_MF
        else:
            hidden_MF = act(hidden_MF)
        out_MD = jax.lax.ragged_dot(hidden_MF, kernels["down"], sizes_E)
        out_BTKD = out_MD[jnp.argsort(order_M)].reshape(*chosen_BTK.shape, width)
        return jnp.einsum("BTKD,BTK->BTD", out_BTKD, weights_BTK.astype(x_BTD.dtype))

    return rows


def statistics(
    chosen_BTK: Int[Array, "B T K"],
    scores_BTE: Float[Array, "B T E"],
    logits_BTE: Float[Array, "B T E"],
    segments_BT: Int[Array, "_ T"] | None,
) -> dict[str, Array]:
    """What a router did, summed over each row's real tokens, so that microbatches add up.

    "expert_load_BE": how often each expert was picked, without gradient. "expert_probs_BE": its
    share of the scores. "router_z_B": log² of the logits' sum of exponentials (Zoph et al. 2022,
    §3.1, eq. 5). "router_tokens_B": how many tokens there were.
    """
    real_BT = jnp.ones((1, 1)) if segments_BT is None else (segments_BT > 0).astype(jnp.float32)
    real_BT = jnp.broadcast_to(real_BT, chosen_BTK.shape[:2])
    picked_BTE = jnp.sum(jax.nn.one_hot(chosen_BTK, scores_BTE.shape[-1]), axis=-2)
    probs_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    return {
        "expert_load_BE": jnp.einsum("BTE,BT->BE", picked_BTE, real_BT),
        "expert_probs_BE": jnp.einsum("BTE,BT->BE", probs_BTE, real_BT),
        "router_z_B": jnp.sum(z_BT * real_BT, axis=-1),
        "router_tokens_B": jnp.sum(real_BT, axis=-1),
    }


def load_balance(aux: Mapping[str, Array]) -> Float[Array, ""]:
    """Experts · Σ share of picks · mean probability, averaged over layers; low where balanced.

    Fedus et al. 2021, §2.2, eq. 4, with shares of tokens, which sum to top_k. Takes an `Output`'s
    aux; not a sum over examples, so microbatches don't add up to the whole batch's.
    """
    tokens_L1 = jnp.maximum(jnp.sum(aux["router_tokens_B"], axis=1), 1.0)[:, None]
    share_LE = jnp.sum(aux["expert_load_BE"], axis=1) / tokens_L1
    probs_LE = jnp.sum(aux["expert_probs_BE"], axis=1) / tokens_L1
    return share_LE.shape[-1] * jnp.mean(jnp.sum(share_LE * probs_LE, axis=-1))


def router_z_loss(aux: Mapping[str, Array]) -> Float[Array, ""]:
    """Mean over tokens and layers of log²Z of the router's logits (Zoph et al. 2022, eq. 5)."""
    return jnp.sum(aux["router_z_B"]) / jnp.maximum(jnp.sum(aux["router_tokens_B"]), 1.0)
