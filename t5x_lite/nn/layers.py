"""What every module is made of: initialisers, the linear map, norms, dropout."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.errors import UserError
from t5x_lite.nn.quantized import QuantizedTraining, multiply
from t5x_lite.partitioning import Sharding
from t5x_lite.types import KeyArray

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def require_activation(name: str) -> None:
    """Raises `UserError` for a name that `ACTIVATIONS` lacks."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; there are {', '.join(ACTIVATIONS)}.")


def require_rate(name: str, rate: float | int) -> None:
    """Raises `UserError` for a dropout rate that would drop everything, or less than nothing."""
    if not 0 <= rate < 1:
        raise UserError(f"{name}={rate} must lie in [0, 1); 0 turns it off.")


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Kernels from a truncated normal with variance gain / fan-in (T5)."""

    gain: float | int = 1.0

    def stddev(self, fan_in: int) -> float:
        """Standard deviation of a kernel that sums over `fan_in` inputs."""
        return math.sqrt(self.gain / fan_in)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Kernels from a truncated normal of one standard deviation, whatever their size."""

    standard_deviation: float | int = 0.02
    # GPT-2 (Radford et al. 2019, §2.3) shrinks what is added to the residual stream by
    # 1/sqrt(number of additions), so that its variance doesn't grow with depth.
    depth_scaled: bool = False

    def stddev(self, fan_in: int) -> float:
        """The same for every `fan_in`."""
        del fan_in
        return self.standard_deviation


Initializer = FanIn | Normal


@dataclasses.dataclass(frozen=True)
class TruncatedNormal:
    """A normal cut at two sigma, rescaled so that `stddev` is what the samples have."""

    stddev: float | int

    def __call__(self, key: KeyArray, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        """Draws an array."""
        draw = nn.initializers.truncated_normal(self.stddev / 0.87962566103423978)
        return draw(key, shape, dtype)


def truncated_normal(stddev: float | int) -> TruncatedNormal:
    """An initialiser that remembers its standard deviation."""
    return TruncatedNormal(stddev)


@dataclasses.dataclass(frozen=True)
class Common:
    """What all modules of a model share."""

    dtype: str
    init: Initializer
    residual_gain: float = 1.0
    sharding: Sharding | None = None
    attention_kernel: str = "auto"
    platform: str | None = None  # what the program is compiled for; None: for `sharding`'s devices
    quantized: QuantizedTraining | None = None


class Declared(nn.LogicallyPartitioned):
    """A parameter with its axes' names, those that a product sums over, and its initial spread."""

    summed: tuple[str, ...] = flax.struct.field(default=(), pytree_node=False)
    # None: it begins with a constant.
    stddev: float | int | None = flax.struct.field(default=None, pytree_node=False)


def param(
    module: nn.Module,
    name: str,
    init,
    names: Sequence[str],
    shape: Sequence[int],
    summed: Sequence[str] = (),
) -> Array:
    """Declares a float32 parameter together with the logical names of its axes.

    `summed` are those that a product with it sums over: none of a table of rows, nor of a vector.
    """
    names, summed, stddev = tuple(names), tuple(summed), getattr(init, "stddev", None)

    def boxed(key, shape, dtype):
        return Declared(init(key, shape, dtype), names, summed=summed, stddev=stddev)

    return module.param(name, boxed, tuple(shape), jnp.float32)


class Linear(nn.Module):
    """x · kernel (+ bias), over the last len(in_axes) axes of x."""

    features: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    bias: bool
    common: Common
    init_gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., *inputs] to [..., *features], in the compute dtype."""
        count = len(self.in_axes)
        inputs = x.shape[-count:]
        stddev = self.init_gain * self.common.init.stddev(math.prod(inputs))
        shape, names = (*inputs, *self.features), (*self.in_axes, *self.out_axes)
        kernel = param(self, "kernel", truncated_normal(stddev), names, shape, self.in_axes)
        dtype = self.common.dtype
        x, kernel, quantized = x.astype(dtype), kernel.astype(dtype), self.common.quantized
        if quantized is not None and quantized.chosen(self.path):
            y = multiply(quantized, count, x, kernel)
        else:
            y = jnp.tensordot(x, kernel, axes=count)
        if self.bias:
            bias = param(self, "bias", nn.initializers.zeros, self.out_axes, self.features)
            y = y + jnp.expand_dims(bias.astype(dtype), range(y.ndim - bias.ndim))
        return y


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) · scale (Zhang and Sennrich 2019)."""

    epsilon: float | int = 1e-6

    def build(self, common: Common, name: str) -> nn.Module:
        """The module that does it."""
        return _Norm(self.epsilon, common, name=name)


@dataclasses.dataclass(frozen=True)
class OffsetRMSNorm:
    """x / rms(x) · (1 + scale), so that weight decay pulls towards no scaling (Gemma)."""

    epsilon: float | int = 1e-6

    def build(self, common: Common, name: str) -> nn.Module:
        """The module that does it."""
        return _Norm(self.epsilon, common, offset=1.0, name=name)


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / standard deviation · scale + bias (Ba et al. 2016)."""

    epsilon: float | int = 1e-5

    def build(self, common: Common, name: str) -> nn.Module:
        """The module that does it."""
        return _Norm(self.epsilon, common, center=True, bias=True, name=name)


@dataclasses.dataclass(frozen=True)
class UnbiasedLayerNorm:
    """(x - mean) / standard deviation · scale (ModernBERT)."""

    epsilon: float | int = 1e-5

    def build(self, common: Common, name: str) -> nn.Module:
        """The module that does it."""
        return _Norm(self.epsilon, common, center=True, name=name)


@dataclasses.dataclass(frozen=True)
class NoNorm:
    """x · scale + bias, no statistics (MobileBERT: Sun et al. 2020, §4.2)."""

    def build(self, common: Common, name: str) -> nn.Module:
        """The module that does it."""
        return _Norm(None, common, bias=True, name=name)


@dataclasses.dataclass(frozen=True)
class Identity:
    """x, without any parameter: where a layer leaves out its norm."""

    def build(self, common: Common, name: str) -> Callable[[Array], Array]:
        """A function in a module's place."""
        del common, name
        return lambda x: x


NormConfig = RMSNorm | OffsetRMSNorm | LayerNorm | UnbiasedLayerNorm | NoNorm | Identity


class _Norm(nn.Module):
    epsilon: float | None  # None: no division by the root of the mean square
    common: Common
    center: bool = False
    bias: bool = False
    offset: float = 0.0  # what is added to the scale

    @nn.compact
    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        """Statistics in float32, the result in the compute dtype."""
        shape, axes = (x.shape[-1],), range(x.ndim - 1)
        y = x.astype(jnp.float32)
        if self.center:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        if self.epsilon is not None:
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        init = nn.initializers.constant(1.0 - self.offset)
        scale = param(self, "scale", init, ("norm",), shape)
        y = y * jnp.expand_dims(scale + self.offset if self.offset else scale, axes)
        if self.bias:
            bias = param(self, "bias", nn.initializers.zeros, ("norm",), shape)
            y = y + jnp.expand_dims(bias, axes)
        return y.astype(self.common.dtype)


def fold_in(keys_B: KeyArray | None, data: int | Array) -> KeyArray | None:
    """Folds `data` (a layer, a site) into every row's dropout key; no keys, no dropout."""
    if keys_B is None:
        return None
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, data)


def dropout(x: Float[Array, "B ..."], rate: float | int, keys_B: KeyArray | None) -> Array:
    """Zeroes a share `rate` of `x` and scales the rest by 1 / (1 - rate); without keys, nothing.

    Each row draws from a key of its own, so that a row's mask depends neither on the microbatch nor
    on the device that it falls into.
    """
    if keys_B is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))
