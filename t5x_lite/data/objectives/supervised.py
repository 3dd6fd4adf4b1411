"""Text in, text out: supervised tasks as T5 has them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from t5x_lite.data.converters import (
    Segment,
    Shapes,
    decoder,
    encoder_decoder,
    prefix_decoder,
    token_shapes,
)
from t5x_lite.data.objectives.base import (
    BEST_FIT,
    BOTH,
    DECODER,
    NONE,
    Examples,
    Objective,
    Sides,
    check_length,
)
from t5x_lite.data.objectives.records import TRIM, FromRecords, Records, check_too_long, framed
from t5x_lite.data.task_metrics import TEXT
from t5x_lite.data.token_store import Tokenizer
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

CAUSAL, BOTH_WAYS = "causal", "both_ways"
Lengths = int | np.integer | Int[np.ndarray, "..."]  # of one example, or of each


@dataclasses.dataclass(frozen=True)
class Pairs(Tokenizer):
    """The ids of a record's `inputs` and of its `targets`."""

    fields: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    @property
    def columns(self) -> Mapping[str, str | None]:
        """As in `Tokenizer`."""
        return dict.fromkeys(self.fields)

    def tokenize(
        self, records: Sequence[Mapping[str, str]], vocabulary: Vocabulary
    ) -> list[tuple[Any, ...]]:
        """As in `Tokenizer`."""
        columns = [vocabulary.encode_all([r[name] for r in records]) for name in self.fields]
        return list(zip(*columns, strict=True))


@dataclasses.dataclass(frozen=True)
class TextToText(Objective):
    """`targets` from `inputs`, with loss on the targets alone (Raffel et al. 2020, §2.4).

    An encoder reads `inputs + eos`, its decoder gives `targets + eos`. A decoder alone reads the
    inputs and goes on with `targets + eos`; it begins with bos, or padding where there is none.
    What doesn't fit is cut at its end, eos and all, as by seqio's `append_eos`: the model doesn't
    learn to stop there. In a decoder's row, which both share, each side gets what the other leaves,
    and nothing is cut that needn't be.

    Attributes:
      targets_length: positions of an encoder-decoder's targets, None for as many as the inputs';
        what a decoder's targets get where both are too long, None for half of the row.
      inputs_see: in a decoder, "causal", or "both_ways" as in a prefix LM (§3.2.1).
      end_inputs: whether inputs end with eos; None: those of an encoder, so that a decoder's prompt
        goes on with its answer.
      too_long: "trim" or "drop" examples that don't fit.
      family: "encoder-decoder" or "decoder-only"; set for the model by itself.
      packing: "best_fit": several examples a row; "none": one.
    """

    families: ClassVar[tuple[str, ...]] = (BOTH, DECODER)
    packings: ClassVar[tuple[str, ...]] = (BEST_FIT, NONE)
    answers: ClassVar[str] = TEXT
    targets_length: int | None = None
    inputs_see: str = CAUSAL
    end_inputs: bool | None = None
    too_long: str = TRIM
    family: str = dataclasses.field(default=BOTH, kw_only=True)
    packing: str = dataclasses.field(default=BEST_FIT, kw_only=True)

    def __post_init__(self):
        if self.family not in self.families:
            raise UserError(f"family={self.family!r} must be one of {', '.join(self.families)}.")
        self._check_packing(self.packing)
        check_too_long(self.too_long)
        if self.inputs_see not in (CAUSAL, BOTH_WAYS):
            raise UserError(
                f"inputs_see={self.inputs_see!r} is unknown; use {CAUSAL!r} or {BOTH_WAYS!r}."
            )
        if self.targets_length is not None and self.targets_length < 1:
            raise UserError(f"targets_length={self.targets_length} must be at least 1.")

    @property
    def tokenizer(self) -> Tokenizer:
        """As in `Objective`."""
        return Pairs()

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        check_length(length, 2, "inputs and targets")
        if self.family == DECODER:
            return {"tokens": length}
        return {"tokens": self.targets_length or length, "encoder_tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        if self.family == DECODER:
            prefix = ("prefix",) if self.inputs_see == BOTH_WAYS else ()
            return token_shapes(sides["tokens"], *prefix)
        encoder_side = token_shapes(sides["encoder_tokens"], side="encoder_")
        return encoder_side | token_shapes(sides["tokens"])

    def examples(self, store: Records, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        vocabulary.require("eos_id")
        eos = (vocabulary.eos_id,)
        after_inputs = eos if self._ends_inputs else ()

        def make(columns: tuple[np.ndarray, ...]) -> Segment:
            inputs, targets = framed(columns[0], after_inputs), framed(columns[1], eos)
            room = self._room(len(inputs), len(targets), sides)
            return self._segment(inputs[: room[0]], targets[: room[1]], vocabulary)

        inputs, targets = store.lengths("inputs") + len(after_inputs), store.lengths("targets") + 1
        kept = self._room(inputs, targets, sides)
        both = [kept[0] + kept[1]] if self.family == DECODER else [kept[1], kept[0]]
        return FromRecords(
            store,
            make,
            sizes=np.stack(both, axis=1),
            is_long=(kept[0] < inputs) | (kept[1] < targets),
            too_long=self.too_long,
            room=_room_name(sides),
        )

    @property
    def _ends_inputs(self) -> bool:
        return self.family == BOTH if self.end_inputs is None else self.end_inputs

    def _room(self, inputs: Lengths, targets: Lengths, sides: Sides) -> tuple[Lengths, Lengths]:
        """How much of inputs and of targets is kept."""
        if self.family == BOTH:
            return np.minimum(inputs, sides["encoder_tokens"]), np.minimum(targets, sides["tokens"])
        row = sides["tokens"]
        share = min(self.targets_length or row // 2, row)
        targets = np.minimum(targets, np.maximum(share, row - inputs))
        return np.minimum(inputs, row - targets), targets

    def _segment(self, inputs: np.ndarray, targets: np.ndarray, vocabulary: Vocabulary) -> Segment:
        if self.family == BOTH:
            return encoder_decoder(inputs, targets, vocabulary.start_id)
        bos = vocabulary.bos_id if vocabulary.bos_id is not None else vocabulary.pad_id
        convert = prefix_decoder if self.inputs_see == BOTH_WAYS else decoder
        return convert(inputs, targets, bos)


def _room_name(sides: Sides) -> str:
    if "encoder_tokens" in sides:
        return f"{sides['encoder_tokens']:,} inputs or {sides['tokens']:,} targets"
    return f"{sides['tokens']:,} tokens"
