"""Quantised training: matrix products of small integers, by qwix.

A product's inputs are scaled into the integers' range, by token and by output feature, multiplied
and accumulated as integers, and scaled back. Parameters, their gradients and the optimizer stay as
they are; what is evaluated and served is the model without any of this.
"""

import dataclasses
import functools
import re

import jax
from jaxtyping import Array, Float

from t5x_lite.errors import UserError

# Types, and where the largest number of a scale's group goes. qwix puts it half a step beyond the
# largest integer, at the edge where the last bit of a sum decides how it is rounded: then a mesh or
# a layer's layout would change results by whole steps. Here it is the largest integer.
_CALIBRATION = {
    "int8": f"absmax,{127.5 / 127}",
    "int4": f"absmax,{7.5 / 7}",
    "float8_e4m3fn": "absmax",
    "float8_e5m2": "absmax",
}
TYPES = tuple(_CALIBRATION)


@dataclasses.dataclass(frozen=True)
class QuantizedTraining:
    """Which linear maps are quantised while training, and to what.

    Embeddings, the product with the vocabulary, routers, experts and attention's own products are
    never.

    Attributes:
        modules: a regular expression that a linear map's path begins with, such as
            "decoder/layers/ffn/up"; of an unrolled model "decoder/layers_0/ffn/up".
        weights: the type of kernels.
        activations: of what they are multiplied with; None leaves it alone.
        gradients: of what comes back; None computes the backward pass from unquantised inputs.
    """

    modules: str = r"(encoder|decoder)/"
    weights: str = "int8"
    activations: str | None = "int8"
    gradients: str | None = None

    def __post_init__(self):
        for name in ("weights", "activations", "gradients"):
            kind = getattr(self, name)
            if kind not in TYPES and (kind is not None or name == "weights"):
                raise UserError(f"{name}={kind!r} must be one of {', '.join(TYPES)}.")
        try:
            re.compile(self.modules)
        except re.error as error:
            raise UserError(
                f"modules={self.modules!r} is not a regular expression: {error}."
            ) from error

    def chosen(self, path: tuple[str, ...]) -> bool:
        """Whether the linear map of this path is quantised."""
        return re.match(self.modules, "/".join(path)) is not None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply(
    config: QuantizedTraining, count: int, x: Float[Array, "..."], kernel: Float[Array, "..."]
) -> Float[Array, "..."]:
    """x · kernel over the last `count` axes of x and the first of the kernel, quantised.

    The gradient is the product's own, as if rounding had slope one (Bengio et al. 2013, §4).

    Raises:
        UserError: qwix isn't installed.
    """
    last = tuple(range(x.ndim - count, x.ndim))
    return _product(x, kernel, last, tuple(range(count)), config.activations, config.weights)


def _forward(config, count, x, kernel):
    return multiply(config, count, x, kernel), (x, kernel)


def _backward(config, count, residuals, d):
    x, kernel = residuals
    tokens = x.ndim - count
    d_axes, kernel_axes = tuple(range(tokens, d.ndim)), tuple(range(count, kernel.ndim))
    kinds = (None, None)
    if config.gradients is not None:
        kinds = config.gradients, config.weights
    d_x = _product(d, kernel, d_axes, kernel_axes, *kinds)
    if config.gradients is not None:
        kinds = config.activations, config.gradients
    rows = tuple(range(tokens))
    d_kernel = _product(x, d, rows, rows, *kinds)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


multiply.defvjp(_forward, _backward)


def _product(lhs, rhs, lhs_axes, rhs_axes, lhs_kind, rhs_kind):
    """Contracts two arrays, each with a scale of its own for every index of its other axes."""
    # qwix relies on implicit promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pairs = (lhs, lhs_axes, lhs_kind), (rhs, rhs_axes, rhs_kind)
        inputs = [x if kind is None else _quantize(x, axes, kind) for x, axes, kind in pairs]
        return _qwix().dot_general(*inputs, ((lhs_axes, rhs_axes), ((), ())))


def _quantize(x: Array, axes: tuple[int, ...], kind: str):
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    return _qwix().quantize(x, kind, channelwise_axes=others, calibration_method=_CALIBRATION[kind])


def _qwix():
    try:
        import qwix
    except ImportError as error:
        raise UserError("quantised training needs qwix: pip install 't5x_lite[tune]'.") from error
    return qwix
