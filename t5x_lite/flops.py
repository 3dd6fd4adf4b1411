"""Counting what a program multiplies, and what a device could."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from t5x_lite.aot import chips, count


def matmul_flops(function: Callable, *args) -> int:
    """Floating-point operations of all matrix products in one call; loops count every turn.

    Nothing is computed: the function is traced with `args`, arrays or ShapeDtypeStructs.
    """
    return count.flops(jax.make_jaxpr(function)(*args)).matmul


def peak_flops(devices: list[jax.Device]) -> tuple[float, str]:
    """Peak FLOP/s of all devices together, and where the figure comes from.

    A CPU's is measured: the best of a few float32 products. An unknown device gives 0.
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        # Emulated devices share the one processor.
        return _measured_peak(), "measured, float32 matmul"
    chip = chips.of_device(kind)
    if chip is None:
        return 0.0, f"{kind} unknown"
    return len(devices) * chip.peak["bfloat16"], f"{kind}, bfloat16"


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
