"""Axis letters, and what flows between the data, the model and the losses.

Arrays of rank two and more are named by their axes, `q_BTKGH`:

    B batch        T query or target length   S key or source length   D model width
    N query heads  K key/value heads          G = N / K                H head dimension
    F ffn width    V vocabulary (physical)    L layers                 E experts
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax

# Fields of array trees are not annotated by shape: `jax.eval_shape` and trees of shardings put
# other things into them.
PyTree = Any
Params = Mapping[str, Any]

# One example a row; `data/` makes them of NumPy arrays, the step takes them as JAX arrays.
#   tokens, targets, segments, positions  int32 [B, T]    weights  float32 [B, T]
#   encoder_tokens, encoder_segments, encoder_positions   int32 [B, S]   (encoder-decoder)
#   token_types                                           int32 [B, T]   (BERT, optional)
#   prefix                                                int32 [B, T]   (prefix LM, optional)
#   labels  int32, of a regression float32 [B];  spans  int32 [B, 2];  label_weights  float32 [B]
#   features                              float32 [B, S, feature]  (instead of encoder tokens)
# `segments` numbers the documents of a packed row from 1; 0 is padding. Left out, a row is one
# document without padding. `positions` restart in each segment and are consecutive there; left
# out, they count from 0. `weights` is 0 where a token bears no loss. `prefix` is 1 where tokens of
# a causal stack's segment see each other in both directions (seqio's decoder_causal_attention).
# Rows with one result have labels or spans (an answer's first and last position) instead of targets
# and weights; `label_weights` is 0 for rows that are padding.
Batch = Mapping[str, Any]


@flax.struct.dataclass
class Unembedding:
    """The last matrix product, not yet done: logits = hidden · kernelᵀ + bias.

    The kernel has the physical vocabulary's rows; those from `vocab_size` on are padding.
    With a soft cap they become cap · tanh(logits / cap). `sharding` is the model's
    `partitioning.Sharding` or None: a loss that works in chunks has to know the layout.
    """

    kernel_VD: Any
    bias_V: Any
    vocab_size: int = flax.struct.field(pytree_node=False)
    soft_cap: float | int | None = flax.struct.field(pytree_node=False, default=None)
    sharding: Any = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class Output:
    """What a model returns: hidden states, never the [B, T, V] logits.

    `hidden_BTD` is what the head leaves for the unembedding; losses.py turns the two into
    log-probabilities or logits. `aux` holds named auxiliaries, stacked over layers.
    """

    hidden_BTD: Any
    unembedding: Unembedding | None = None
    cache: Any = None
    aux: dict[str, Any] = flax.struct.field(default_factory=dict)


KeyArray = jax.Array
