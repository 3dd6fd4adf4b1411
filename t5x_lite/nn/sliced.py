"""Attention by slices of queries, each with all the keys that it may see: for CPUs.

The slices stand in the program one after the other, so that each has a fixed number of keys: of a
causal row's score matrix little more than the lower half is computed, without a loop's cost a pair
of blocks. As in `blockwise`, the backward pass computes the scores again (Dao et al. 2022, §3.1),
of which a CPU writes and reads no less than the products themselves take.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.nn import mapped, online, scores
from t5x_lite.nn.masks import Visibility
from t5x_lite.partitioning import Sharding
from t5x_lite.types import KeyArray

SMALLEST, MOST = 128, 8  # queries of a slice; slices of a row, each of which has to be compiled


def sliced_attend(
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
    size: int | None = None,
) -> Float[Array, "B T N h"]:
    """As `attend`; `sees` must be `slotted`. A query that sees no key, padding, gets zeros.

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
        size: queries of a slice; None: `SMALLEST`, or what makes `MOST` slices of a row.
    """
    rate = 0.0 if dropout_keys is None else dropout
    size = size or max(SMALLEST, -(-q_BTNH.shape[1] // MOST))
    plan = _Plan(online.Form(scale, soft_cap, rate), size)
    return mapped.by_device(
        functools.partial(_attend, plan), sharding, q_BTNH, k_BSKH, v_BSKH, sees.bare(),
        tuple(part.bare() for part in bias), dropout_keys if rate else None,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is fixed when the program is compiled."""

    form: online.Form
    size: int

    def slices(self, sees: Visibility) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys between the first and the last that they may see."""
        length, slots = sees.order_q.shape[1], sees.order_k.shape[1]
        for start in range(0, length, self.size):
            end = min(start + self.size, length)
            first, last = 0, slots
            if sees.causal and sees.prefix_q is None:
                last = min(end, slots)
            if sees.window is not None:
                first = max(0, start - sees.window + 1)
                last = min(last, end + sees.window - 1)
            # A slice beyond the last key sees none; one hidden key stands for them.
            first = min(first, slots - 1)
            yield slice(start, end), slice(first, max(last, first + 1))

    def pair(self, queries: slice, keys: slice, q_BKGTH, k_BKSH, context) -> online.Pair:
        """A slice of queries with its keys."""
        here, there = (online.Run(jnp.int32(part.start)) for part in (queries, keys))
        meet = online.meeting(q_BKGTH[:, :, :, queries], here, context, self.form)
        return meet(k_BKSH[:, :, keys], there)


def _attend(plan, q_BTNH, k_BSKH, v_BSKH, context):
    rest = context.sees, context.dropout_keys, context.heads_N
    return _computed(plan, q_BTNH, k_BSKH, v_BSKH, context.bias, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _computed(plan, q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys, heads_N):
    return _forward(plan, q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys, heads_N)[0]


def _forward(plan, q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys, heads_N):
    @online.undivided
    def look(q_BTNH, k_BSKH, v_BSKH, context):
        # Each row's queries, keys and values are put in order once, not slice by slice.
        q_BKGTH = scores.by_head(q_BTNH, k_BSKH.shape[2])
        k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
        outs, logs = [], []
        for queries, keys in plan.slices(context.sees):
            pair = plan.pair(queries, keys, q_BKGTH, k_BKSH, context)
            start = online.nothing(pair.q_BKGTH.shape[:4], v_BKSH.shape[3])
            out, log_total = online.finish(pair.absorb(start, v_BKSH[:, :, keys]))
            outs.append(out), logs.append(log_total)
        return jnp.concatenate(outs, axis=1).astype(v_BSKH.dtype), tuple(logs)

    context = online.Context(sees, bias, dropout_keys, heads_N)
    out_BTNH, logs = look(q_BTNH, k_BSKH, v_BSKH, context)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, out_BTNH, logs, context)


def _backward(plan, residuals, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, out_BTNH, logs, context = residuals
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1)
    whole = online.backward(q_BTNH, dout_BTNH, delta_BTN, jnp.concatenate(logs, axis=3))
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    dqs, totals = [], jax.tree.map(_zeros, (context.bias, k_BKSH, v_BKSH))
    for queries, keys in plan.slices(context.sees):
        query = jax.tree.map(lambda x, queries=queries: x[:, :, :, queries], whole)
        pair = plan.pair(queries, keys, whole.q, k_BKSH, context)
        dq_BKGTH, *found = pair.pull(query, v_BKSH[:, :, keys])
        dqs.append(dq_BKGTH)
        all_bias, *sums = totals
        dbias, *parts = found
        sums = (x.at[:, :, keys].add(part) for x, part in zip(sums, parts, strict=True))
        totals = (jax.tree.map(jnp.add, all_bias, dbias), *sums)
    dbias, dk_BKSH, dv_BKSH = totals
    return (
        online.flat(jnp.concatenate(dqs, axis=3)).astype(q_BTNH.dtype),
        jnp.swapaxes(dk_BKSH, 1, 2).astype(k_BSKH.dtype),
        jnp.swapaxes(dv_BKSH, 1, 2).astype(v_BSKH.dtype),
        dbias, None, None, None,
    )  # fmt: skip


def _zeros(x: Array) -> Array:
    return jnp.zeros(x.shape, jnp.float32)


_computed.defvjp(_forward, _backward)
