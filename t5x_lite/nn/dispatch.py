"""How tokens come to their experts and back, on one device or over the mesh's expert axis.

Dropless: each device gathers the tokens of all devices along the expert axis, computes its own
experts on those that picked them in one ragged product, and scatters the sums back. With a
capacity: each expert has as many places in each row as its capacity, and an all-to-all brings the
places to their expert (Lepikhin et al. 2020, GShard, §2.2).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.grouped import collect, grouped_product, spread
from t5x_lite.nn.kernels import platform_of
from t5x_lite.partitioning import Sharding

Kernels = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Mesh axes that a device's part of the tokens and of the experts is one of many along."""

    experts: tuple[str, ...] = ()  # rows are split over these, too
    length: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    platform: str = "cpu"


def dropless(
    x_BTD: Float[Array, "B T D"],
    chosen_BTK: Int[Array, "B T K"],
    weights_BTK: Float[Array, "B T K"],
    kernels: Kernels,
    activation: str,
    sharding: Sharding | None = None,
) -> Float[Array, "B T D"]:
    """Σ over a token's experts of weight · expert(x), whatever number of tokens each expert gets.

    Args:
        x_BTD: the tokens.
        chosen_BTK: each token's experts.
        weights_BTK: their weights.
        kernels: "up" [E, D, F], "down" [E, F, D] and, of gated experts, "gate" [E, D, F].
        activation: of the gate, or of `up` where there is none.
        sharding: where tokens and kernels lie.
    """

    def local(layout: _Layout, kernels: Kernels, x_BTD, chosen_BTK, weights_BTK):
        first = 0
        if layout.experts:
            first = jax.lax.axis_index(layout.experts) * kernels["up"].shape[0]
            x_BTD, chosen_BTK, weights_BTK = (
                jax.lax.all_gather(part, layout.experts, tiled=True)
                for part in (x_BTD, chosen_BTK, weights_BTK)
            )
        out_BTD = _own(x_BTD, chosen_BTK - first, weights_BTK, kernels, activation, layout.platform)
        if layout.experts:
            out_BTD = jax.lax.psum_scatter(out_BTD, layout.experts, tiled=True)
        return out_BTD

    return _on_mesh(local, sharding, kernels, x_BTD, chosen_BTK, weights_BTK)


def _own(x_BTD, chosen_BTK, weights_BTK, kernels, activation, platform):
    """The device's own experts on all tokens that picked one; other picks lie outside 0 … E - 1."""
    width, picked, count = x_BTD.shape[-1], chosen_BTK.shape[-1], kernels["up"].shape[0]
    expert_M = chosen_BTK.reshape(-1)  # M = B · T · K
    expert_M = jnp.where((expert_M >= 0) & (expert_M < count), expert_M, count)
    order_M = jnp.argsort(expert_M)
    inverse_M = jnp.argsort(order_M)
    sizes_E = jnp.sum(jax.nn.one_hot(expert_M, count, dtype=jnp.int32), axis=0)
    # A ragged product leaves what comes after its last group undefined, its gradient as well.
    own_M1 = (jnp.arange(order_M.shape[0]) < jnp.sum(sizes_E))[:, None]
    sorted_MD = spread(x_BTD.reshape(-1, width), order_M, inverse_M, picked)
    sorted_MD = jnp.where(own_M1, sorted_MD, 0)
    out_MD = _mlp(
        lambda x, name: grouped_product(platform, x, kernels[name], sizes_E),
        sorted_MD, "gate" in kernels, activation,
    )  # fmt: skip
    out_MD = jnp.where(own_M1, out_MD, 0)
    out_BTKD = collect(out_MD, order_M, inverse_M).reshape(*chosen_BTK.shape, width)
    return jnp.einsum("BTKD,BTK->BTD", out_BTKD, weights_BTK.astype(x_BTD.dtype))


def _mlp(product: Callable[[Array, str], Array], x: Array, gated: bool, activation: str) -> Array:
    act = layers.ACTIVATIONS[activation]
    up = product(x, "up")
    return product(act(product(x, "gate")) * up if gated else act(up), "down")


def capacity(length: int, picked: int, experts: int, factor: float | int) -> int:
    """Places of an expert in a row: `factor` · the mean number of picks; at most one a token."""
    mean = length * picked / experts
    return max(1, min(length, math.ceil(factor * mean - 1e-6)))


def places(
    chosen_BTK: Int[Array, "B T K"], segments_BT: Int[Array, "_ T"] | None, experts: int
) -> Int[Array, "B T K"]:
    """How many earlier tokens of the row picked the same expert.

    The first come are served first, so that no token's place depends on what comes after it.
    Padding takes no place: its own is T, beyond any capacity.
    """
    picked_BTE = jnp.sum(jax.nn.one_hot(chosen_BTK, experts, dtype=jnp.int32), axis=-2)
    real_BT1 = jnp.ones((1, 1, 1), bool) if segments_BT is None else (segments_BT > 0)[:, :, None]
    picked_BTE = jnp.where(real_BT1, picked_BTE, 0)
    before_BTE = jnp.cumsum(picked_BTE, axis=1) - picked_BTE
    places_BTK = jnp.take_along_axis(before_BTE, chosen_BTK, axis=-1)
    return jnp.where(real_BT1, places_BTK, chosen_BTK.shape[1])


def with_capacity(
    x_BTD: Float[Array, "B T D"],
    chosen_BTK: Int[Array, "B T K"],
    weights_BTK: Float[Array, "B T K"],
    places_BTK: Int[Array, "B T K"],
    size: int,
    kernels: Kernels,
    activation: str,
    sharding: Sharding | None = None,
) -> Float[Array, "B T D"]:
    """As `dropless`, but of a row's tokens each expert takes those whose place is below `size`."""

    def local(layout: _Layout, kernels: Kernels, x_BTD, chosen_BTK, weights_BTK, places_BTK):
        count = kernels["up"].shape[0] * _parts(layout.experts)
        slots = -(-size // _parts(layout.length)) * _parts(layout.length)
        # A place beyond the capacity would else be one of the slots that only pad.
        places_BTK = jnp.where(places_BTK < size, places_BTK, slots)
        x_BECD = _fill(x_BTD, chosen_BTK, places_BTK, count, slots)
        if layout.length:  # the devices along a row have filled different slots
            x_BECD = jax.lax.psum_scatter(x_BECD, layout.length, scatter_dimension=2, tiled=True)
        x_BECD = _exchange(x_BECD, layout.experts, 1, 0)
        y_BECD = _mlp(
            lambda x, name: jnp.einsum("BECI,EIO->BECO", x, kernels[name]),
            x_BECD, "gate" in kernels, activation,
        )  # fmt: skip
        y_BECD = _exchange(y_BECD, layout.experts, 0, 1)
        if layout.length:
            y_BECD = jax.lax.all_gather(y_BECD, layout.length, axis=2, tiled=True)
        out_BTKD = jax.vmap(lambda y, *at: y.at[at].get(mode="fill", fill_value=0))(
            y_BECD, chosen_BTK, places_BTK
        )
        return jnp.einsum("BTKD,BTK->BTD", out_BTKD, weights_BTK.astype(x_BTD.dtype))

    return _on_mesh(local, sharding, kernels, x_BTD, chosen_BTK, weights_BTK, places_BTK)


def _parts(axes: tuple[str, ...]) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _exchange(x: Array, axes: tuple[str, ...], split: int, join: int) -> Array:
    if not axes:
        return x
    return jax.lax.all_to_all(x, axes, split_axis=split, concat_axis=join, tiled=True)


def _fill(x_BTD, chosen_BTK, places_BTK, experts, slots):
    """Each expert's slots with the tokens that got them, [B, E, C, D]; the others are zero."""

    def row(x_TD, chosen_TK, places_TK):
        length = x_TD.shape[0]
        token_TK = jnp.broadcast_to(jnp.arange(length)[:, None], chosen_TK.shape)
        empty_EC = jnp.full((experts, slots), length)
        token_EC = empty_EC.at[chosen_TK, places_TK].set(token_TK, mode="drop")
        return x_TD.at[token_EC].get(mode="fill", fill_value=0)

    return jax.vmap(row)(x_BTD, chosen_BTK, places_BTK)


def of_tokens(choose: Callable[[Array], Array], x_BTE: Array, sharding: Sharding | None) -> Array:
    """`choose(x_BTE)`, each device its own tokens; without gradient.

    Left to the compiler, `top_k` gets the scores of the whole batch on every device.
    """
    if sharding is None or sharding.mesh.size == 1:
        return choose(x_BTE)
    tokens = sharding.spec(("batch", "length", None), x_BTE.shape)
    return sharding.shard_map(choose, (tokens,), tokens)(x_BTE)


def _on_mesh(local, sharding: Sharding | None, kernels: Kernels, x_BTD, *others_BTK):
    """`local(layout, kernels, x, …)` on every device's part of the tokens and of the kernels.

    Left to the compiler, one sort over the whole batch would bring every token to every device.
    Kernels are gathered over all axes but the experts' and, of hidden units, the tensor axis;
    partial sums over the latter are added up outside, once a token.
    """
    if sharding is None or sharding.mesh.size == 1:
        return local(_Layout(platform=platform_of(sharding)), dict(kernels), x_BTD, *others_BTK)
    tokens = sharding.spec(("batch", "length", None), x_BTD.shape)
    rows, length = sharding.axes("batch"), sharding.axes("length")
    experts, hidden = sharding.axes("expert"), sharding.axes("mlp")
    if not set(experts) <= set(rows):
        raise UserError(f"rules split experts over {', '.join(experts)}, but rows over "
                        f"{', '.join(rows)}: experts go where rows do.")  # fmt: skip
    hidden = tuple(axis for axis in hidden if axis not in (*rows, *length))
    layout = _Layout(
        experts if sharding.parts("expert") > 1 else (),
        length if sharding.parts("length") > 1 else (),
        hidden,
        platform_of(sharding),
    )
    into = PartitionSpec(experts or None, None, hidden or None)
    back = PartitionSpec(experts or None, hidden or None, None)

    def part(kernels, *arrays):
        return local(layout, kernels, *arrays)[None]

    weights = {name: back if name == "down" else into for name in kernels}
    ins = weights, *(tokens,) * (1 + len(others_BTK))
    run = sharding.shard_map(part, ins, PartitionSpec(hidden or None, *tokens))
    partial_HBTD = run(dict(kernels), x_BTD, *others_BTK)
    return jax.lax.reduce_sum(partial_HBTD, axes=[0])  # jnp.sum would add up in float32
