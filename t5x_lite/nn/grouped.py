"""Products of sorted rows with the kernels of their groups, and the way into that order and back.

`jax.lax.ragged_dot` is what JAX keeps for it. The TPU compiler has a kernel for the product and for
its gradient with respect to the rows, but multiplies the kernels' gradient out for every group:
E times the work. So on TPU that one is `tgmm` of MegaBlocks in JAX's Pallas operations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TILE = (512, 1024, 1024)  # rows, inputs, outputs that `tgmm` multiplies at once; 8 MiB of VMEM


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_product(
    platform: str,
    x_MD: Float[Array, "M D"],
    kernels_EDF: Float[Array, "E D F"],
    sizes_E: Int[Array, " E"],
) -> Float[Array, "M F"]:
    """Rows of x times their group's kernel; what comes after the last group is undefined.

    Args:
        platform: "tpu" or another.
        x_MD: rows, sorted by group.
        kernels_EDF: one kernel a group.
        sizes_E: rows of each group, int32.
    """
    del platform
    return jax.lax.ragged_dot(x_MD, kernels_EDF, sizes_E)


def _forward(platform, x_MD, kernels_EDF, sizes_E):
    return grouped_product(platform, x_MD, kernels_EDF, sizes_E), (x_MD, kernels_EDF, sizes_E)


def _backward(platform, residuals, out_MF):
    x_MD, kernels_EDF, sizes_E = residuals
    of_rows = jax.linear_transpose(lambda x: jax.lax.ragged_dot(x, kernels_EDF, sizes_E), x_MD)
    if platform == "tpu":
        kernels = kernel_gradient(x_MD, out_MF, sizes_E)
    else:
        of_kernels = jax.linear_transpose(
            lambda kernels: jax.lax.ragged_dot(x_MD, kernels, sizes_E), kernels_EDF
        )
        (kernels,) = of_kernels(out_MF)
    return *of_rows(out_MF), kernels, _no_gradient(sizes_E)


grouped_product.defvjp(_forward, _backward)


def kernel_gradient(
    x_MD: Float[Array, "M D"],
    out_MF: Float[Array, "M F"],
    sizes_E: Int[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """Each group's xᵀ · out, by the TPU's kernel; `interpret` runs it elsewhere."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, inputs, outputs = *x_MD.shape, out_MF.shape[1]
    tile = min(TILE[0], -(-rows // 16) * 16)
    rest = -rows % tile
    x_MD, out_MF = (jnp.pad(part, ((0, rest), (0, 0))) for part in (x_MD, out_MF))
    tiling = (tile, min(TILE[1], inputs), min(TILE[2], outputs))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return tgmm(x_MD.T, out_MF, sizes_E, x_MD.dtype, tiling, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(
    x_ND: Float[Array, "N D"], order_M: Int[Array, " M"], inverse_M: Int[Array, " M"], picked: int
) -> Float[Array, "M D"]:
    """Each token `picked` times, M = N · picked, in the order given.

    Its gradient, too, is a gather, with `inverse_M`; JAX's own would be a scatter of rows.
    """
    return x_ND.at[order_M // picked].get(mode="promise_in_bounds")


def _spread_forward(x_ND, order_M, inverse_M, picked):
    return spread(x_ND, order_M, inverse_M, picked), (order_M, inverse_M)


def _spread_backward(picked, residuals, out_MD):
    order_M, inverse_M = residuals
    own_MD = out_MD.at[inverse_M].get(mode="promise_in_bounds")
    x_ND = jnp.sum(own_MD.reshape(-1, picked, own_MD.shape[-1]), axis=1)
    return x_ND, _no_gradient(order_M), _no_gradient(inverse_M)


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(
    x_MD: Float[Array, "M D"], order_M: Int[Array, " M"], inverse_M: Int[Array, " M"]
) -> Float[Array, "M D"]:
    """Rows back in the order that they had before; its gradient is a gather as well."""
    del order_M
    return x_MD.at[inverse_M].get(mode="promise_in_bounds")


def _collect_forward(x_MD, order_M, inverse_M):
    return collect(x_MD, order_M, inverse_M), (order_M, inverse_M)


def _collect_backward(residuals, out_MD):
    order_M, inverse_M = residuals
    x_MD = out_MD.at[order_M].get(mode="promise_in_bounds")
    return x_MD, _no_gradient(order_M), _no_gradient(inverse_M)


collect.defvjp(_collect_forward, _collect_backward)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)
