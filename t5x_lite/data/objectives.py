"""What a model is asked to predict: documents in, rows of fixed length out.

An objective cuts a stream of tokens into windows and makes one row from each. Windows are addressed
by index and noise is given as a generator, so a row is a pure function of (store, index, noise).
Row keys are those of `types.Batch` without the batch axis.
"""

import dataclasses
import math
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from t5x_lite.data.streams import Documents, Stream
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

Row = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


@runtime_checkable
class Examples(Protocol):
    """Rows of one split under one objective."""

    def __len__(self) -> int:
        """Rows in an epoch."""
        ...

    def row(self, index: int, noise: np.random.Generator) -> Row:
        """Row `index`; the same noise gives the same row."""
        ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base of the objectives. `family`, a `ModelConfig.kind`, says which models it fits."""

    family: ClassVar[str]

    def shapes(self, length: int) -> Shapes:
        """Shape and dtype of every entry of a row. Raises UserError where `length` is too small."""
        raise NotImplementedError

    def examples(self, documents: Documents, vocabulary: Vocabulary, length: int) -> Examples:
        """Rows of `length`. Raises UserError where the vocabulary lacks an id that it needs."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Predict the next token of `bos + document + eos`, documents end to end.

    Window i holds stream[iL : iL+L] and its targets are one later; documents are segments with
    positions of their own. A bos is never a target that counts, every other token is one once.
    """

    family: ClassVar[str] = "decoder-only"

    def shapes(self, length: int) -> Shapes:
        """As in `Objective`."""
        _at_least(length, 2, "causal language model")
        return _token_shapes(length)

    def examples(self, documents: Documents, vocabulary: Vocabulary, length: int) -> Examples:
        """As in `Objective`."""
        vocabulary.require("bos_id", "eos_id")
        return _CausalRows(documents, vocabulary, length)


class _CausalRows:
    def __init__(self, documents: Documents, vocabulary: Vocabulary, length: int):
        self._stream = Stream(documents, (vocabulary.bos_id,), (vocabulary.eos_id,))
        self._bos, self._length = vocabulary.bos_id, length

    def __len__(self) -> int:
        return -(-max(len(self._stream) - 1, 0) // self._length)

    def row(self, index: int, noise: np.random.Generator) -> Row:
        del noise
        start = index * self._length
        piece = self._stream.read(start, start + self._length + 1)
        targets, documents = piece.ids[1:], piece.documents[:-1]
        # A model whose bos is also its eos (GPT-2's) must still learn to end: ask for the document.
        begins = (targets == self._bos) & (piece.documents[1:] != documents)
        row = {
            "tokens": piece.ids[:-1],
            "targets": targets,
            "weights": (~begins).astype(np.float32),
            "segments": documents - documents[0] + 1,
            "positions": _positions(documents),
        }
        return _padded(row, _token_shapes(self._length))


@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
    """BERT's masked language model (Devlin et al. 2019 §3.1): `cls + window + sep`, one segment.

    `density` of the tokens are chosen (rounded, at least one); `masked` of these become the mask,
    `randomised` a random ordinary token, the rest stay. Only chosen tokens have weight.
    """

    family: ClassVar[str] = "encoder-only"
    density: float | int = 0.15
    masked: float | int = 0.8
    randomised: float | int = 0.1

    def __post_init__(self):
        _fraction("density", self.density)
        if min(self.masked, self.randomised) < 0 or self.masked + self.randomised > 1:
            raise UserError(
                f"masked={self.masked} and randomised={self.randomised} must be at least 0 and "
                f"at most 1 together; BERT has 0.8 and 0.1."
            )

    def shapes(self, length: int) -> Shapes:
        """As in `Objective`."""
        _at_least(length, 4, "masked language model")
        return _token_shapes(length)

    def examples(self, documents: Documents, vocabulary: Vocabulary, length: int) -> Examples:
        """As in `Objective`."""
        vocabulary.require("cls_id", "sep_id", "mask_id")
        return _MaskedRows(self, documents, vocabulary, length)


class _MaskedRows:
    def __init__(
        self, objective: MaskedLM, documents: Documents, vocabulary: Vocabulary, length: int
    ):
        self._stream = Stream(documents)
        self._objective, self._vocabulary, self._length = objective, vocabulary, length

    def __len__(self) -> int:
        return -(-len(self._stream) // (self._length - 2))

    def row(self, index: int, noise: np.random.Generator) -> Row:
        inner, vocabulary = self._length - 2, self._vocabulary
        ids = self._stream.read(index * inner, (index + 1) * inner).ids
        noisy, chosen = mask_tokens(ids, vocabulary, self._objective, noise)
        row = {
            "tokens": np.concatenate([[vocabulary.cls_id], noisy, [vocabulary.sep_id]]),
            "targets": np.concatenate([[vocabulary.cls_id], ids, [vocabulary.sep_id]]),
            "weights": np.concatenate([[0], chosen, [0]]),
            "segments": np.ones(len(ids) + 2),
            "positions": np.arange(len(ids) + 2),
        }
        return _padded(row, _token_shapes(self._length))


def mask_tokens(
    ids: Int[np.ndarray, " n"],
    vocabulary: Vocabulary,
    objective: MaskedLM,
    noise: np.random.Generator,
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The noisy ids and which were chosen. Special ids are never chosen."""
    candidates = np.flatnonzero(~np.isin(ids, vocabulary.special_ids))
    count = min(len(candidates), max(1, round(objective.density * len(candidates))))
    chosen = np.sort(noise.choice(candidates, count, replace=False)) if count else candidates
    fate = noise.random(count)
    random_ids = noise.choice(vocabulary.ordinary_ids, count)
    noisy = ids.copy()
    is_masked = fate < objective.masked
    is_random = ~is_masked & (fate < objective.masked + objective.randomised)
    noisy[chosen[is_masked]] = vocabulary.mask_id
    noisy[chosen[is_random]] = random_ids[is_random]
    was_chosen = np.zeros(len(ids), bool)
    was_chosen[chosen] = True
    return noisy, was_chosen


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """T5's span corruption (Raffel et al. 2020 §3.1.4): spans give way to sentinels.

    Each window holds as many raw tokens as fill the encoder's `length` exactly. The decoder gives
    each sentinel and what it stands for; both sides end with eos. One segment a row.
    """

    family: ClassVar[str] = "encoder-decoder"
    density: float | int = 0.15
    mean_span: float | int = 3

    def __post_init__(self):
        _fraction("density", self.density)
        if self.mean_span < 1:
            raise UserError(f"mean_span={self.mean_span} must be at least 1 token; T5 has 3.")

    def lengths(self, length: int) -> tuple[int, int]:
        """Raw tokens of a window and target tokens, for an encoder of `length`."""
        return span_corruption_lengths(length, self.density, self.mean_span)

    def shapes(self, length: int) -> Shapes:
        """As in `Objective`."""
        _at_least(length, 4, "span corruption's encoder")
        _, targets = self.lengths(length)
        encoder = ("tokens", "segments", "positions")
        shapes = {f"encoder_{name}": ((length,), np.dtype(np.int32)) for name in encoder}
        return shapes | _token_shapes(targets)

    def examples(self, documents: Documents, vocabulary: Vocabulary, length: int) -> Examples:
        """As in `Objective`."""
        vocabulary.require("eos_id")
        raw, _ = self.lengths(length)
        needed = _spans(raw, self.density, self.mean_span)[1]
        if needed > len(vocabulary.sentinel_ids):
            raise UserError(
                f"a window of {raw} tokens needs {needed} sentinels and the vocabulary has "
                f"{len(vocabulary.sentinel_ids)}; raise extra_ids to {needed} or lower the length."
            )
        return _SpanRows(self, documents, vocabulary, length)


class _SpanRows:
    def __init__(
        self, objective: SpanCorruption, documents: Documents, vocabulary: Vocabulary, length: int
    ):
        self._stream = Stream(documents)
        self._objective, self._vocabulary = objective, vocabulary
        self._raw, _ = objective.lengths(length)
        self._shapes = objective.shapes(length)

    def __len__(self) -> int:
        return -(-len(self._stream) // self._raw)

    def row(self, index: int, noise: np.random.Generator) -> Row:
        ids = self._stream.read(index * self._raw, (index + 1) * self._raw).ids
        is_noise = random_spans(len(ids), self._objective.density, self._objective.mean_span, noise)
        inputs, targets = corrupt(ids, is_noise, np.array(self._vocabulary.sentinel_ids, np.int32))
        eos = [self._vocabulary.eos_id]
        inputs, targets = np.concatenate([inputs, eos]), np.concatenate([targets, eos])
        row = {
            "encoder_tokens": inputs,
            "encoder_segments": np.ones(len(inputs)),
            "encoder_positions": np.arange(len(inputs)),
            # the decoder starts with the pad id, as T5 does
            "tokens": np.concatenate([[0], targets[:-1]]),
            "targets": targets,
            "weights": np.ones(len(targets)),
            "segments": np.ones(len(targets)),
            "positions": np.arange(len(targets)),
        }
        return _padded(row, self._shapes)


def span_corruption_lengths(
    inputs_length: int, density: float | int = 0.15, mean_span: float | int = 3
) -> tuple[int, int]:
    """(raw, targets): the most raw tokens whose corrupted form fits, and its targets' length.

    Both sides count one eos. 512 at 0.15 and 3 gives (568, 114), as in T5.
    """

    def sides(raw: int) -> tuple[int, int]:
        noise, spans = _spans(raw, density, mean_span)
        return raw - noise + spans + 1, noise + spans + 1

    raw = 2
    while sides(raw + 1)[0] <= inputs_length:
        raw += 1
        if sides(raw)[1] > 64 * inputs_length:  # spans so long that more text adds no input
            raise UserError(f"density={density} leaves no input to read; T5 has 0.15.")
    return raw, sides(raw)[1]


def _spans(raw: int, density: float | int, mean_span: float | int) -> tuple[int, int]:
    """Noise tokens and spans in `raw` tokens; at least one of each, and one token left alone."""
    noise = min(max(round(raw * density), 1), raw - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, raw - noise) if noise else 0


def random_spans(
    n: int, density: float | int, mean_span: float | int, noise: np.random.Generator
) -> Bool[np.ndarray, " n"]:
    """Which of n tokens are noise: a fixed number of tokens and spans, never the first token.

    Lengths of the spans and of the gaps before them are uniform over the ways to cut, as in T5.
    """
    noisy, spans = _spans(n, density, mean_span)
    if spans == 0:
        return np.zeros(n, bool)
    gaps = _random_cut(n - noisy, spans, noise)
    lengths = _random_cut(noisy, spans, noise)
    runs = np.stack([gaps, lengths], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, runs)


def _random_cut(total: int, parts: int, noise: np.random.Generator) -> np.ndarray:
    cuts = np.sort(noise.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt(
    ids: Int[np.ndarray, " n"], is_noise: Bool[np.ndarray, " n"], sentinels: Int[np.ndarray, " s"]
) -> tuple[Int[np.ndarray, " i"], Int[np.ndarray, " t"]]:
    """Inputs (each noise span as one sentinel) and targets (each sentinel, then its span).

    Raises:
      UserError: more spans than sentinels.
    """
    begins = is_noise & ~np.concatenate([[False], is_noise[:-1]])
    spans = int(begins.sum())
    if spans > len(sentinels):
        raise UserError(f"{spans} spans but {len(sentinels)} sentinels; raise extra_ids.")
    inputs = ids.copy()
    inputs[begins] = sentinels[:spans]
    inputs = inputs[begins | ~is_noise]
    noise_ids, first_of = ids[is_noise], np.flatnonzero(begins[is_noise])
    return inputs, np.insert(noise_ids, first_of, sentinels[:spans])


def _token_shapes(length: int) -> Shapes:
    shapes = {name: ((length,), np.dtype(np.int32)) for name in ("tokens", "targets")}
    shapes["weights"] = ((length,), np.dtype(np.float32))
    return shapes | {name: ((length,), np.dtype(np.int32)) for name in ("segments", "positions")}


def empty_row(shapes: Shapes) -> Row:
    """A row of padding alone: no segment, no weight."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}


def _padded(row: Row, shapes: Shapes) -> Row:
    padded = empty_row(shapes)
    for name, values in row.items():
        padded[name][: len(values)] = values
    return padded


def _positions(documents: np.ndarray) -> np.ndarray:
    """0, 1, … from the start of each run of equal numbers."""
    here = np.arange(len(documents))
    begins = np.concatenate([[True], documents[1:] != documents[:-1]])
    return here - np.maximum.accumulate(np.where(begins, here, 0))


def _at_least(length: int, least: int, what: str) -> None:
    if length < least:
        raise UserError(f"length={length} is too small for a {what}; give at least {least}.")


def _fraction(name: str, value: float | int) -> None:
    if not (math.isfinite(value) and 0 < value < 1):
        raise UserError(f"{name}={value} must lie between 0 and 1, without them; try 0.15.")
