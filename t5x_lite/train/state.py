"""The train state: what a step reads and returns, how it lies over a mesh, how it is stored."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from t5x_lite.nn import mup, parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.optim import Optimizer, path_name, state_axes
from t5x_lite.partitioning import Sharding
from t5x_lite.types import Params, PyTree


@flax.struct.dataclass
class TrainState:
    """All that a step depends on besides its batch and key; never closed over.

    `params` are trained; `frozen` are not (a LoRA's base, a reference, a teacher); `buffers` change
    by rule (a router's bias); `ema` is empty or an exponential moving average of `params`; `step`
    counts the updates done.
    """

    step: Any
    params: Any
    opt_state: Any
    frozen: Any = flax.struct.field(default_factory=dict)
    buffers: Any = flax.struct.field(default_factory=dict)
    ema: Any = flax.struct.field(default_factory=dict)


def init_state(
    model: ModelConfig,
    transform: optax.GradientTransformation,
    seed: int | jax.Array,
    ema: bool = False,
    base: ModelConfig | None = None,
) -> TrainState:
    """The state before the first step; run it under `jax.jit`. `base`: muP's, of `optim.MuP`."""
    params = parameters.init(model, jax.random.key(seed))
    if base is not None:
        params = mup.initial(params, mup.scales(model, base))
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params), ema=average)


def state_shardings(
    model: ModelConfig, optimizer: Optimizer, sharding: Sharding, ema: bool = False
) -> tuple[TrainState, TrainState]:
    """Shapes of the whole state, and a NamedSharding for every leaf; allocates nothing.

    Raises:
        UserError: a parameter's axis that the mesh doesn't divide.
    """
    shapes, axes = parameters.abstract(model)
    transform = optimizer.build(axes)
    state = jax.eval_shape(lambda: init_state(model, transform, 0, ema))
    names = TrainState(
        step=(),
        params=axes,
        opt_state=state_axes(state.opt_state, shapes, axes),
        ema=axes if ema else {},
    )
    tree = jax.tree.structure(state)
    leaves = zip(jax.tree.leaves(state), tree.flatten_up_to(names), strict=True)
    return state, tree.unflatten([sharding.named(n, leaf.shape) for leaf, n in leaves])


def to_tree(state: TrainState) -> dict[str, Any]:
    """Nested dicts as a checkpoint holds them: named by path, layers stacked."""
    tree: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        *folders, name = path_name(path).split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return parameters.stack_layers(tree)


def from_tree(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The inverse of `to_tree`, for a state of the structure of `like`."""

    def of(path, leaf):
        node: Any = tree
        for name in path_name(path).split("/"):
            node = node[name]
        return node

    if _is_unrolled(like.params):
        tree = parameters.unstack_layers(tree)
    return jax.tree_util.tree_map_with_path(of, like)


def _is_unrolled(params: Params) -> bool:
    return any("layers_0" in stack for stack in params.values())


def stored_shapes(
    model: ModelConfig, optimizer: Optimizer, sharding: Sharding, ema: bool = False
) -> PyTree:
    """What `Checkpointer.restore` is to give back: `to_tree`'s shapes, with shardings."""
    shapes, shardings = state_shardings(parameters.scanned(model), optimizer, sharding, ema)
    return to_tree(
        jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shardings,
        )
    )
