"""Counting what a program multiplies, and what a device could."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

# Peak dense matrix throughput of one chip, FLOP/s in bfloat16, by the start of JAX's device_kind.
# Google Cloud TPU documentation (v4, v5e, v5p, v6e); NVIDIA data sheets, without sparsity.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def matmul_flops(function: Callable, *args) -> int:
    """Floating-point operations of all matrix products in one call; loops count every turn.

    Nothing is computed: the function is traced with `args`, arrays or ShapeDtypeStructs.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "ragged_dot_general":
            total += _ragged(equation)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += turns * sum(map(_count, jaxprs_in_params(equation.params)))
    return total


def _ragged(equation) -> int:
    """Each row meets one group's kernel, in the product as in its gradients."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    (_, contracted), _ = numbers.dot_dimension_numbers
    met = {*contracted, *numbers.rhs_group_dimensions}
    free = (size for axis, size in enumerate(right) if axis not in met)
    return 2 * math.prod(left) * math.prod(free)


def peak_flops(devices: list[jax.Device]) -> tuple[float, str]:
    """Peak FLOP/s of all devices together, and where the figure comes from.

    A CPU's is measured: the best of a few float32 products. An unknown device gives 0.
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        # Emulated devices share the one processor.
        return _measured_peak(), "measured, float32 matmul"
    known = [peak for name, peak in PEAK.items() if kind.startswith(name)]
    return (len(devices) * known[0], f"{kind}, bfloat16") if known else (0.0, f"{kind} unknown")


def _measured_peak(size: int = 1536, repeats: int = 4) -> float:
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
