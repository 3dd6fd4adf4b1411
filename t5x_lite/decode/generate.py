"""Batched generation with the explicit KV cache, for decoder-only and encoder-decoder models.

`prefill` and `decode_step` are the model's two halves: pure, and all that a beam search or a
serving engine needs. `decode` loops over them inside one compiled program; `generate` checks what
it is given and compiles. prompts.py says what a prompt is.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_lite import losses
from t5x_lite.decode import prompts
from t5x_lite.decode.sampling import Sampling, sample
from t5x_lite.errors import UserError
from t5x_lite.nn.cache import Cache, init_cache
from t5x_lite.nn.transformer import Transformer
from t5x_lite.types import Batch, KeyArray, Output, Params


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to choose tokens, and when to stop.

    Attributes:
        max_tokens: the most tokens that a row is given.
        stop_ids: a row ends with the first of these; it is the row's last token.
        sampling: how a token is chosen.
        pad_id: what follows a row's end.
        slots: tokens that the cache has room for in a row; None: just enough.
    """

    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    pad_id: int = 0
    slots: int | None = None

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1.")

    def cache_slots(self, prompt: int) -> int:
        """The cache's slots for prompts padded to `prompt`; the last token is never read back.

        Raises:
            UserError: `slots` are too few.
        """
        needed = prompt + self.max_tokens - 1
        if self.slots is None:
            return needed
        if self.slots < needed:
            raise UserError(
                f"a prompt of {prompt} tokens and max_tokens={self.max_tokens} need {needed} slots "
                f"of the cache, which has {self.slots}; shorten either, or set slots={needed}."
            )
        return self.slots


@flax.struct.dataclass
class Generated:
    """What was generated, without the prompt.

    Attributes:
        tokens_BT: int32 [B, max_tokens]; `pad_id` after a row's end.
        logprobs_BT: float32 [B, max_tokens]; log-probability of each token under the model itself,
            before temperature and filters, in nats; 0 after a row's end.
        lengths_B: int32 [B]; tokens of each row, the stop id included.
        stopped_B: bool [B]; whether the row ended with a stop id rather than at max_tokens.
    """

    tokens_BT: Any
    logprobs_BT: Any
    lengths_B: Any
    stopped_B: Any


def generate(
    model: Transformer,
    params: Params,
    prompt: Batch,
    keys_B: KeyArray,
    decoding: Decoding,
    banned_V: Bool[Array, " V"] | None = None,
) -> Generated:
    """Continues a batch of prompts; compiles once for each shape, model and `decoding`.

    Args:
        model: has a decoder; its sharding, if any, also splits the batch.
        params: the model's.
        prompt: see prompts.py; NumPy or JAX arrays.
        keys_B: one key a row; what a row is given doesn't depend on the rows beside it.
        decoding: how to choose and when to stop.
        banned_V: True for ids of the physical vocabulary that must never be chosen.

    Raises:
        UserError: an empty or left-padded row, an id outside the vocabulary, or more tokens than
            the model has positions or the cache has slots; a model that predicts no next token.
    """
    config = model.config
    if config.decoder is None:
        raise UserError("an encoder-only model can't generate; fill its masks instead.")
    if config.predicts != "next":
        raise UserError("the model has no language-model head, so it can't generate.")
    prompts.check(config, prompt, decoding.max_tokens)
    prompts.require_ids(config, (*decoding.stop_ids, decoding.pad_id), "stop_ids and pad_id")
    decoding.cache_slots(prompt["tokens"].shape[1])
    prompt = prompts.place(config, prompt, model.sharding)
    return jit_decode(model, params, prompt, keys_B, decoding, banned_V)


def decode(
    model: Transformer,
    params: Params,
    prompt: Batch,
    keys_B: KeyArray,
    decoding: Decoding,
    banned_V: Bool[Array, " V"] | None = None,
) -> Generated:
    """`generate` without its checks: pure, for use inside a compiled program."""
    rows, width = prompt["tokens"].shape
    prompts_B = jnp.sum(prompt["segments"], axis=1, dtype=jnp.int32)
    logits_BV, cache = prefill(model, params, prompt, decoding.cache_slots(width))
    state = _choose(_start(rows, decoding, cache), logits_BV, keys_B, decoding, banned_V)

    def is_unfinished(state: _State) -> Array:
        return (state.count < decoding.max_tokens) & ~jnp.all(state.stopped_B)

    def step(state: _State) -> _State:
        last_B = jax.lax.dynamic_index_in_dim(state.tokens_BT, state.count - 1, 1, keepdims=False)
        positions_B = prompts_B + state.count - 1
        live_B = ~state.stopped_B
        logits_BV, cache = decode_step(model, params, last_B, positions_B, live_B, state.cache)
        return _choose(state.replace(cache=cache), logits_BV, keys_B, decoding, banned_V)

    state = jax.lax.while_loop(is_unfinished, step, state)
    return Generated(state.tokens_BT, state.logprobs_BT, state.lengths_B, state.stopped_B)


jit_decode = jax.jit(decode, static_argnames=("model", "decoding"))


def prefill(
    model: Transformer, params: Params, prompt: Batch, slots: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads the prompts: logits of each row's first new token, and the cache with the prompts.

    Args:
        model: has a decoder.
        params: the model's.
        prompt: see prompts.py.
        slots: room of the cache, in tokens a row.
    """
    memory = next((v.shape[1] for k, v in prompt.items() if k.startswith("encoder_")), None)
    cache = init_cache(model.config, prompt["tokens"].shape[0], slots, memory)
    output = model.apply({"params": params}, prompt, cache=cache)
    last_B = jnp.sum(prompt["segments"], axis=1, dtype=jnp.int32) - 1
    return _logits_at(output, last_B), output.cache


def decode_step(
    model: Transformer,
    params: Params,
    tokens_B: Int[Array, " B"],
    positions_B: Int[Array, " B"],
    live_B: Bool[Array, " B"],
    cache: Cache,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one token a row: logits of the next one, and the cache with this one.

    Args:
        model: has a decoder.
        params: the model's.
        tokens_B: the tokens chosen last.
        positions_B: where they stand, counted from 0 at the start of their own row.
        live_B: False for rows that have ended: their token counts as padding.
        cache: from `prefill` or the previous step.
    """
    batch = {
        "tokens": tokens_B[:, None],
        "segments": live_B[:, None].astype(jnp.int32),
        "positions": positions_B[:, None],
    }
    output = model.apply({"params": params}, batch, cache=cache)
    return _logits_at(output, jnp.zeros_like(tokens_B)), output.cache


def _logits_at(output: Output, index_B: Int[Array, " B"]) -> Float[Array, "B V"]:
    """Logits of one place a row; those of the others are never computed."""
    hidden_BTD = jnp.take_along_axis(output.hidden_BTD, index_B[:, None, None], axis=1)
    return losses.logits(output.replace(hidden_BTD=hidden_BTD))[:, 0]


@flax.struct.dataclass
class _State:
    count: Any  # tokens chosen so far, the same for all rows
    tokens_BT: Any
    logprobs_BT: Any
    lengths_B: Any
    stopped_B: Any
    cache: Any


def _start(rows: int, decoding: Decoding, cache: Cache) -> _State:
    shape = (rows, decoding.max_tokens)
    return _State(
        count=jnp.zeros((), jnp.int32),
        tokens_BT=jnp.full(shape, decoding.pad_id, jnp.int32),
        logprobs_BT=jnp.zeros(shape, jnp.float32),
        lengths_B=jnp.zeros(rows, jnp.int32),
        stopped_B=jnp.zeros(rows, bool),
        cache=cache,
    )


def _choose(
    state: _State,
    logits_BV: Array,
    keys_B: KeyArray,
    decoding: Decoding,
    banned_V: Array | None,
) -> _State:
    """Draws the next token of every row that hasn't ended, and writes it down."""
    # Folded with the token's number in its row, which is the same in whatever batch the row is.
    now_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.count)
    allowed_BV = logits_BV if banned_V is None else jnp.where(banned_V[None], -jnp.inf, logits_BV)
    chosen_B = sample(allowed_BV, now_B, decoding.sampling)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    logprobs_B = jnp.take_along_axis(logprobs_BV, chosen_B[:, None], axis=-1)[:, 0]
    stop_ids = jnp.asarray(decoding.stop_ids, jnp.int32)
    stops_B = jnp.any(chosen_B[:, None] == stop_ids[None], axis=1)
    live_B = ~state.stopped_B
    write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=state.count, axis=1)
    return state.replace(
        count=state.count + 1,
        tokens_BT=write(state.tokens_BT, jnp.where(live_B, chosen_B, decoding.pad_id)),
        logprobs_BT=write(state.logprobs_BT, jnp.where(live_B, logprobs_B, 0.0)),
        lengths_B=state.lengths_B + live_B.astype(jnp.int32),
        stopped_B=state.stopped_B | stops_B,
    )
