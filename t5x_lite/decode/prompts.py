"""Batches of ragged prompts: padded on the right, and checked before the device sees them.

A prompt is a `types.Batch`:
    tokens, segments                    int32 [B, P]: ids, and 1 where a row has one, then 0
    encoder_tokens, encoder_segments    int32 [B, S]: the same for an encoder's input
    prefix                              int32 [B, P], or left out: 1 where a decoder's tokens see
                                        each other in both directions, as it was trained to
An encoder-decoder's `tokens` start with the start id (0), and may go on with a forced beginning.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.nn.config import ModelConfig, StackConfig
from t5x_lite.nn.positions import LearnedPositions
from t5x_lite.partitioning import Sharding
from t5x_lite.types import Batch


def right_pad(
    rows: Sequence[Sequence[int]], length: int | None = None, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Tokens and segments of ragged rows.

    Args:
        rows: ids of each prompt.
        length: what all are padded to; None: the longest.
        prefix: "encoder_" for an encoder's input.
    """
    longest = max(map(len, rows))
    length = longest if length is None else length
    if longest > length:
        raise UserError(f"a prompt of {longest} tokens doesn't fit into length={length}.")
    tokens = np.zeros((len(rows), length), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    segments = np.arange(length)[None] < np.array([len(row) for row in rows])[:, None]
    return {f"{prefix}tokens": tokens, f"{prefix}segments": segments.astype(np.int32)}


def positions_of(stack: StackConfig) -> int | None:
    """How many places a stack can tell apart; None where it has no limit."""
    return stack.positions.max_length if isinstance(stack.positions, LearnedPositions) else None


def check(config: ModelConfig, prompt: Batch, max_tokens: int = 1) -> None:
    """Refuses what the compiled program would silently clip or read past.

    Raises:
        UserError: an empty row or one that isn't padded on the right, an id outside the
            vocabulary, or more tokens than the model has learned positions.
    """
    lengths = _check_rows(config, prompt, "")
    _check_positions(config.main, int(lengths.max()), max_tokens, "the prompt")
    if config.kind == "encoder-decoder":
        lengths = _check_rows(config, prompt, "encoder_")
        _check_positions(config.encoder, int(lengths.max()), 1, "the encoder's input")


def _check_positions(stack: StackConfig, length: int, max_tokens: int, what: str) -> None:
    known, needed = positions_of(stack), length + max_tokens - 1
    if known is None or needed <= known:
        return
    if length > known:
        raise UserError(f"{what} has {length} tokens and the model {known} learned positions; "
                        f"shorten it by {length - known} tokens.")  # fmt: skip
    raise UserError(
        f"{what} of {length} tokens and max_tokens={max_tokens} need {needed} positions and the "
        f"model has {known} learned ones; set max_tokens to {known - length + 1} or less."
    )


def _check_rows(config: ModelConfig, prompt: Batch, prefix: str) -> np.ndarray:
    """The rows' lengths, if their tokens and segments are as the module says."""
    segments = np.asarray(prompt[f"{prefix}segments"])
    lengths = segments.sum(axis=1)
    if not np.array_equal(segments, np.arange(segments.shape[1])[None] < lengths[:, None]):
        raise UserError(f"{prefix}segments must be 1 for a row's tokens and then 0.")
    if not lengths.all():
        raise UserError(f"row {int(lengths.argmin())} of {prefix}tokens is empty; give it at least "
                        "one token, such as the vocabulary's bos_id.")  # fmt: skip
    if f"{prefix}tokens" in prompt:
        tokens = np.asarray(prompt[f"{prefix}tokens"])
        require_ids(config, [int(tokens.min()), int(tokens.max())], f"{prefix}tokens")
    return lengths


def require_ids(config: ModelConfig, ids: Sequence[int], what: str) -> None:
    """Raises `UserError` where the model has no such id."""
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise UserError(f"id {token} of {what} is outside the model's vocabulary; it has ids "
                            f"0 to {config.vocab_size - 1}.")  # fmt: skip


def place(config: ModelConfig, prompt: Batch, sharding: Sharding | None) -> dict[str, jax.Array]:
    """What the model reads of a prompt, on the devices; targets and weights are left behind."""
    names = ["tokens", "segments", "prefix"]
    if config.kind == "encoder-decoder":
        names += ["encoder_tokens", "encoder_features", "encoder_segments"]
    placed = {name: jnp.asarray(prompt[name]) for name in names if name in prompt}
    if sharding is None:
        return placed
    return {
        name: jax.device_put(value, sharding.batch(value.shape)) for name, value in placed.items()
    }
