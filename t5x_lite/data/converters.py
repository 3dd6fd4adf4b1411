"""Examples to what a model of each family reads: segments, and rows of them.

The semantics are those of seqio's feature converters (Roberts et al. 2022, §3.2): decoder inputs
are the targets one later, begun anew in every packed segment; positions too; nothing is padded but
with zeros. A segment holds one example's arrays under the names of `types.Batch`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

Ids = Int[np.ndarray, " _"]
Segment = dict[str, np.ndarray]
Row = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]

# What positions each side of a row has; both of an encoder-decoder's have their own segments.
SIDES = ("tokens", "encoder_tokens")
# One value a row, not one a position: that of its only example that has one.
ROWWISE = ("labels", "label_weights", "spans")


def encoder_decoder(inputs: Ids, targets: Ids, start_id: int = 0) -> Segment:
    """Inputs for the encoder, targets for the decoder, which begins with `start_id` as T5 does."""
    return {
        "encoder_tokens": inputs,
        "tokens": shifted(targets, start_id),
        "targets": targets,
        "weights": np.ones(len(targets), np.float32),
    }


def decoder(inputs: Ids, targets: Ids, start_id: int = 0) -> Segment:
    """Inputs, then targets, for a causal decoder; only the targets bear loss."""
    ids = np.concatenate([inputs, targets])
    weights = np.ones(len(ids), np.float32)
    weights[: len(inputs)] = 0
    return {"tokens": shifted(ids, start_id), "targets": ids, "weights": weights}


def prefix_decoder(inputs: Ids, targets: Ids, start_id: int = 0) -> Segment:
    """As `decoder`, and the inputs see each other in both directions (a prefix LM).

    The first target's own input, the last of `inputs`, belongs to the prefix: it is one longer than
    the inputs, as it also holds `start_id`.
    """
    segment = decoder(inputs, targets, start_id)
    prefix = np.zeros(len(segment["tokens"]), np.int32)
    prefix[: len(inputs) + 1] = 1
    return segment | {"prefix": prefix}


def encoder(tokens: Ids, targets: Ids, weights: Float[np.ndarray, " _"]) -> Segment:
    """Noisy tokens, what they were, and 1 where this is asked."""
    return {"tokens": tokens, "targets": targets, "weights": weights}


def shifted(targets: Ids, start_id: int) -> Ids:
    """What a decoder reads to predict `targets`."""
    return np.concatenate([np.array([start_id], targets.dtype), targets[:-1]])


def token_shapes(length: int, *more: str, side: str = "") -> Shapes:
    """Shapes of a side: a decoder's or encoder's own, or with side="encoder_" the other one's."""
    ints = ("tokens", "segments", "positions", *more)
    shapes = {f"{side}{name}": ((length,), np.dtype(np.int32)) for name in ints}
    if not side:
        shapes["targets"] = ((length,), np.dtype(np.int32))
        shapes["weights"] = ((length,), np.dtype(np.float32))
    return shapes


def empty_row(shapes: Shapes) -> Row:
    """A row of padding alone: no segment, no weight."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}


def assemble(segments: Sequence[Segment], shapes: Shapes) -> Row:
    """Segments end to end, numbered from 1, each with positions of its own, then padding.

    Raises:
      ValueError: they don't fit, or there are several of what a row has one.
    """
    row = empty_row(shapes)
    for side in SIDES:
        if side not in shapes:
            continue
        sizes = [len(segment[side]) for segment in segments]
        total = sum(sizes)
        (limit,), _ = shapes[side]
        if total > limit:
            raise ValueError(f"{total} positions in a row of {limit}")
        prefix = side.removesuffix("tokens")
        numbers, positions = row[f"{prefix}segments"], row[f"{prefix}positions"]
        begin = 0
        for number, size in enumerate(sizes, start=1):
            end = begin + size
            numbers[begin:end], positions[begin:end] = number, np.arange(size)
            begin = end
    _fill(row, segments)
    return row


def _fill(row: Row, segments: Sequence[Segment]) -> None:
    for name in segments[0] if segments else ():
        if name in ROWWISE:
            if (count := sum(name in segment for segment in segments)) > 1:
                raise ValueError(f"{count} examples with {name} in one row")
            row[name][...] = segments[0][name]
            continue
        values = [segment[name] for segment in segments]
        values = values[0] if len(values) == 1 else np.concatenate(values)
        row[name][: len(values)] = values


def sizes_of(segments: Iterable[Segment]) -> dict[str, int]:
    """Positions that segments take on each side."""
    segments = list(segments)
    return {
        side: sum(len(segment[side]) for segment in segments)
        for side in SIDES
        if segments and side in segments[0]
    }
