"""Ring attention: sequences split over devices, whose keys and values go round (Liu et al. 2023).

Each device holds a chunk of every row. Keys and values of all chunks pass by, one ring step at a
time, while the device lets its queries look at those that it has; it never holds more than two
chunks of them. The gradient goes round in the same way, and takes those of keys and values along.

Under a causal mask the last chunk has everything to look at and the first one hardly anything. So
each device swaps half a chunk first and works on one half from the front of the row and one from
its back, halves i and 2n - 1 - i of 2n (zig-zag: Zhu 2024; the same idea in Brandon et al. 2023,
§3, as stripes). Each then has the same number of blocks to compute in every step of the ring.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from t5x_lite.errors import UserError
from t5x_lite.nn import online
from t5x_lite.nn.mapped import specs_of
from t5x_lite.nn.masks import Visibility
from t5x_lite.partitioning import Sharding
from t5x_lite.types import KeyArray

BLOCK = 512  # queries, and keys, whose scores are in memory at one time


def ring_size(sharding: Sharding | None) -> int:
    """How many devices a sequence is split over; 1: it isn't."""
    return 1 if sharding is None else sharding.parts("length")


def ring_attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K h"],
    sees: Visibility,
    bias: Any = (),
    *,
    sharding: Sharding,
    scale: float | int,
    soft_cap: float | int | None = None,
    dropout: float | int = 0.0,
    dropout_keys: KeyArray | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T N h"]:
    """softmax(scale · q·kᵀ + bias, where seen) · v, of sequences split over the ring.

    Equal to `attend`, but that a query which sees no key, padding, gets zeros. Orders are slots:
    the ring is for whole sequences, not for steps of decoding.

    Args:
        q_BTNH: queries, T split over the mesh axes of "length".
        k_BSKH: keys, S split over the same: the row's own, or an encoder's.
        v_BSKH: values.
        sees: which keys each query sees.
        bias: what is added to the logits; the last axis of every leaf are heads.
        sharding: the mesh and its rules.
        scale: of q·kᵀ.
        soft_cap: logits become cap · tanh(logits / cap).
        dropout: of the probabilities.
        dropout_keys: one key a row; None: no dropout.
        block: how many queries and keys have their scores in memory at one time.

    Raises:
        UserError: a length that the ring doesn't divide.
    """
    plan = _Plan.of(q_BTNH.shape[1], k_BSKH.shape[1], sees, sharding, block)
    rate = 0.0 if dropout_keys is None else dropout
    call = _Call(plan, sharding, online.Form(scale, soft_cap, rate))
    rest = sees.bare(), dropout_keys if rate else None
    return _attend(call, q_BTNH, k_BSKH, v_BSKH, tuple(part.bare() for part in bias), *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: "_Call", q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys):
    return _forward(call, q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys)[0]


def _forward(call, q_BTNH, k_BSKH, v_BSKH, bias, sees, dropout_keys):
    heads_N = jnp.arange(q_BTNH.shape[2], dtype=jnp.int32)
    context = online.Context(sees, bias, dropout_keys, heads_N)
    kinds = ("rows", "blocks", "blocks", "blocks", "totals")
    run = online.undivided(call.map(call.forward, ("rows",) * 3, kinds, context))
    out_BTNh, *kept = run(q_BTNH, k_BSKH, v_BSKH, context)
    return out_BTNh, (out_BTNh, kept, context)


def _backward(call, residuals, dout_BTNh):
    out_BTNh, kept, context = residuals
    kinds = ("rows", "rows", "blocks", "blocks", "blocks", "totals")
    gradients = call.map(call.backward, kinds, ("rows", "rows", "rows", "bias"), context)(
        out_BTNh, dout_BTNh, *kept, context
    )
    return *gradients, None, None  # what is seen and dropped has no gradient


_attend.defvjp(_forward, _backward)


def check_ring(name: str, length: int, ring: int) -> None:
    """Raises `UserError` for a length that doesn't divide into as many chunks as the ring has."""
    if length % ring:
        below = length // ring * ring
        tries = f"{below} or {below + ring}" if below else ring
        raise UserError(
            f"{name}={length} doesn't divide by the ring of {ring} devices that sequences are "
            f"split over (mesh axis sequence); try {tries}."
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Who computes what, and when.

    Attributes:
        ring: n, the number of devices.
        queries: length of the rows of queries.
        keys: length of the rows of keys.
        pieces: of a chunk that lie apart in the row: 2 where halves are swapped, else 1.
        ahead: a device's first visitor comes from so many chunks ahead; the last, from behind.
        visits: steps of the ring.
        block: the largest size of a block.
    """

    ring: int
    queries: int
    keys: int
    pieces: int
    ahead: int
    visits: int
    block: int

    @classmethod
    def of(cls, queries, keys, sees: Visibility, sharding: Sharding, block: int) -> "_Plan":
        ring = ring_size(sharding)
        check_ring("length", queries, ring)
        check_ring("length of the keys", keys, ring)
        ahead, visits = 0, ring
        if sees.window is not None and queries == keys:
            # Keys further off than the window are in chunks that needn't come at all.
            reach = -(-(sees.window - 1) // (keys // ring))
            ahead = 0 if sees.causal and sees.prefix_q is None else reach
            visits = ahead + reach + 1
        if visits < ring:
            return cls(ring, queries, keys, 1, ahead, visits, block)
        swap = sees.causal and queries == keys and queries % (2 * ring) == 0
        return cls(ring, queries, keys, 2 if swap else 1, 0, ring, block)

    def queries_at(self, device: Array) -> online.Run:
        """Where the blocks of a device's queries lie."""
        return self._run(device, self.queries)

    def keys_at(self, device: Array) -> online.Run:
        """Where the blocks of a device's keys lie, before they travel."""
        return self._run(device, self.keys)

    def _run(self, device: Array, length: int) -> online.Run:
        size = length // self.ring // self.pieces
        pieces = [device, 2 * self.ring - 1 - device][: self.pieces]
        return online.run(size * jnp.stack(pieces), size, self.block)

    def visitor(self, device: Array, step: Array | int) -> Array:
        """Whose keys are at a device in a step of the ring."""
        return (device + self.ahead - step) % self.ring

    def block_size(self, length: int) -> int:
        """Of the blocks that rows of `length` are cut into."""
        return online.sizes(length // self.ring // self.pieces, self.block)[1]

    def routes(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Where chunks' first and second halves go: halves i and 2n - 1 - i to device i."""
        last = 2 * self.ring - 1
        home = [min(half, last - half) for half in range(2 * self.ring)]
        firsts = [(device, home[2 * device]) for device in range(self.ring)]
        return firsts, [(device, home[2 * device + 1]) for device in range(self.ring)]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is fixed when the program is compiled, and the work of one device.

    Devices keep queries, keys and values cut into blocks, [blocks, B, size, …].
    """

    plan: _Plan
    sharding: Sharding
    form: online.Form

    def map(self, work, arrays, results, context):
        """`work` as a function of whole arrays, which runs it on every device's parts of them.

        Kinds of `arrays` and `results`: "rows" [B, T, N, …] in the row's order; "blocks" and
        "totals", [blocks, B, size, N, …] and [blocks, B, K, G, T], as the devices keep them; and
        "bias".
        """
        batch, length, heads = (
            self.sharding.axes(name) or None for name in ("batch", "length", "act_heads")
        )
        # Slots and segments of the whole row, a few bytes a token, are on every device.
        rest = specs_of(context, self.sharding)
        specs = {
            "rows": PartitionSpec(batch, length, heads),
            "blocks": PartitionSpec(length, batch, None, heads),
            "totals": PartitionSpec(length, batch, heads),
            "bias": rest.bias,
        }
        ins = *(specs[kind] for kind in arrays), rest
        return self.sharding.shard_map(work, ins, tuple(specs[kind] for kind in results))

    @property
    def _axes(self) -> tuple[str, ...]:
        return self.sharding.axes("length")

    def forward(self, q_BTNH, k_BSKH, v_BSKH, context):
        """Outputs [B, T, N, h]; then blocks of q, k and v, and the softmax's normalisers."""
        plan, device = self.plan, jax.lax.axis_index(self._axes)
        q, k, v = kept = [self._spread(x) for x in (q_BTNH, k_BSKH, v_BSKH)]
        at_q, context = plan.queries_at(device), self._padded(context)

        def step(carry, number):
            state, visitors = carry
            arriving = self._pass_on(visitors)  # on its way while the blocks are computed
            at_k = plan.keys_at(plan.visitor(device, number))
            state = online.visit(state, q, *visitors, at_q, at_k, context, self.form)
            return (state, arriving), None

        first = online.begin(q, v), self._pass_on((k, v), -plan.ahead)
        (state, _), _ = jax.lax.scan(step, first, jnp.arange(plan.visits, dtype=jnp.int32))
        out, log_total = online.finish(state)
        return self._gather(out.astype(v_BSKH.dtype), plan.queries), *kept, log_total

    def backward(self, out_BTNh, dout_BTNh, q, k, v, log_total, context):
        """Gradients of queries, keys and values, [B, T, N, H], and of the bias."""
        plan, device = self.plan, jax.lax.axis_index(self._axes)
        delta_BTN = jnp.sum(out_BTNh.astype(jnp.float32) * dout_BTNh.astype(jnp.float32), axis=-1)
        query = online.backward(q, self._spread(dout_BTNh), self._spread(delta_BTN), log_total)
        at_q, context = plan.queries_at(device), self._padded(context)
        dq, dbias, *dkv = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.float32), (q, context.bias, k, v)
        )

        def step(carry, number):
            dq, dbias, visitors, totals = carry
            # The totals are those of the visitors that have just come. They don't wait for this
            # device's part, which is added when it is ready.
            arriving, totals = self._pass_on((visitors, totals))
            at_k = plan.keys_at(plan.visitor(device, number))
            grads = dq, *jax.tree.map(jnp.zeros_like, totals), dbias
            dq, *part, dbias = online.visit_back(
                grads, query, *visitors, at_q, at_k, context, self.form
            )
            return (dq, dbias, arriving, jax.tree.map(jnp.add, totals, tuple(part))), None

        first = dq, dbias, self._pass_on((k, v), -plan.ahead), tuple(dkv)
        last, _ = jax.lax.scan(step, first, jnp.arange(plan.visits, dtype=jnp.int32))
        dq, dbias, _, dkv = last
        dk, dv = self._pass_on(dkv, plan.ahead - plan.visits + 1)  # home
        axes = (*self.sharding.axes("batch"), *self._axes)
        dbias = jax.lax.psum(dbias, axes)
        lengths = plan.queries, plan.keys, plan.keys
        return *(
            self._gather(total.astype(x.dtype), length)
            for total, x, length in zip((dq, dk, dv), (q, k, v), lengths, strict=True)
        ), dbias  # fmt: skip

    def _padded(self, context: online.Context) -> online.Context:
        extra = (self.plan.block_size(n) for n in (self.plan.queries, self.plan.keys))
        return context.replace(sees=online.padded(context.sees, *extra))

    def _pass_on(self, arrays, steps: int = 1):
        """Sends a device's arrays to the one `steps` further on in the ring."""
        ring = self.plan.ring
        if steps % ring == 0:
            return arrays
        route = [(device, (device + steps) % ring) for device in range(ring)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self._axes, route), arrays)

    def _spread(self, x: Array) -> Array:
        """A device's chunk [B, T, …] → blocks of the pieces that it works on."""
        plan = self.plan
        if plan.pieces == 2:
            came = self._exchange(jnp.split(x, 2, axis=1), plan.routes())
            x = jnp.concatenate(self._in_order(*came), axis=1)
        return online.cut(x, plan.pieces, plan.block)

    def _gather(self, x: Array, length: int) -> Array:
        """The inverse of `_spread`, for rows of `length`."""
        plan = self.plan
        x = online.join(x, plan.pieces, length // plan.ring)
        if plan.pieces == 2:
            back = [[(there, here) for here, there in route] for route in plan.routes()]
            halves = self._in_order(*jnp.split(x, 2, axis=1))
            x = jnp.concatenate(self._exchange(halves, back), axis=1)
        return x

    def _exchange(self, halves, routes) -> list[Array]:
        return [
            jax.lax.ppermute(half, self._axes, route)
            for half, route in zip(halves, routes, strict=True)
        ]

    def _in_order(self, first: Array, second: Array) -> tuple[Array, Array]:
        """Turns (first half of a chunk, second half) as they come into (front, back) of the row.

        Half i of the row is a first half where i is even, and its place is device i; so it is its
        own inverse.
        """
        even = jax.lax.axis_index(self._axes) % 2 == 0
        return jnp.where(even, first, second), jnp.where(even, second, first)
