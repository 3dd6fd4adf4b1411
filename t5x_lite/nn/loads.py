"""What routers did: sums over rows, from which losses, metrics and corrections are made.

Everything is a sum over a row's real tokens first, so that any mesh adds up the same. The load
balance of a batch is no sum over its rows, though: see `load_balance`.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Aux = Mapping[str, Array]  # an `Output`'s
Loads = dict[str, Array]  # of a microbatch or a whole batch: see `of`


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
    real_BT = _real(segments_BT, chosen_BTK.shape)
    picked_BTE = jnp.sum(jax.nn.one_hot(chosen_BTK, scores_BTE.shape[-1]), axis=-2)
    probs_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    return {
        "expert_load_BE": jnp.einsum("BTE,BT->BE", picked_BTE, real_BT),
        "expert_probs_BE": jnp.einsum("BTE,BT->BE", probs_BTE, real_BT),
        "router_z_B": jnp.sum(z_BT * real_BT, axis=-1),
        "router_tokens_B": jnp.sum(real_BT, axis=-1),
    }


def dropped(
    places_BTK: Int[Array, "B T K"], size: int, segments_BT: Int[Array, "_ T"] | None
) -> Float[Array, " B"]:
    """How many picks of each row's real tokens found their expert full."""
    late_BT = jnp.sum((places_BTK >= size).astype(jnp.float32), axis=-1)
    return jnp.sum(late_BT * _real(segments_BT, places_BTK.shape), axis=-1)


def _real(segments_BT, shape) -> Float[Array, "B T"]:
    real_BT = jnp.ones((1, 1)) if segments_BT is None else (segments_BT > 0).astype(jnp.float32)
    return jnp.broadcast_to(real_BT, shape[:2])


def stacks(aux: Aux) -> Iterator[tuple[str, Aux]]:
    """(prefix, own auxiliaries) of each stack that has experts; an encoder's come second."""
    for prefix in ("", "encoder_"):
        if f"{prefix}router_tokens_B" in aux:
            names = ("expert_load_BE", "expert_probs_BE", "router_z_B", "router_tokens_B")
            yield prefix, {name: aux[f"{prefix}{name}"] for name in names}


def tokens(aux: Aux) -> Float[Array, " B"]:
    """How many tokens each row has that aren't padding."""
    return aux["router_tokens_B"][0]


def of(aux: Aux) -> Loads:
    """Each stack's picks, [L, E], summed over all rows, and those that found their expert full.

    Takes an `Output`'s auxiliaries; empty for a model without experts.
    """
    return {
        f"{prefix}{name}": jnp.sum(aux[f"{prefix}{rows}"], axis=1)
        for prefix in ("", "encoder_")
        for name, rows in (("picks_LE", "expert_load_BE"), ("dropped_L", "expert_dropped_B"))
        if f"{prefix}{rows}" in aux
    }


def summary(sums: Loads) -> dict[str, Float[Array, ""]]:
    """What a run logs of its experts.

    "expert_load_max" and "expert_load_min": the picks of the most and of the least popular expert
    over the mean, averaged over layers; 1 where all are picked alike. "expert_dropped": the share
    of picks without a place, where there is a capacity.
    """
    of_stacks = [sums[name] for name in ("picks_LE", "encoder_picks_LE") if name in sums]
    if not of_stacks:
        return {}
    shares = [picks / jnp.maximum(jnp.mean(picks, axis=1, keepdims=True), 1e-9)
              for picks in of_stacks]  # fmt: skip
    result = {
        "expert_load_max": jnp.mean(jnp.concatenate([jnp.max(s, axis=1) for s in shares])),
        "expert_load_min": jnp.mean(jnp.concatenate([jnp.min(s, axis=1) for s in shares])),
    }
    late = [jnp.sum(sums[name]) for name in ("dropped_L", "encoder_dropped_L") if name in sums]
    if late:
        result["expert_dropped"] = sum(late) / jnp.maximum(sum(map(jnp.sum, of_stacks)), 1.0)
    return result


def load_balance(aux: Aux) -> Float[Array, ""]:
    """Experts · Σ share of picks · mean probability, averaged over layers; low where balanced.

    Fedus et al. 2021, §2.2, eq. 4, with shares of tokens, which sum to top_k: where all experts are
    picked alike it is top_k. Takes a stack's auxiliaries. Not a sum over examples: of a batch in
    microbatches, each is asked to be balanced by itself, which is more than that the whole is.
    """
    tokens_L1 = jnp.maximum(jnp.sum(aux["router_tokens_B"], axis=1), 1.0)[:, None]
    share_LE = jnp.sum(aux["expert_load_BE"], axis=1) / tokens_L1
    probs_LE = jnp.sum(aux["expert_probs_BE"], axis=1) / tokens_L1
    return share_LE.shape[-1] * jnp.mean(jnp.sum(share_LE * probs_LE, axis=-1))


def row_balance(aux: Aux) -> Float[Array, " B"]:
    """`load_balance` of each row by itself: a sum over rows, whatever the microbatches.

    DeepSeek-V3 (§2.1.2, eq. 17 to 20, its complementary sequence-wise balance loss) divides the
    shares by top_k as well. A row without a token has 0.
    """
    tokens_LB1 = jnp.maximum(aux["router_tokens_B"], 1.0)[:, :, None]
    both_LBE = (aux["expert_load_BE"] / tokens_LB1) * (aux["expert_probs_BE"] / tokens_LB1)
    return both_LBE.shape[-1] * jnp.mean(jnp.sum(both_LBE, axis=-1), axis=0)


def router_z(aux: Aux) -> Float[Array, " B"]:
    """Σ over each row's tokens of log²Z of the router's logits, averaged over layers."""
    return jnp.mean(aux["router_z_B"], axis=0)


def router_z_loss(aux: Aux) -> Float[Array, ""]:
    """Mean over tokens and layers of log²Z of the router's logits (Zoph et al. 2022, eq. 5)."""
    return jnp.sum(aux["router_z_B"]) / jnp.maximum(jnp.sum(aux["router_tokens_B"]), 1.0)
