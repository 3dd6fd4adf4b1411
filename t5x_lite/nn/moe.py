"""A mixture of experts in the FFN's place: each token is sent to the few that its router picks.

Dropless by default: no expert has a capacity, so a token's result depends on no other token. Tokens
are sorted by expert, and one ragged product serves all experts (Gale et al. 2022, MegaBlocks). How
they get there is dispatch.py's; what the routers did, for losses and metrics, is loads.py's.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.nn import dispatch, layers, loads
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.partitioning import constrain
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
        names, shape = ("embed", "router"), (width, self.experts)
        kernel = layers.param(self, "kernel", init, names, shape, names[:1])
        kernel = constrain(kernel, (None, None), self.common.sharding)
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE", x_BTD.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST
        )
        scores_BTE = ranked_BTE = c.scores(logits_BTE)
        if isinstance(c, SigmoidRouter):
            zeros = nn.initializers.zeros
            correction = layers.param(self, "correction", zeros, ("router",), (self.experts,))
            ranked_BTE = scores_BTE + jax.lax.stop_gradient(correction)[None, None, :]
        chosen_BTK = dispatch.of_tokens(
            self._choose, jax.lax.stop_gradient(ranked_BTE), self.common.sharding
        )
        weights_BTK = jnp.take_along_axis(scores_BTE, chosen_BTK, axis=-1)
        if c.normalized:  # the tiny number: sigmoids may all be zero
            weights_BTK = weights_BTK / (jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20)
        return chosen_BTK, weights_BTK * c.scale, scores_BTE, logits_BTE

    def _choose(self, ranked_BTE: Float[Array, "B T E"]) -> Int[Array, "B T K"]:
        groups = self.config.groups
        ranked_BTE = ranked_BTE if groups is None else groups.keep(ranked_BTE)
        return jax.lax.top_k(ranked_BTE, self.config.top_k)[1]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """`experts` MLPs of which each token passes the few that `router` picks, and `shared` besides.

    Attributes:
        experts: E, how many there are.
        expert: each of them.
        router: picks and weighs them.
        shared: an MLP that every token passes (DeepSeekMoE: Dai et al. 2024, §3.2).
        capacity_factor: None: no pick is dropped. Else an expert takes at most this many times its
            mean number of picks of each row, the first ones; the others add nothing (Lepikhin et
            al. 2020, §2.2; Fedus et al. 2021, §2.2). Rows, not devices, so that the mesh changes
            nothing; but training with it isn't what decoding token by token computes.
    """

    experts: int
    expert: MLPConfig
    router: RouterConfig
    shared: MLPConfig | None = None
    capacity_factor: float | int | None = None

    def __post_init__(self):
        picked, groups = self.router.top_k, self.router.groups
        if not 1 <= picked <= self.experts:
            raise UserError(f"top_k={picked} must lie in 1 … experts={self.experts}.")
        if self.expert.bias or self.expert.dropout:
            raise UserError("experts have neither bias nor dropout of their own; leave both out.")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise UserError(
                f"capacity_factor={self.capacity_factor} must be above 0; 1.25 leaves room for "
                "a little imbalance, None drops nothing."
            )
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
        """Returns the result, and what a router's losses need of each row: `loads.statistics`."""
        c = self.config
        router = c.router.build(c.experts, self.common, "router")
        chosen_BTK, weights_BTK, scores_BTE, logits_BTE = router(x_BTD)
        run = _Experts(c, self.common, name="experts")
        out_BTD, dropped = run(x_BTD, chosen_BTK, weights_BTK, segments_BT)
        out_BTD = constrain(out_BTD, ("batch", "length", "act_embed"), self.common.sharding)
        if c.shared is not None:
            shared_BTD, _ = c.shared.build(self.common, "shared")(x_BTD, keys)
            out_BTD = out_BTD + shared_BTD
        aux = loads.statistics(chosen_BTK, scores_BTE, logits_BTE, segments_BT)
        return out_BTD, {**aux, **dropped}


class _Experts(nn.Module):
    config: MoEConfig
    common: layers.Common

    @nn.compact
    def __call__(
        self, x_BTD: Array, chosen_BTK: Array, weights_BTK: Array, segments_BT: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the weighted sums, and how many of each row's picks found no place."""
        c, width, dtype = self.config.expert, x_BTD.shape[-1], self.common.dtype
        names = ("up", "gate", "down") if c.gated else ("up", "down")
        kernels = {name: self._kernels(name, width, c.hidden).astype(dtype) for name in names}
        count, factor = self.config.experts, self.config.capacity_factor
        tokens, with_them = x_BTD.astype(dtype), (kernels, c.activation, self.common.sharding)
        if factor is None:
            return dispatch.dropless(tokens, chosen_BTK, weights_BTK, *with_them), {}
        size = dispatch.capacity(x_BTD.shape[1], chosen_BTK.shape[-1], count, factor)
        places_BTK = dispatch.places(chosen_BTK, segments_BT, count)
        out_BTD = dispatch.with_capacity(
            tokens, chosen_BTK, weights_BTK, places_BTK, size, *with_them
        )
        return out_BTD, {"expert_dropped_B": loads.dropped(places_BTK, size, segments_BT)}

    def _kernels(self, name: str, width: int, hidden: int) -> Array:
        sizes, axes, gain = (width, hidden), ("embed", "mlp"), 1.0
        if name == "down":
            sizes, axes, gain = (hidden, width), ("mlp", "embed"), self.common.residual_gain
        init = layers.truncated_normal(gain * self.common.init.stddev(sizes[0]))
        return _Kernels(init, ("expert", *axes), (self.config.experts, *sizes), name=name)()


class _Kernels(nn.Module):
    """All experts' kernels of one product, [E, inputs, outputs]."""

    initial: nn.initializers.Initializer
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        return layers.param(self, "kernel", self.initial, self.axes, self.shape, self.axes[1:2])
