"""Attention without the score matrix, by XLA: a block of queries and one of keys at a time.

Memory grows with T + S and the size of a block, not with T · S. The backward pass computes each
block's scores again (Rabe and Staats 2021; Dao et al. 2022, §3.1). Biases, prefixes, caps and
dropout are what they are in the whole matrix: see `online`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.nn import mapped, online, scores
from t5x_lite.nn.masks import Visibility
from t5x_lite.partitioning import Sharding
from t5x_lite.types import KeyArray

BLOCK = 512  # queries, and keys, whose scores are in memory at one time


def blockwise_attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K h"],
    sees: Visibility,
    bias: scores.Biases = (),
    *,
    scale: float | int,
    soft_cap: float | int | None = None,
    dropout: float | int = 0.0,
    dropout_keys: KeyArray | None = None,
    sharding: Sharding | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T N h"]:
    """As `attend`; a query that sees no key, padding, gets zeros.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        sees: which keys each query sees.
        bias: terms of the logits.
        scale: of q·kᵀ.
        soft_cap: logits become cap · tanh(logits / cap).
        dropout: of the probabilities.
        dropout_keys: one key a row; None: no dropout.
        sharding: the mesh; rows and heads may be split.
        block: how many queries, and keys, have their scores in memory at one time.
    """
    rate = 0.0 if dropout_keys is None else dropout
    plan = _Plan(online.Form(scale, soft_cap, rate), block)
    return mapped.by_device(
        functools.partial(_work, plan), sharding, q_BTNH, k_BSKH, v_BSKH, sees.bare(),
        tuple(part.bare() for part in bias), dropout_keys if rate else None,
    )  # fmt: skip


def _work(plan, q_BTNH, k_BSKH, v_BSKH, context):
    return _attend(
        plan, q_BTNH, k_BSKH, v_BSKH, context.bias, context.sees, context.dropout_keys,
        context.heads_N,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is fixed when the program is compiled."""

    form: online.Form
    block: int

    def cut(self, x: Array) -> Array:
        """[B, T, …] → [blocks, B, size, …]."""
        return online.cut(x, 1, self.block)

    def at(self, length: int) -> online.Run:
        """Where the blocks of a row lie."""
        return online.run(jnp.zeros(1, jnp.int32), length, self.block)

    def padded(self, sees: Visibility) -> Visibility:
        """Long enough for the last block."""
        queries, keys = (
            number * size - length
            for length in (sees.order_q.shape[1], sees.order_k.shape[1])
            for number, size in (online.sizes(length, self.block),)
        )
        return online.padded(sees, queries, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys, heads_N):
    return _forward(plan, q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys, heads_N)[0]


def _forward(plan, q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys, heads_N):
    context = online.Context(plan.padded(sees), bias, dropout_keys, heads_N)
    q, k, v = map(plan.cut, (q_BTNH, k_BSKH, v_BSKH))
    at_q, at_k = plan.at(q_BTNH.shape[1]), plan.at(k_BSKH.shape[1])
    state = online.visit(online.begin(q, v), q, k, v, at_q, at_k, context, plan.form)
    out, log_total = online.finish(state)
    out_BTNH = online.join(out, 1, q_BTNH.shape[1]).astype(v_BSKH.dtype)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, out_BTNH, log_total, context)


def _backward(plan, residuals, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, out_BTNH, log_total, context = residuals
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1)
    q, k, v, dout, delta = map(plan.cut, (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, delta_BTN))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q, k, v, context.bias))
    gradients = online.visit_back(
        zeros, online.backward(q, dout, delta, log_total), k, v, plan.at(q_BTNH.shape[1]),
        plan.at(k_BSKH.shape[1]), context, plan.form,
    )  # fmt: skip
    *blocks, dbias = gradients
    whole = (
        online.join(dx, 1, x.shape[1]).astype(x.dtype)
        for dx, x in zip(blocks, (q_BTNH, k_BSKH, v_BSKH), strict=True)
    )
    return *whole, dbias, None, None, None  # what is seen and dropped has no gradient


_attend.defvjp(_forward, _backward)
