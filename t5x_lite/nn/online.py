"""Attention without the score matrix: the softmax over blocks of keys as they come, its gradient.

Milakov and Gimelshein 2018 (§3, the online softmax); Rabe and Staats 2021 (attention in O(√n)
memory); Dao et al. 2022 (FlashAttention, §3.1: the backward pass computes the blocks again).

A row's queries and keys are runs of blocks, each a stretch of slots. One device's run is whatever
it holds; `ring` brings other devices' keys along, one run after the other.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from t5x_lite.nn import scores
from t5x_lite.nn.masks import HIDDEN, Visibility


@dataclasses.dataclass(frozen=True)
class Form:
    """What of attention is fixed when the program is compiled."""

    scale: float | int
    soft_cap: float | int | None = None
    dropout: float | int = 0.0


@flax.struct.dataclass
class Context:
    """What every pair of blocks reads besides queries, keys and values.

    The visibility is the whole row's, lengthened by `padded` for a last block that isn't full.
    """

    sees: Any  # Visibility
    bias: Any = None
    dropout_keys: Any = None  # [B]
    heads_N: Any = None  # the numbers of the heads in the whole model


@flax.struct.dataclass
class Run:
    """Where blocks of one size lie: from slot first[i] on, of which count[i] tokens are real."""

    first: Any  # int32 [blocks]
    count: Any = None  # int32 [blocks]; None: all


@flax.struct.dataclass
class State:
    """What is known of each query's softmax so far; every leaf [blocks, …], float32."""

    out: Any  # [B, K, G, T, h]: Σ exp(logit - high) · v
    high: Any  # [B, K, G, T]: the largest logit
    total: Any  # [B, K, G, T]: Σ exp(logit - high)


def sizes(length: int, block: int) -> tuple[int, int]:
    """(number, size) of the fewest blocks, none larger than `block`, that hold `length` slots."""
    number = -(-length // block)
    return number, -(-length // number)


def run(first: Array, length: int, block: int) -> Run:
    """The blocks of pieces of `length` slots that begin at `first` [pieces]."""
    number, size = sizes(length, block)
    offset = size * jnp.arange(number, dtype=jnp.int32)
    count = jnp.minimum(size, length - offset)
    places = first[:, None] + offset[None, :]
    return Run(places.reshape(-1), jnp.broadcast_to(count[None], places.shape).reshape(-1))


def cut(x: Array, pieces: int, block: int) -> Array:
    """[B, T, …] → [blocks, B, size, …]; the last block of each piece is padded with zeros."""
    batch, length = x.shape[0], x.shape[1] // pieces
    number, size = sizes(length, block)
    x = x.reshape(batch, pieces, length, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, number * size - length), *[(0, 0)] * (x.ndim - 3)])
    return jnp.moveaxis(x.reshape(batch, pieces * number, size, *x.shape[3:]), 1, 0)


def join(x: Array, pieces: int, length: int) -> Array:
    """The inverse of `cut`, for an array that is [B, T = `length`, …] afterwards."""
    x = jnp.moveaxis(x, 0, 1)
    x = x.reshape(x.shape[0], pieces, -1, *x.shape[3:])[:, :, : length // pieces]
    return x.reshape(x.shape[0], length, *x.shape[3:])


def padded(sees: Visibility, queries: int, keys: int) -> Visibility:
    """`sees` with so many slots more, which nothing reads, so that slices don't run over the end.

    `lax.dynamic_slice` would move a slice that does back, without a word.
    """

    def more(name, leaf):
        extra = queries if name.endswith("_q") else keys
        return jnp.pad(leaf, ((0, 0), (0, extra)))

    arrays = {name: getattr(sees, name) for name in _ARRAYS}
    return sees.replace(**{n: more(n, leaf) for n, leaf in arrays.items() if leaf is not None})


_ARRAYS = tuple(f"{name}_{side}" for name in ("order", "segments", "prefix") for side in "qk")


def undivided(forward: Callable) -> Callable:
    """The forward pass of a custom gradient as one piece, also in loops over layers.

    Before `lax.scan` is differentiated, JAX moves out of it what is the same in all turns, and
    stores that: here the masks of all blocks and the zeros that `where` puts in their places, each
    as large as the score matrix. A checkpoint is left as it is. Nothing is computed twice because
    of it: the gradient is a function of its own.
    """
    return jax.checkpoint(forward, prevent_cse=False)


def begin(q: Array, v: Array) -> State:
    """Nothing seen yet, for queries [blocks, B, T, N, H] and values [blocks, B, S, K, h]."""
    blocks, batch, length, heads, _ = q.shape
    return nothing((blocks, batch, v.shape[3], heads // v.shape[3], length), v.shape[4])


def nothing(shape: tuple[int, ...], size: int) -> State:
    """The state of queries [..., B, K, G, T] that have seen no key yet; values are of `size`."""
    return State(
        out=jnp.zeros((*shape, size), jnp.float32),
        high=jnp.full(shape, HIDDEN, jnp.float32),
        total=jnp.zeros(shape, jnp.float32),
    )


def visit(
    state: State, q: Array, k: Array, v: Array, at_q: Run, at_k: Run, context: Context, form: Form
) -> State:
    """Lets every query block look at every key block of a run; pairs that see nothing are skipped.

    Args:
        state: of the queries so far.
        q: [blocks, B, T, N, H].
        k: [blocks, B, S, K, H].
        v: [blocks, B, S, K, h].
        at_q: where the query blocks lie.
        at_k: where the key blocks lie.
        context: what all pairs read.
        form: scale, cap and dropout.
    """

    @undivided
    def look(state, q, k, v, at_q, at_k, context):
        def of_query(_, query):
            return None, _look(*query, (k, v, at_k), context, form)

        return jax.lax.scan(of_query, None, (state, q, at_q))[1]

    return look(state, q, k, v, at_q, at_k, context)


def _look(state, q_BTNH, here, keys, context, form):
    """One query block's state after all key blocks of a run."""
    heads = keys[0].shape[3]
    meet = meeting(scores.by_head(q_BTNH, heads), here, context, form)

    def of_key(state, key):
        k_BSKH, v_BSKh, there = key
        k_BKSH, v_BKSh = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKh, 1, 2)
        pair = meet(k_BKSH, there)
        return jax.lax.cond(pair.met, pair.absorb, lambda s, *_: s, state, v_BKSh), None

    return jax.lax.scan(of_key, state, keys)[0]


def finish(state: State) -> tuple[Array, Array]:
    """(outputs [blocks, B, T, N, h] float32, log of the sum of exponentials [blocks, B, K, G, T]).

    A query that saw nothing (padding) gets zeros.
    """
    total = jnp.where(state.total > 0, state.total, 1.0)
    return flat(state.out / total[..., None]), state.high + jnp.log(total)


def flat(x: Array) -> Array:
    """[…, K, G, T, h] → […, T, N, h]; the inverse of `scores.by_head`."""
    x = jnp.moveaxis(x, -2, -4)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


@flax.struct.dataclass
class Backward:
    """What a query block brings to the backward pass; every leaf [blocks, …]."""

    q: Any  # [B, K, G, T, H]
    dout: Any  # [B, K, G, T, h], of the outputs' dtype
    log_total: Any  # [B, K, G, T]: `finish`'s
    delta: Any  # [B, K, G, T]: Σ dout · out, which is Σ probability · its gradient


def backward(q: Array, dout: Array, delta: Array, log_total: Array) -> Backward:
    """Of query blocks, `delta` being Σ dout · out of each; arrays […, B, T, N, H or h or none]."""
    heads = log_total.shape[-3]
    delta = scores.by_head(delta[..., None], heads)[..., 0]
    return Backward(scores.by_head(q, heads), scores.by_head(dout, heads), log_total, delta)


def visit_back(
    grads: tuple[Array, Array, Array, Any], query: Backward, k: Array, v: Array, at_q: Run,
    at_k: Run, context: Context, form: Form,
) -> tuple[Array, Array, Array, Any]:  # fmt: skip
    """Adds a run's part to the gradients (q, k, v, bias), all float32; the others as in `visit`."""
    dq, dk, dv, dbias = grads

    def of_query(carry, query):
        dk, dv, dbias = carry
        query, dq_BTNH, here = query
        meet = meeting(query.q, here, context, form)

        def of_key(carry, key):
            k_BSKH, v_BSKh, there, *own = key
            k_BKSH, v_BKSh = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKh, 1, 2)
            pair = meet(k_BKSH, there)

            def add(dq_BTNH, dbias, dk_BSKH, dv_BSKh):
                dq, found_bias, *dkv = pair.pull(query, v_BKSh)
                dkv = (jnp.swapaxes(x, 1, 2) for x in dkv)
                return jax.tree.map(
                    jnp.add, (dq_BTNH, dbias, dk_BSKH, dv_BSKh), (flat(dq), found_bias, *dkv)
                )

            dq_BTNH, dbias, *own = jax.lax.cond(pair.met, add, lambda *same: same, *carry, *own)
            return (dq_BTNH, dbias), tuple(own)

        (dq_BTNH, dbias), (dk, dv) = jax.lax.scan(of_key, (dq_BTNH, dbias), (k, v, at_k, dk, dv))
        return (dk, dv, dbias), dq_BTNH

    (dk, dv, dbias), dq = jax.lax.scan(of_query, (dk, dv, dbias), (query, dq, at_q))
    return dq, dk, dv, dbias


@flax.struct.dataclass
class Pair:
    """A block of queries and a block of keys."""

    q_BKGTH: Any
    k_BKSH: Any
    sees: Any
    slots_S: Any  # the keys' places in the row
    real_S: Any  # bool: not the padding of an odd block; None: there is none
    words_BNT2: Any  # what the queries' dropout draws from; None: none
    bias: Any
    form: Form = flax.struct.field(pytree_node=False)

    @property
    def met(self) -> Bool[Array, ""]:
        """False only where no query of the block sees a key of the other."""
        return may_see(self.sees)

    def absorb(self, state: State, v_BKSh: Array) -> State:
        """What the queries know after these keys too; arrays without the axis of blocks."""
        logits, mask = self._logits(), self._mask()
        high = jnp.maximum(state.high, jnp.max(logits, axis=-1, where=mask, initial=HIDDEN))
        probs = _where(mask, jnp.exp(logits - high[..., None]))
        fade = jnp.exp(state.high - high)
        kept = self._dropout(probs).astype(v_BKSh.dtype)
        seen = jnp.einsum("BKGTS,BKSh->BKGTh", kept, v_BKSh, preferred_element_type=jnp.float32)
        total = state.total * fade + jnp.sum(probs, axis=-1)
        return State(state.out * fade[..., None] + seen, high, total)

    def pull(self, query: Backward, v_BKSh: Array) -> tuple[Array, Any, Array, Array]:
        """Gradients of (q, bias, k, v), float32; arrays have their axes as those."""
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        q_BKGTH, form = self.q_BKGTH * self.form.scale, self.form

        def adjusted(product, bias):
            return scores.adjusted(product, self.sees, bias, form.soft_cap)

        # Soft cap and bias need no formulas of their own: JAX differentiates them.
        products = product("BKGTH,BKSH->BKGTS", q_BKGTH, self.k_BKSH)
        logits, back = jax.vjp(adjusted, products, self.bias)
        probs = _where(self._mask(), jnp.exp(logits - query.log_total[..., None]))
        kept = self._dropout(probs).astype(query.dout.dtype)
        # The smaller factor first, here and below: the other would be transposed.
        dv_BKhS = product("BKGTh,BKGTS->BKhS", query.dout, kept)
        dprobs = self._dropout(product("BKGTh,BKSh->BKGTS", query.dout, v_BKSh))
        dproducts, dbias = back(probs * (dprobs - query.delta[..., None]))
        dproducts = dproducts.astype(q_BKGTH.dtype)
        dq = product("BKGTS,BKSH->BKGTH", dproducts, self.k_BKSH) * form.scale
        dk_BKHS = product("BKGTH,BKGTS->BKHS", q_BKGTH, dproducts)
        return dq, dbias, jnp.swapaxes(dk_BKHS, 2, 3), jnp.swapaxes(dv_BKhS, 2, 3)

    def _logits(self) -> Float[Array, "B K G T S"]:
        form = self.form
        return scores.logits(
            self.q_BKGTH, self.k_BKSH, self.sees, self.bias, form.scale, form.soft_cap
        )

    def _mask(self) -> Bool[Array, "_ 1 1 _ S"] | None:
        parts = [] if self.real_S is None else [self.real_S[None, None, :]]
        if (mask := self.sees.mask()) is not None:
            parts.append(mask)
        return functools.reduce(operator.and_, parts)[:, None, None] if parts else None

    def _dropout(self, x_BKGTS: Array) -> Array:
        if self.words_BNT2 is None:
            return x_BKGTS
        return scores.dropped(x_BKGTS, self.words_BNT2, self.slots_S, self.form.dropout)


def _where(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0.0)


def meeting(q_BKGTH: Array, here: Run, context: Context, form: Form) -> Callable[..., Pair]:
    """A function that pairs a block of queries with the keys of another, and where those lie."""
    queries = q_BKGTH.shape[3]
    sees, words_BNT2 = context.sees.queries(here.first, queries), None
    if form.dropout:
        slots_T = here.first + jnp.arange(queries, dtype=jnp.int32)
        words_BNT2 = scores.query_keys(context.dropout_keys, context.heads_N, slots_T)

    def meet(k_BKSH: Array, there: Run) -> Pair:
        place_S = jnp.arange(k_BKSH.shape[2], dtype=jnp.int32)
        return Pair(
            q_BKGTH, k_BKSH, sees.keys(there.first, k_BKSH.shape[2]), there.first + place_S,
            None if there.count is None else place_S < there.count, words_BNT2, context.bias, form,
        )  # fmt: skip

    return meet


def may_see(sees: Visibility) -> Bool[Array, ""]:
    """Whether a query may see a key; False is certain, True isn't.

    Told from the least and the largest order and segment on each side, without the [T, S] mask.
    """
    least_q, most_q = jnp.min(sees.order_q), jnp.max(sees.order_q)
    least_k, most_k = jnp.min(sees.order_k), jnp.max(sees.order_k)
    met = jnp.asarray(True)
    if sees.causal:
        met = least_k <= most_q
        if sees.prefix_q is not None:
            met |= jnp.any(sees.prefix_q > 0) & jnp.any(sees.prefix_k > 0)
    if sees.window is not None:
        met &= (least_q - most_k < sees.window) & (least_k - most_q < sees.window)
    if sees.segments_q is not None:
        met &= jnp.any(_overlap(sees.segments_q, sees.segments_k))
    return met


def _overlap(segments_q: Array, segments_k: Array) -> Bool[Array, " B"]:
    """Whether a row's queries and keys have segments in one range; 0 is padding."""
    most_q, most_k = jnp.max(segments_q, axis=1), jnp.max(segments_k, axis=1)
    least_q, least_k = (
        jnp.min(jnp.where(side > 0, side, jnp.iinfo(side.dtype).max), axis=1)
        for side in (segments_q, segments_k)
    )
    return (least_q <= most_k) & (least_k <= most_q)
