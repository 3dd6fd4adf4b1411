"""Optimizers as configs that build Optax chains, and how their state lies over the mesh.

A stack of layers is one parameter with a leading axis "layers". Rules with statistics of a whole
tensor (Adafactor's factors, clipping by RMS) therefore run once a layer, by `per_tensor`, so that
a scanned and an unrolled model learn the same. A kernel of attention is one matrix, though it lies
as [D, heads, head_dim] or [heads, head_dim, D]: `as_matrix` says which.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5x_lite.errors import UserError
from t5x_lite.nn import mup
from t5x_lite.nn.config import ModelConfig
from t5x_lite.schedules import Schedule
from t5x_lite.types import PyTree

MOMENTS = ("float32", "bfloat16")
Names = tuple[str | None, ...]  # of the logical axes of one tensor
Axes = PyTree  # a tree like the parameters', of such tuples


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    `moment_dtype` is how both moments are stored, as DeepSeek-V3 does in bfloat16 (2024, §3.3.2);
    an update is computed in float32 all the same.
    """

    schedule: Schedule
    b1: float | int = 0.9
    b2: float | int = 0.95
    epsilon: float | int = 1e-8
    weight_decay: float | int = 0.1
    decay: str = r"(kernel|embedding|token_types)$"  # which parameters decay: a regular expression
    clip_norm: float | int | None = 1.0  # of all gradients together; None: no clipping
    moment_dtype: str = "float32"

    def __post_init__(self):
        if self.moment_dtype not in MOMENTS:
            raise UserError(
                f"moment_dtype={self.moment_dtype!r} must be one of {', '.join(MOMENTS)}."
            )
        # A step takes 1 - b of a moment off. Where that is less than half of the distance to the
        # next number, rounding undoes it, and the moment never shrinks.
        least = float(jnp.finfo(self.moment_dtype).eps) / 2
        for name, b in (("b1", self.b1), ("b2", self.b2)):
            if self.moment_dtype != "float32" and 1 - b <= least:
                raise UserError(
                    f"{name}={b} decays by {1 - b:.2g} a step, which {self.moment_dtype} rounds "
                    f"away; set {name} below {1 - least:.4g} or moment_dtype='float32'."
                )

    def build(self, axes: Axes, scales: PyTree | None = None) -> optax.GradientTransformation:
        """The Optax chain for parameters with these logical axes; `scales`: muP's, of `MuP`."""
        adam = stored_as(self.moment_dtype, optax.scale_by_adam(self.b1, self.b2, self.epsilon))
        decay = optax.add_decayed_weights(self.weight_decay, mask=decay_mask(self.decay, axes))
        rate = optax.scale_by_learning_rate(self.schedule)
        clipped = clip(self.clip_norm, scales)
        return relaxed(optax.chain(*clipped, as_the_base(adam, scales), decay, rate))


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Factored second moments, updates relative to the parameter's scale (Shazeer, Stern 2018).

    As T5 uses it (Raffel et al. 2020, §3.1.2): no momentum, decay 1 - step^-0.8, updates clipped
    at RMS 1; `schedule` then is a relative step size. Kernels of attention are factored as D ×
    heads · head_dim. Other tensors of more than two axes, such as those of experts, are stacks of
    the matrices of their two largest ones.
    """

    schedule: Schedule
    decay_rate: float | int = 0.8
    epsilon: float | int = 1e-30
    clip_rms: float | int = 1.0
    min_factored: int = 128  # smaller matrices keep a full second moment
    weight_decay: float | int = 0.0
    decay: str = r"(kernel|embedding|token_types)$"
    clip_norm: float | int | None = None

    def build(self, axes: Axes, scales: PyTree | None = None) -> optax.GradientTransformation:
        """The Optax chain for parameters with these logical axes; `scales`: muP's, of `MuP`."""
        rule = optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate,
                epsilon=self.epsilon,
                min_dim_size_to_factor=self.min_factored,
            ),
            optax.clip_by_block_rms(self.clip_rms),
            optax.scale_by_param_block_rms(),
        )
        decay = optax.add_decayed_weights(self.weight_decay, mask=decay_mask(self.decay, axes))
        rate = optax.scale_by_learning_rate(self.schedule)
        rule = per_tensor(lambda names: of_matrices(rule, names, self.min_factored), axes)
        rule = as_the_base(rule, scales)
        return relaxed(optax.chain(*clip(self.clip_norm, scales), rule, decay, rate))


@dataclasses.dataclass(frozen=True)
class MuP:
    """An optimizer whose rates and clipping hold at every width (`nn.mup`).

    It sees each gradient and parameter as large as the base model has them, and its update is then
    multiplied by the parameter's rate. So Adam's epsilon and the clipping's norm mean the same at
    every width (Everett et al. 2024 on why epsilon must), and Adafactor's step, which is relative
    to a parameter's scale, shrinks as Adam's does. Decoupled weight decay stays schedule · decay ·
    parameter: it isn't multiplied by the parameter's rate (Wortsman et al. 2023: "independent").
    """

    optimizer: AdamW | Adafactor
    model: ModelConfig
    base: ModelConfig

    @property
    def schedule(self) -> Schedule:
        """The optimizer's own."""
        return self.optimizer.schedule

    def build(self, axes: Axes) -> optax.GradientTransformation:
        """The Optax chain for the model's parameters, which have these logical axes."""
        names = jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)
        unrolled = any("/layers_" in path_name(path) for path, _ in names)
        return self.optimizer.build(axes, mup.scales(self.model, self.base, unrolled))


Optimizer = AdamW | Adafactor | MuP


def parametrised(
    optimizer: AdamW | Adafactor, model: ModelConfig, base: ModelConfig | None = None
) -> Optimizer:
    """`optimizer` as it is, or, given a base, under muP."""
    return optimizer if base is None else MuP(optimizer, model, base)


def stored_as(dtype: str, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule`, of Adam's kind, with the moments in its state kept in `dtype` between steps."""

    def cast(state, to):
        return state._replace(mu=optax.tree.cast(state.mu, to), nu=optax.tree.cast(state.nu, to))

    def init(params):
        return cast(rule.init(params), dtype)

    def update(gradients, state, params=None):
        updates, state = rule.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def clip(
    norm: float | int | None, scales: PyTree | None = None
) -> list[optax.GradientTransformation]:
    """Clipping by the global norm of all gradients, or nothing.

    Under muP the norm is of gradients as the base has them: entries as large, and as many.
    """
    if norm is None:
        return []
    rule = optax.clip_by_global_norm(norm)
    if scales is None:
        return [rule]

    def measure(scale: mup.Scale):
        return scale.gradient * scale.entries**-0.5

    def update(gradients, state, params=None):
        clipped, state = rule.update(_times(scales, gradients, measure), state, params)
        return _times(scales, clipped, lambda scale: 1 / measure(scale)), state

    return [optax.GradientTransformation(rule.init, update)]


def as_the_base(
    rule: optax.GradientTransformation, scales: PyTree | None
) -> optax.GradientTransformation:
    """`rule` where gradients and parameters look as the base has them; its state is as without."""
    if scales is None:
        return rule

    def update(gradients, state, params=None):
        gradients = _times(scales, gradients, lambda s: s.gradient)
        params = jax.tree.map(lambda s, x: s.unscaled(x), scales, params, is_leaf=mup.is_scale)
        updates, state = rule.update(gradients, state, params)
        return _times(scales, updates, lambda s: s.rate), state

    return optax.GradientTransformation(rule.init, update)


def _times(scales: PyTree, tree: PyTree, factor: Callable[[mup.Scale], Any]) -> PyTree:
    return jax.tree.map(lambda s, x: mup.times(x, factor(s)), scales, tree, is_leaf=mup.is_scale)


def relaxed(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Optax relies on implicit promotion in places; here alone strict promotion is off."""

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return transform.init(params)

    def update(gradients, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(gradients, state, params)

    return optax.GradientTransformation(init, update)


def decay_mask(pattern: str, axes: Axes) -> PyTree:
    """True for parameters whose path, such as `decoder/final_norm/scale`, matches.

    Raises:
        UserError: not a regular expression.
    """
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"decay={pattern!r} is not a regular expression: {error}.") from error
    return jax.tree_util.tree_map_with_path(
        lambda path, _: matches(path_name(path)) is not None, axes, is_leaf=_is_axes
    )


def per_tensor(
    rule_of: Callable[[Names], optax.GradientTransformation], axes: Axes
) -> optax.GradientTransformation:
    """Applies a rule to each parameter alone, and to each layer of a stacked one.

    The state is a tree like the parameters', with the rule's state of each in its leaf's place.

    Args:
        rule_of: the rule of a tensor with these logical axes, "layers" not among them.
        axes: the parameters' logical axes.
    """
    names, tree = jax.tree.flatten(axes, is_leaf=_is_axes)
    rules = []
    for own in names:
        if own[:1] == ("layers",):
            rule = rule_of(own[1:])
            rules.append((jax.vmap(rule.init), jax.vmap(rule.update)))
        else:
            rules.append(rule_of(own))

    def init(params):
        leaves = zip(rules, tree.flatten_up_to(params), strict=True)
        return tree.unflatten([begin(param) for (begin, _), param in leaves])

    def update(gradients, state, params):
        parts = map(tree.flatten_up_to, (gradients, state, params))
        results = [go_on(*leaf) for (_, go_on), *leaf in zip(rules, *parts, strict=True)]
        return tuple(tree.unflatten(part) for part in zip(*results, strict=True))

    return optax.GradientTransformation(init, update)


def of_matrices(
    rule: optax.GradientTransformation, names: Names, least: int
) -> optax.GradientTransformation:
    """`rule`, of one tensor with these logical axes, where heads and their entries are one axis.

    Only where the rule, which factors by two axes of `least` entries or more, does so in either
    form: a tensor that it doesn't factor keeps its shape. Roots of mean squares are the same.
    """

    def shape_of(param):
        matrix, _ = as_matrix(param.shape, names)
        return matrix if is_factored(matrix) or is_factored(param.shape) else param.shape

    def is_factored(shape):
        return len(shape) > 1 and sorted(shape)[-2] >= least

    def init(param):
        return rule.init(param.reshape(shape_of(param)))

    def update(gradient, state, param):
        shape = shape_of(param)
        found, state = rule.update(gradient.reshape(shape), state, param.reshape(shape))
        return found.reshape(param.shape), state

    return optax.GradientTransformation(init, update)


def as_matrix(shape: Sequence[int], names: Names) -> tuple[tuple[int, ...], Names]:
    """A tensor's shape and axes with heads and their entries as one axis, called as heads are.

    Heads come first in it, so that an axis that is split by heads stays so.
    """
    for at, pair in enumerate(itertools.pairwise(names)):
        if pair in (("heads", "head_dim"), ("kv_heads", "head_dim")):
            merged = shape[at] * shape[at + 1]
            return (*shape[:at], merged, *shape[at + 2 :]), (*names[: at + 1], *names[at + 2 :])
    return tuple(shape), names


def path_name(path: tuple) -> str:
    """A leaf's path, `decoder/layers/ffn/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_axes(state: PyTree, shapes: PyTree, axes: Axes) -> PyTree:
    """Logical axes of every leaf of an optimizer's state.

    A leaf belongs to the parameter whose path its own contains. It has that parameter's axes if it
    has its shape, or its shape as a matrix; those that are left of the matrix's if it is one of
    Adafactor's factors; and none otherwise.

    Args:
        state: the state's shapes, by `jax.eval_shape`.
        shapes: the parameters' shapes.
        axes: the parameters' logical axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=_is_axes)
    known = {
        path_name(path): (leaf.shape, n) for (path, leaf), n in zip(leaves, names, strict=True)
    }

    def of(path, leaf):
        name = path_name(path)
        owners = [owner for owner in known if f"/{owner}/" in f"/{name}/"]
        whole = (None,) * len(leaf.shape)
        if not owners:
            return whole
        shape, axis_names = known[max(owners, key=len)]
        if leaf.shape == shape:
            return axis_names
        shape, axis_names = as_matrix(shape, axis_names)
        if leaf.shape == shape:
            return axis_names
        factor = {"v_row": -1, "v_col": -2}.get(name.rsplit("/", 1)[-1])
        return whole if factor is None else _without(shape, axis_names, factor, leaf.shape) or whole

    return jax.tree_util.tree_map_with_path(of, state)


def _without(shape, names, rank, expected):
    """Axes of a factor: Optax drops the largest axis for the rows, the second for the columns."""
    first = 1 if names[:1] == ("layers",) else 0
    dropped = first + int(np.argsort(shape[first:])[rank]) if len(shape) - first > 1 else None
    left = tuple(size for axis, size in enumerate(shape) if axis != dropped)
    if left != expected:
        return None
    return tuple(name for axis, name in enumerate(names) if axis != dropped)


def _is_axes(node) -> bool:
    return isinstance(node, tuple)
