"""What a softmax over the vocabulary says of each target, without ever storing [B, T, V] logits.

Tokens and vocabulary are cut into chunks whose float32 logits fit a budget. A sum of exponentials
is carried from chunk to chunk beside the largest logit so far (Milakov and Gimelshein 2018,
algorithm 3), and the backward pass computes each chunk's logits again. On a mesh every device does
so for its own rows, its part of the sequence and its part of the vocabulary; what is then reduced
over the vocabulary's parts is four numbers a token.

A loss that is a sum over tokens needs no second computation: `total` makes its gradients together
with it, a chunk of tokens at a time, and the backward pass only scales them.

Axis letters besides those of types.py: M tokens of one device, m and v of a chunk, C chunks.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from t5x_lite.errors import UserError
from t5x_lite.partitioning import Sharding
from t5x_lite.types import PyTree, Unembedding

NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # the logit of what isn't in the vocabulary

# Bytes of one chunk's logits on one device: an eighth of all, or those of `FEWEST_TOKENS`, within
# these bounds. Below the lower one a loop costs more than the memory is worth.
SMALLEST_CHUNK, LARGEST_CHUNK = 1 << 20, 64 << 20
# Each chunk of tokens reads the whole kernel and adds to a gradient of its size. With fewer tokens
# than these, an accelerator's memory would be slower than its matrix unit; the vocabulary is cut
# instead.
FEWEST_TOKENS = 512


@flax.struct.dataclass
class Scores:
    """What the softmax over the vocabulary says of each target; float32 [B, T]."""

    target: Any  # its logit
    log_z: Any  # log of the sum of exponentials
    highest: Any  # the largest logit; for metrics: no gradient passes through it
    mean: Any  # the mean logit


def score(
    hidden_BTD: Float[Array, "B T D"],
    head: Unembedding,
    targets_BT: Int[Array, "B T"],
    chunk_bytes: int | None = None,
) -> Scores:
    """Each target's logit and what normalises it.

    Args:
        hidden_BTD: what the head leaves.
        head: the product with the vocabulary, and the mesh that it lies on.
        targets_BT: ids; one outside the vocabulary has logit 0.
        chunk_bytes: of one chunk's logits on one device; None: an eighth of all of them, or those
            of `FEWEST_TOKENS`, but at least `SMALLEST_CHUNK` and at most `LARGEST_CHUNK`.

    Raises:
        UserError: no room for one logit; rows, length or vocabulary that the mesh doesn't divide.
    """
    plan = _plan(hidden_BTD, head, chunk_bytes)
    return _score(plan, hidden_BTD, _Words(head.kernel_VD, head.bias_V), targets_BT)


def total(
    hidden_BTD: Float[Array, "B T D"],
    head: Unembedding,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    each: Callable[[Scores, Array], Array],
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, ""], Scores]:
    """The sum over all tokens of a function of each one's scores; and the scores.

    No gradient passes through the scores, nor to the weights.

    Args:
        hidden_BTD: what the head leaves.
        head: the product with the vocabulary, and the mesh that it lies on.
        targets_BT: ids.
        weights_BT: what `each` is given beside the scores.
        each: elementwise, `each(scores, weights)`; hashable.
        chunk_bytes: as of `score`.

    Raises:
        UserError: as `score`.
    """
    plan = _plan(hidden_BTD, head, chunk_bytes)
    words = _Words(head.kernel_VD, head.bias_V)
    value, scores = _total(plan, each, hidden_BTD, words, targets_BT, weights_BT)
    return value, jax.lax.stop_gradient(scores)


class _Words(NamedTuple):
    """The vocabulary, [V, D] and [V]; cut into chunks, [C, v, D] and [C, v]."""

    kernel: Any
    bias: Any  # or None


# --- layout over the mesh


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The mesh axes over which logical axes are split; `embed` by those of the tokens, or not."""

    sharding: Sharding
    batch: tuple[str, ...]
    length: tuple[str, ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]

    def run(self, function: Callable, arrays: Sequence[PyTree], outputs: str) -> PyTree:
        """`function` of each device's own part of (hidden, words, arrays [B, T] …).

        `outputs` names what it returns: "tokens", arrays [B, T]; "gradients" of the first two; or
        "both", a pair.
        """
        tokens = PartitionSpec(self.batch, self.length)
        first = (
            PartitionSpec(self.batch, self.length, None),
            _Words(PartitionSpec(self.vocab, self.embed), PartitionSpec(self.vocab)),
        )
        split = jax.shard_map(
            function,
            mesh=self.sharding.mesh,
            in_specs=(*first, *(tokens for _ in arrays[2:])),
            out_specs={"tokens": tokens, "gradients": first, "both": (tokens, first)}[outputs],
            check_vma=False,
        )
        return split(*arrays)


def _layout(
    sharding: Sharding | None, hidden: tuple[int, ...], kernel: tuple[int, ...]
) -> _Layout | None:
    if sharding is None or sharding.mesh.size == 1:
        return None

    sharding.spec(("batch", "length", None), hidden)  # refuses sizes that don't divide
    sharding.spec(("vocab", None), kernel)

    def axes(name):
        return tuple(axis for axis in sharding.axes(name) if sharding.mesh.shape[axis] > 1)

    batch, length = axes("batch"), axes("length")
    tokens = {*batch, *length}
    # Devices with different tokens need the same words: what is split over them is gathered.
    vocab = tuple(axis for axis in axes("vocab") if axis not in tokens)
    # But each may keep columns of its own of the kernel and of its gradient.
    embed = axes("embed")
    fits = set(embed) <= tokens and kernel[1] % sharding.parts("embed") == 0
    return _Layout(sharding, batch, length, vocab, embed if fits else ())


# --- chunks


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known before the arrays are."""

    vocab_size: int
    soft_cap: float | int | None
    chunk_bytes: int | None
    layout: _Layout | None

    def run(self, function: Callable, arrays: Sequence[PyTree], outputs: str) -> PyTree:
        """`function(plan, …)` on every device's own arrays."""
        local = functools.partial(function, self)
        return local(*arrays) if self.layout is None else self.layout.run(local, arrays, outputs)

    def gathered(self, words: _Words) -> _Words:
        """All columns of this device's rows of the kernel."""
        if self.layout is None or not self.layout.embed:
            return words
        whole = jax.lax.all_gather(words.kernel, self.layout.embed, axis=1, tiled=True)
        return words._replace(kernel=whole)

    def over_vocabulary(self, reduce: Callable, values: PyTree) -> PyTree:
        """`reduce` (a psum or pmax) over the devices that share the vocabulary."""
        if self.layout is None or not self.layout.vocab:
            return values
        return reduce(values, self.layout.vocab)

    def over_tokens(self, words: _Words) -> _Words:
        """Sums gradients of the vocabulary over all tokens; each device keeps its own columns."""
        if self.layout is None:
            return words
        own, rest = self.layout.embed, (*self.layout.batch, *self.layout.length)
        kernel = words.kernel
        if own:
            kernel = jax.lax.psum_scatter(kernel, own, scatter_dimension=1, tiled=True)
            # Else the TPU's compiler sums all columns and keeps them until the optimizer's step.
            kernel = jax.lax.optimization_barrier(kernel)
        others = tuple(axis for axis in rest if axis not in own)
        return _Words(_psum(kernel, others), _psum(words.bias, rest))

    def ids(self, rows: int) -> Int[Array, " V"]:
        """The ids of this device's rows of the kernel."""
        start = 0
        if self.layout is not None and self.layout.vocab:
            start = rows * jax.lax.axis_index(self.layout.vocab)
        return start + jnp.arange(rows, dtype=jnp.int32)

    def cuts(self, tokens: int, rows: int) -> tuple[int, int]:
        """How many chunks of tokens, and of the vocabulary's rows, one device works through."""
        size = self.chunk_bytes
        if size is None:
            # Room for the whole vocabulary saves `total` a second computation of the logits.
            whole = min(tokens, FEWEST_TOKENS) * rows * 4
            least = whole if whole <= LARGEST_CHUNK else SMALLEST_CHUNK
            size = min(max(tokens * rows * 4 // 8, least, SMALLEST_CHUNK), LARGEST_CHUNK)
        room = max(size // 4, 1)
        together = max(room // rows, min(FEWEST_TOKENS, room))
        tokens_cut = _even(tokens, -(-tokens // together))
        together = -(-tokens // tokens_cut)
        return tokens_cut, _even(rows, -(-rows * together // room))


def _plan(hidden_BTD: Array, head: Unembedding, chunk_bytes: int | None) -> _Plan:
    if chunk_bytes is not None and chunk_bytes < 4:
        raise UserError(f"chunk_bytes={chunk_bytes} must hold one float32 logit, 4 bytes.")
    layout = _layout(head.sharding, hidden_BTD.shape, head.kernel_VD.shape)
    return _Plan(head.vocab_size, head.soft_cap, chunk_bytes, layout)


def _psum(x: PyTree, axes: tuple[str, ...]) -> PyTree:
    return jax.lax.psum(x, axes) if axes else x


def _even(size: int, parts: int) -> int:
    """`parts`, or up to twice as many where `size` then divides evenly."""
    parts = min(parts, size)
    return next((n for n in range(parts, min(2 * parts, size + 1)) if size % n == 0), parts)


def _cut(x: Array, parts: int, fill: int = 0) -> Array:
    """[n, …] → [parts, ⌈n / parts⌉, …], filled up at the end."""
    size = -(-x.shape[0] // parts)
    missing = parts * size - x.shape[0]
    if missing:
        edges = [(0, missing), *((0, 0) for _ in x.shape[1:])]
        x = jnp.pad(x, edges, constant_values=fill)
    return x.reshape(parts, size, *x.shape[1:])


def _join(x: Array, size: int) -> Array:
    """The inverse of `_cut`."""
    return x.reshape(-1, *x.shape[2:])[:size]


def _scan(body: Callable, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
    """`lax.scan`, but a single turn isn't a loop."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, xs)
    carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda leaf: leaf[None], y)


class _Chunks(NamedTuple):
    """One device's arrays, cut."""

    hidden_CmD: Array
    words: _Words
    ids_Cv: Array  # those from the vocabulary's size on are padding

    @classmethod
    def of(cls, plan: _Plan, hidden_BTD: Array, words: _Words) -> "_Chunks":
        """As many as the plan says."""
        flat_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        rows = words.kernel.shape[0]
        tokens_cut, rows_cut = plan.cuts(flat_MD.shape[0], rows)
        return cls(
            _cut(flat_MD, tokens_cut),
            jax.tree.map(lambda x: _cut(x, rows_cut), words),
            _cut(plan.ids(rows), rows_cut, plan.vocab_size),
        )

    def tokens(self, x_BT: Array) -> Array:
        """[B, T] cut as the hidden states are."""
        return _cut(x_BT.reshape(-1), self.hidden_CmD.shape[0])


# --- a chunk


def _logits(plan: _Plan, hidden_mD: Array, words: _Words) -> Float[Array, "m v"]:
    """Float32 logits of a chunk, its padding among them."""
    logits_mv = jnp.einsum("mD,vD->mv", hidden_mD, words.kernel, preferred_element_type=jnp.float32)
    if words.bias is not None:
        logits_mv += words.bias[None, :]
    if plan.soft_cap is not None:
        logits_mv = plan.soft_cap * jnp.tanh(logits_mv / plan.soft_cap)
    return logits_mv


class _Seen(NamedTuple):
    """What is carried over the vocabulary's chunks; [m] each."""

    highest: Array
    total: Array  # Σ exp(logit - highest)
    target: Array
    sum: Array  # of logits

    @classmethod
    def nothing(cls, tokens: int) -> "_Seen":
        """Before the first chunk."""
        zero = jnp.zeros(tokens, jnp.float32)
        return cls(jnp.full(tokens, NEVER, jnp.float32), zero, zero, zero)

    def add(self, logits_mv: Array, chosen_mv: Array, real_v: Array) -> "_Seen":
        """With one chunk more."""
        masked_mv = jnp.where(real_v[None, :], logits_mv, NEVER)
        highest = jnp.maximum(self.highest, jnp.max(masked_mv, axis=-1))
        total = jnp.sum(jnp.exp(masked_mv - highest[:, None]), axis=-1)
        return _Seen(
            highest,
            self.total * jnp.exp(self.highest - highest) + total,
            self.target + jnp.sum(jnp.where(chosen_mv, masked_mv, 0.0), axis=-1),
            self.sum + jnp.sum(jnp.where(real_v[None, :], logits_mv, 0.0), axis=-1),
        )

    def scores(self, plan: _Plan) -> Scores:
        """Over the whole vocabulary; what other devices saw of it comes in here."""
        highest = plan.over_vocabulary(jax.lax.pmax, self.highest)
        own = self.total * jnp.exp(self.highest - highest)
        stacked = jnp.stack([own, self.target, self.sum])
        total, target, all_logits = plan.over_vocabulary(jax.lax.psum, stacked)
        return Scores(target, highest + jnp.log(total), highest, all_logits / plan.vocab_size)


def _see(
    plan: _Plan, chunks: _Chunks, hidden_mD: Array, targets_m: Array, logits_mV: Array | None = None
) -> _Seen:
    """All of this device's vocabulary for one chunk of tokens; `logits_mV`, where it isn't cut."""

    def body(seen, xs):
        words, ids_v = xs
        # Compared with every id instead of gathered: a vocabulary in parts stays in parts.
        chosen_mv = ids_v[None, :] == targets_m[:, None]
        logits_mv = _logits(plan, hidden_mD, words) if logits_mV is None else logits_mV
        return seen.add(logits_mv, chosen_mv, ids_v < plan.vocab_size), None

    start = _Seen.nothing(targets_m.shape[0])
    return _scan(body, start, (chunks.words, chunks.ids_Cv))[0]


def _pull(
    plan: _Plan, chunks: _Chunks, hidden_mD: Array, targets_m: Array, log_z_m: Array, d: Scores,
    sums: _Words, logits_mV: Array | None = None,
) -> tuple[_Words, Array]:  # fmt: skip
    """Adds one chunk of tokens' gradients to the vocabulary's; returns them, and the tokens' own.

    Products are in the kernel's dtype and summed in float32.
    """

    def body(d_hidden_mD, xs):
        words, ids_v, (d_kernel_vD, d_bias_v) = xs
        logits_mv = _logits(plan, hidden_mD, words) if logits_mV is None else logits_mV
        chosen_mv = ids_v[None, :] == targets_m[:, None]
        d_mv = d.log_z[:, None] * jnp.exp(logits_mv - log_z_m[:, None])
        d_mv += jnp.where(chosen_mv, d.target[:, None], 0.0) + d.mean[:, None] / plan.vocab_size
        if plan.soft_cap is not None:
            d_mv *= 1 - jnp.square(logits_mv / plan.soft_cap)
        d_mv = jnp.where((ids_v < plan.vocab_size)[None, :], d_mv, 0.0)
        cast_mv, f32 = d_mv.astype(words.kernel.dtype), jnp.float32
        d_hidden_mD += jnp.einsum("mv,vD->mD", cast_mv, words.kernel, preferred_element_type=f32)
        d_kernel_vD += jnp.einsum("mv,mD->vD", cast_mv, hidden_mD, preferred_element_type=f32)
        if d_bias_v is not None:
            d_bias_v += jnp.sum(d_mv, axis=0)
        return d_hidden_mD, _Words(d_kernel_vD, d_bias_v)

    zero_mD = jnp.zeros(hidden_mD.shape, jnp.float32)
    d_hidden_mD, sums = _scan(body, zero_mD, (chunks.words, chunks.ids_Cv, sums))
    return sums, d_hidden_mD


# --- all chunks of a device


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(plan: _Plan, hidden_BTD: Array, words: _Words, targets_BT: Array) -> Scores:
    return plan.run(_scores, (hidden_BTD, words, targets_BT), "tokens")


def _scores(plan: _Plan, hidden_BTD: Array, words: _Words, targets_BT: Array) -> Scores:
    chunks = _Chunks.of(plan, hidden_BTD, plan.gathered(words))

    def body(_, xs):
        return None, _see(plan, chunks, *xs)

    _, seen = _scan(body, None, (chunks.hidden_CmD, chunks.tokens(targets_BT)))
    flat = jax.tree.map(lambda x: _join(x, targets_BT.size), seen)
    return jax.tree.map(lambda x: x.reshape(targets_BT.shape), flat.scores(plan))


def _forward(plan: _Plan, hidden_BTD: Array, words: _Words, targets_BT: Array):
    scores = _score(plan, hidden_BTD, words, targets_BT)
    return scores, (hidden_BTD, words, targets_BT, scores.log_z)


def _backward(plan: _Plan, residuals, d: Scores):
    hidden_BTD, words, targets_BT, log_z_BT = residuals
    arrays = (hidden_BTD, words, targets_BT, log_z_BT, d.target, d.log_z, d.mean)
    d_hidden_BTD, d_words = plan.run(_gradients, arrays, "gradients")
    return d_hidden_BTD, d_words, np.zeros(targets_BT.shape, jax.dtypes.float0)


def _gradients(plan, hidden_BTD, words, targets_BT, log_z_BT, d_target, d_log_z, d_mean):
    chunks = _Chunks.of(plan, hidden_BTD, plan.gathered(words))
    d = Scores(d_target, d_log_z, None, d_mean)
    tokens = jax.tree.map(chunks.tokens, (targets_BT, log_z_BT, d))

    def body(sums, xs):
        hidden_mD, (targets_m, log_z_m, d_m) = xs
        return _pull(plan, chunks, hidden_mD, targets_m, log_z_m, d_m, sums)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), chunks.words)
    sums, d_hidden_CmD = _scan(body, zeros, (chunks.hidden_CmD, tokens))
    return _finish(plan, hidden_BTD, words, sums, d_hidden_CmD)


def _finish(plan, hidden_BTD, words, sums, d_hidden_CmD):
    """Gradients in the shapes, the layout and the dtypes of what they are of."""
    d_hidden_MD = _join(d_hidden_CmD, hidden_BTD.shape[0] * hidden_BTD.shape[1])
    d_hidden_MD = plan.over_vocabulary(jax.lax.psum, d_hidden_MD)
    rows = words.kernel.shape[0]
    d_words = plan.over_tokens(jax.tree.map(lambda x: _join(x, rows), sums))
    d_words = jax.tree.map(lambda d, x: d.astype(x.dtype), d_words, words)
    return d_hidden_MD.reshape(hidden_BTD.shape).astype(hidden_BTD.dtype), d_words


_score.defvjp(_forward, _backward)


# --- sums over tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(plan, each, hidden_BTD, words, targets_BT, weights_BT):
    scores = _score(plan, hidden_BTD, words, targets_BT)
    return jnp.sum(each(scores, weights_BT)), scores


def _total_forward(plan, each, hidden_BTD, words, targets_BT, weights_BT):
    arrays = (hidden_BTD, words, targets_BT, weights_BT)
    if plan.layout is None or not plan.layout.vocab:
        work = functools.partial(_scores_and_gradients, each=each)
        scores, gradients = plan.run(work, arrays, "both")
    else:  # what other devices have of the vocabulary comes in for all tokens at once
        scores = _score(plan, *arrays[:3])
        d = _slopes(each, scores, weights_BT)
        arrays = (*arrays[:3], scores.log_z, d.target, d.log_z, d.mean)
        gradients = plan.run(_gradients, arrays, "gradients")
    return (jnp.sum(each(scores, weights_BT)), scores), (*gradients, targets_BT, weights_BT)


def _slopes(each: Callable, scores: Scores, weights: Array) -> Scores:
    """Of the sum, with respect to each token's scores."""
    return jax.grad(lambda scores: jnp.sum(each(scores, weights)))(scores)


def _scores_and_gradients(plan, hidden_BTD, words, targets_BT, weights_BT, each):
    gathered = plan.gathered(words)
    chunks = _Chunks.of(plan, hidden_BTD, gathered)

    def body(sums, xs):
        hidden_mD, targets_m, weights_m = xs
        logits_mV = None  # of a vocabulary that is cut, they are computed twice
        if chunks.ids_Cv.shape[0] == 1:
            logits_mV = _logits(plan, hidden_mD, jax.tree.map(lambda x: x[0], chunks.words))
        scores_m = _see(plan, chunks, hidden_mD, targets_m, logits_mV).scores(plan)
        d_m = _slopes(each, scores_m, weights_m)
        sums, d_hidden_mD = _pull(
            plan, chunks, hidden_mD, targets_m, scores_m.log_z, d_m, sums, logits_mV
        )
        return sums, (scores_m, d_hidden_mD)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), chunks.words)
    tokens = chunks.tokens(targets_BT), chunks.tokens(weights_BT)
    sums, (scores, d_hidden_CmD) = _scan(body, zeros, (chunks.hidden_CmD, *tokens))
    flat = jax.tree.map(lambda x: _join(x, targets_BT.size).reshape(targets_BT.shape), scores)
    return flat, _finish(plan, hidden_BTD, words, sums, d_hidden_CmD)


def _total_backward(plan, each, residuals, d):
    del plan, each
    d_hidden_BTD, d_words, targets_BT, weights_BT = residuals
    scaled = jax.tree.map(
        lambda x: (x.astype(jnp.float32) * d[0]).astype(x.dtype), (d_hidden_BTD, d_words)
    )
    nothing = np.zeros(targets_BT.shape, jax.dtypes.float0), jnp.zeros_like(weights_BT)
    return *scaled, *nothing


_total.defvjp(_total_forward, _total_backward)
