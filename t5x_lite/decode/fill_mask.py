"""What an encoder-only model says of each masked place."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from t5x_lite import losses
from t5x_lite.decode import prompts
from t5x_lite.errors import UserError
from t5x_lite.nn.transformer import Transformer
from t5x_lite.types import Batch, Params


@flax.struct.dataclass
class Candidates:
    """The K likeliest ids of every masked place, best first.

    Each place is judged by itself, with the row's other masks still masked.

    Attributes:
        positions_BM: int32 [B, M]; where a row's masks stand; -1 where it has fewer than M.
        ids_BMK: int32 [B, M, K].
        logprobs_BMK: float32 [B, M, K]; of each id under the model, in nats.
    """

    positions_BM: Any
    ids_BMK: Any
    logprobs_BMK: Any


def fill_mask(
    model: Transformer,
    params: Params,
    batch: Batch,
    mask_id: int,
    candidates: int = 5,
    banned_V: Bool[Array, " V"] | None = None,
) -> Candidates:
    """Ranks ids for each mask of a batch; compiles once for each shape and number of masks.

    Args:
        model: encoder-only, with a masked-language-model head.
        params: the model's.
        batch: see prompts.py; NumPy or JAX arrays.
        mask_id: what stands in a masked place.
        candidates: K.
        banned_V: True for ids of the physical vocabulary that are no candidates.

    Raises:
        UserError: another kind of model, a row without a mask, K out of range, or what
            `prompts.check` refuses.
    """
    config = model.config
    if config.predicts not in ("masked", "pairs"):
        raise UserError(f"this {config.kind} model predicts no masked tokens; use one with a "
                        "masked-language-model head, such as bert.")  # fmt: skip
    prompts.check(config, batch)
    prompts.require_ids(config, [mask_id], "mask_id")
    choices = config.vocab_size
    if banned_V is not None:
        choices -= int(jnp.sum(banned_V[: config.vocab_size]))
    if not 1 <= candidates <= choices:
        raise UserError(f"candidates={candidates} must lie between 1 and {choices}, the number of "
                        "ids to choose from.")  # fmt: skip
    positions_BM = mask_positions(np.asarray(batch["tokens"]), mask_id)
    placed = prompts.place(config, batch, model.sharding)
    return _compiled(model, params, placed, jnp.asarray(positions_BM), candidates, banned_V)


def mask_positions(tokens_BT: Int[np.ndarray, "B T"], mask_id: int) -> Int[np.ndarray, "B M"]:
    """Where each row's masks stand, then -1 up to the most masks of any row, or a power of two.

    Raises:
        UserError: a row has none.
    """
    rows = [np.flatnonzero(row == mask_id) for row in tokens_BT]
    if not all(map(len, rows)):
        raise UserError(f"row {list(map(len, rows)).index(0)} has no mask to fill.")
    most = max(map(len, rows))
    positions_BM = np.full((len(rows), 1 << (most - 1).bit_length()), -1, np.int32)
    for place, row in zip(positions_BM, rows, strict=True):
        place[: len(row)] = row
    return positions_BM


def rank(
    model: Transformer,
    params: Params,
    batch: Batch,
    positions_BM: Int[Array, "B M"],
    candidates: int,
    banned_V: Bool[Array, " V"] | None = None,
) -> Candidates:
    """`fill_mask` at given places without its checks: pure, for use inside a compiled program."""
    output = model.apply({"params": params}, batch)
    # Only the masked places meet the vocabulary.
    index_BM1 = jnp.maximum(positions_BM, 0)[:, :, None]
    hidden_BMD = jnp.take_along_axis(output.hidden_BTD, index_BM1, axis=1)
    logits_BMV = losses.logits(output.replace(hidden_BTD=hidden_BMD))
    logprobs_BMV = jax.nn.log_softmax(logits_BMV, axis=-1)
    if banned_V is not None:
        logprobs_BMV = jnp.where(banned_V[None, None], -jnp.inf, logprobs_BMV)
    logprobs_BMK, ids_BMK = jax.lax.top_k(logprobs_BMV, candidates)
    return Candidates(positions_BM, ids_BMK, logprobs_BMK)


_compiled = jax.jit(rank, static_argnames=("model", "candidates"))
