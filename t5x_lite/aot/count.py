"""Floating-point operations of a traced program, counted from its jaxpr.

`jax.jit(f).trace(…).jaxpr` gives the jaxpr. XLA's own count takes a loop's body once, and knows
nothing of a kernel that it didn't write; this one multiplies loops out and asks kernels.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxprs_in_params

from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of a program, on all of its devices together.

    Attributes:
        products: of matrix products and convolutions, by where they are in the program: the names
            of the modules around them, such as `jvp(Transformer)/…/layers/attention/query`.
        others: likewise, one for each number that anything else computes, exponentials as well as
            sums; a reduction has one for each number that it takes in. Of floating-point numbers.
    """

    products: Mapping[str, int] = dataclasses.field(default_factory=dict)
    others: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def matmul(self) -> int:
        """Of matrix products and convolutions."""
        return sum(self.products.values())

    @property
    def elementwise(self) -> int:
        """Of all others."""
        return sum(self.others.values())

    @property
    def total(self) -> int:
        """Of everything."""
        return self.matmul + self.elementwise

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(_sum(self.products, other.products), _sum(self.others, other.others))

    def __mul__(self, times: int) -> "Flops":
        return Flops(*({place: times * n for place, n in part.items()}
                       for part in (self.products, self.others)))  # fmt: skip


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> Mapping[str, int]:
    return collections.Counter(one) + collections.Counter(other)


def flops(jaxpr: ClosedJaxpr, turns: int | None = None) -> Flops:
    """What a program computes if it runs as it is written; loops count every turn.

    Of a conditional's branches the larger counts. What each device of a `shard_map` computes counts
    for each, what the compiler divides among devices once. Attention by a splash kernel counts the
    blocks that its mask leaves, other attention the whole square.

    Args:
        jaxpr: of the program.
        turns: how often a loop runs whose trip count isn't known when it is traced.

    Raises:
        UserError: such a loop and no `turns`, or a custom call whose FLOPs aren't known.
    """
    known = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    return _Count(turns).of(jaxpr.jaxpr, "", known)


@dataclasses.dataclass(frozen=True)
class _Count:
    turns: int | None

    def of(self, jaxpr: Jaxpr, place: str, known: Mapping[Any, Any]) -> Flops:
        """Of a jaxpr that stands at `place`; `known` has the values of those that are constants."""
        # Added up here: a sum for each of a thousand equations would copy the names as often.
        products: collections.Counter[str] = collections.Counter()
        others: collections.Counter[str] = collections.Counter()
        for equation in jaxpr.eqns:
            found = self._equation(equation, place, known)
            products.update(found.products)
            others.update(found.others)
        return Flops(products, others)

    def _equation(self, equation, place, known) -> Flops:
        name = equation.primitive.name
        place = "/".join(filter(None, (place, str(equation.source_info.name_stack))))
        if product := _PRODUCTS.get(name):
            return Flops({place: product(equation)})
        inner = functools.partial(self._inner, equation, place, known)
        if name == "scan":
            return inner(equation.params["jaxpr"]) * equation.params["length"]
        if name == "cond":
            branches = (inner(branch, 1) for branch in equation.params["branches"])
            return max(branches, key=lambda branch: branch.total)
        if name == "while":
            return self._loop(equation, inner)
        if name == "shard_map":
            mesh, axes = equation.params["mesh"], equation.params["newly_manual_axes"]
            return inner(equation.params["jaxpr"]) * math.prod(mesh.shape[axis] for axis in axes)
        if name == "pallas_call":
            return self._kernel(equation, place, known)
        if name in _known_leaves():
            return Flops(others={place: _elementwise(equation)})
        calls = list(jaxprs_in_params(equation.params))
        if not calls:
            raise UserError(f"{name} at {place or 'the top'} is a custom call whose FLOPs nobody "
                            "counted; add a formula to t5x_lite/aot/count.py.")  # fmt: skip
        return sum(map(inner, calls), Flops())

    def _inner(self, equation, place, known, jaxpr, skipped: int = 0) -> Flops:
        """Of a jaxpr that an equation calls with its inputs, all but the first `skipped`."""
        closed = isinstance(jaxpr, ClosedJaxpr)
        values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)) if closed else {}
        body = jaxpr.jaxpr if closed else jaxpr
        outer = equation.invars[skipped:]
        same = _constants(equation) if equation.primitive.name == "scan" else len(outer)
        for ours, theirs in zip(outer[:same], body.invars, strict=False):
            value = _value(ours, known)
            if value is not None and np.shape(value) == theirs.aval.shape:
                values[theirs] = value
        return self.of(body, place, values)

    def _loop(self, equation, inner) -> Flops:
        if self.turns is None:
            where = equation.source_info.name_stack or "the top"
            raise UserError(f"a loop at {where} runs until a condition is met, which nobody knows "
                            "beforehand; say how many turns to count.")  # fmt: skip
        turn = inner(equation.params["body_jaxpr"], len(equation.invars))
        return (turn + inner(equation.params["cond_jaxpr"], len(equation.invars))) * self.turns

    def _kernel(self, equation, place, known) -> Flops:
        """Of a Pallas kernel: as it estimates itself, or, of those we know, block by block."""
        name, estimate = equation.params["name"], equation.params["cost_estimate"]
        if estimate is not None:
            return Flops({place: int(estimate.flops)}, {place: int(estimate.transcendentals)})
        if not name.startswith("splash_"):
            raise UserError(f"the Pallas kernel {name or 'without a name'} at {place or 'the top'} "
                            "gives no cost_estimate, so that nobody knows its FLOPs; add one."
                            )  # fmt: skip
        grid = math.prod(equation.params["grid_mapping"].grid)
        # Second comes the mask of blocks: 0 is one that no query sees, which is skipped.
        mask = _value(equation.invars[1], known)
        if mask is not None:
            mask = np.asarray(mask)
            grid = grid * int(np.count_nonzero(mask)) // mask.size
        block = self.of(equation.params["jaxpr"], place, {})
        return Flops({place: block.matmul}, {place: block.elementwise}) * grid


def _constants(scan) -> int:
    """How many of a loop's inputs come in as they are in each turn: they come first."""
    if "num_consts" in scan.params:
        return scan.params["num_consts"]
    constants, *_ = scan.params["ft_in"].unpack()  # from JAX 0.11 on
    return len(constants)


def _value(variable, known) -> Any:
    return variable.val if isinstance(variable, Literal) else known.get(variable)


# --- products


def _dot(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)


def _ragged_dot(equation) -> int:
    """Each row meets one group's kernel, in the product as in its gradients."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    (_, contracted), _ = numbers.dot_dimension_numbers
    met = {*contracted, *numbers.rhs_group_dimensions}
    free = (size for axis, size in enumerate(right) if axis not in met)
    return 2 * math.prod(left) * math.prod(free)


def _convolution(equation) -> int:
    """Each output meets every place of the kernel, of every feature in its group."""
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    outputs = kernel[numbers.rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs


def _cudnn(products: tuple[int, int]) -> Callable[[Any], int]:
    """cuDNN's attention, its whole square: so many products of queries' size, and of values'."""

    def formula(equation) -> int:
        q_BTNH, k_BSKH, v_BSKH = (variable.aval.shape for variable in equation.invars[:3])
        size = products[0] * q_BTNH[3] + products[1] * v_BSKH[3]
        return 2 * math.prod(q_BTNH[:3]) * k_BSKH[1] * size

    return formula


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": _cudnn((1, 1)),
    # The scores again, then gradients of probabilities, values, queries and keys.
    "dot_product_attention_bwd_wrapper": _cudnn((3, 2)),
}

# --- everything else

_ARITHMETIC = {
    "abs", "add", "add_any", "atan2", "cbrt", "ceil", "clamp", "cos", "cosh", "cumlogsumexp",
    "cummax", "cummin", "cumprod", "cumsum", "div", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg",
    "pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub",
    "tan", "tanh",
}  # fmt: skip
_REDUCTIONS = {"reduce_sum": 0, "reduce_max": 0, "reduce_min": 0, "reduce_prod": 0} | {
    "argmax": 0, "argmin": 0, "scatter-add": 2, "scatter-mul": 2,
}  # fmt: skip
# What JAX has besides `jax.lax`: no kernel hides behind these.
_OTHERS = {
    "add_any", "name", "pvary", "pbroadcast", "preduced", "psum_invariant",
    "all_gather_invariant", "all_gather_reduced", "unreduced_psum", "reduce_scatter", "reshard",
    "layout_constraint", "empty", "zeros_like", "tie", "platform_index", "random_seed",
    "random_split", "random_fold_in", "random_bits", "random_wrap", "random_unwrap",
    "random_clone", "random_gamma", "threefry2x32", "iota_2x32_shape", "new_ref", "freeze",
    "debug_callback", "debug_print",
    # Inside of a Pallas kernel:
    "get", "swap", "addupdate", "broadcast_to", "program_id", "num_programs", "multiple_of",
    "roll", "reciprocal",
}  # fmt: skip
_LOOPS = ("scan", "while", "cond", "custom_linear_solve")


@functools.cache
def _known_leaves() -> frozenset[str]:
    """Operations of JAX's own that multiply no matrices."""
    lax = {each.name for each in vars(jax.lax).values() if isinstance(each, Primitive)}
    return frozenset((lax - {"fft", *_LOOPS}) | _OTHERS)


def _elementwise(equation) -> int:
    name, outputs = equation.primitive.name, equation.outvars
    if not outputs or not jnp.issubdtype(outputs[0].aval.dtype, jnp.floating):
        return 0
    if name in _REDUCTIONS:
        return math.prod(equation.invars[_REDUCTIONS[name]].aval.shape)
    return math.prod(outputs[0].aval.shape) if name in _ARITHMETIC else 0
