"""A label or a number for each text, or for each pair of texts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from t5x_lite.data.converters import Segment, Shapes, token_shapes
from t5x_lite.data.objectives.base import (
    DECODER,
    ENCODER,
    NONE,
    Examples,
    Objective,
    Sides,
    check_length,
)
from t5x_lite.data.objectives.records import TRIM, FromRecords, Records, check_too_long, framed
from t5x_lite.data.task_metrics import LABELS, VALUES
from t5x_lite.data.token_store import Tokenizer
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

Lengths = int | np.integer | Int[np.ndarray, "..."]  # of one text, or of each record's


@dataclasses.dataclass(frozen=True)
class LabelledText(Tokenizer):
    """The ids of `text`, of `text_pair` where there are two, and the number of `label`.

    Attributes:
      labels: names, or how many numbers from 0 on; None: any number.
      pair: whether there are two texts.
    """

    labels: tuple[str, ...] | int | None
    pair: bool

    @property
    def texts(self) -> tuple[str, ...]:
        """The fields that are text."""
        return ("text", "text_pair") if self.pair else ("text",)

    @property
    def fields(self) -> tuple[str, ...]:
        """As in `Tokenizer`."""
        return (*self.texts, "label")

    @property
    def columns(self) -> Mapping[str, str | None]:
        """As in `Tokenizer`."""
        return dict.fromkeys(self.texts) | {"label": "float32" if self.labels is None else "int32"}

    def tokenize(
        self, records: Sequence[Mapping[str, str]], vocabulary: Vocabulary
    ) -> list[tuple[Any, ...]]:
        """As in `Tokenizer`. Raises UserError for a label that isn't one."""
        columns = [vocabulary.encode_all([r[name] for r in records]) for name in self.texts]
        labels = [[self._number(record)] for record in records]
        return list(zip(*columns, labels, strict=True))

    def _number(self, record: Mapping[str, str]) -> int | float:
        label = record["label"].strip()
        try:
            if self.labels is None:
                number = float(label)
                if math.isfinite(number):
                    return number
            elif isinstance(self.labels, int):
                number = int(label)
                if 0 <= number < self.labels:
                    return number
            else:
                return self.labels.index(label)
        except ValueError:
            pass
        raise UserError(
            f"label {label!r} of {record['text'][:40]!r} isn't {_named(self.labels)}; mend it, "
            f"name it in `labels`, or choose records by preprocessors.Keep."
        )


def _named(labels: tuple[str, ...] | int | None) -> str:
    if labels is None:
        return "a number"
    if isinstance(labels, int):
        return f"a whole number from 0 to {labels - 1}"
    more = ", …" if len(labels) > 3 else ""
    return f"one of {len(labels)} ({', '.join(labels[:3])}{more})"


@dataclasses.dataclass(frozen=True)
class _OfRow(Objective):
    """What classification and regression share: one example a row, one number each.

    Attributes:
      pair: whether a record has `text_pair` too.
      too_long: "trim" examples to the row, the longer text first, or "drop" them.
    """

    families: ClassVar[tuple[str, ...]] = (ENCODER, DECODER)
    packings: ClassVar[tuple[str, ...]] = (NONE,)
    packing: ClassVar[str] = NONE
    pair: bool = dataclasses.field(default=False, kw_only=True)
    too_long: str = dataclasses.field(default=TRIM, kw_only=True)
    family: str = dataclasses.field(default=ENCODER, kw_only=True)

    def __post_init__(self):
        check_too_long(self.too_long)
        if self.family not in self.families:
            raise UserError(f"family={self.family!r} must be one of {', '.join(self.families)}.")

    @property
    def outputs(self) -> int:
        """Numbers that the model's head must give for a row."""
        raise NotImplementedError

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        check_length(length, 8, "texts with begin and end")
        return {"tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        types = ("token_types",) if self._has_types else ()
        shapes = token_shapes(sides["tokens"], *types)
        del shapes["targets"], shapes["weights"]
        dtype = np.dtype(self.tokenizer.columns["label"])
        return shapes | {"labels": ((), dtype), "label_weights": ((), np.dtype(np.float32))}

    @property
    def _has_types(self) -> bool:
        return self.pair and self.family == ENCODER

    def examples(self, store: Records, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        before, between, after = _frame(vocabulary, self.family)
        room = sides["tokens"] - len(before) - len(after)
        texts = self.tokenizer.texts
        if self.pair:
            room -= len(between)

        def kept(lengths: Sequence[Lengths]) -> list[Lengths]:
            if self.pair:
                return list(longest_first(*lengths, room))
            return [np.minimum(lengths[0], room)]

        def make(columns: tuple[np.ndarray, ...]) -> Segment:
            *ids, label = columns
            ids = [row[:n] for row, n in zip(ids, kept([len(row) for row in ids]), strict=True)]
            first = framed(before, ids[0], between if self.pair else after)
            second = framed(ids[1], after) if self.pair else framed(())
            segment = {"tokens": framed(first, second), "labels": label[0]}
            if self._has_types:
                types = np.full(len(second), vocabulary.second_type)
                segment["token_types"] = framed(np.zeros(len(first)), types)
            return segment | {"label_weights": np.float32(1)}

        lengths = [store.lengths(name) for name in texts]
        ours = kept(lengths)
        sizes = sum(ours) + (sides["tokens"] - room)
        return FromRecords(
            store,
            make,
            sizes=np.expand_dims(sizes, 1),
            is_long=np.any(np.stack(ours) < np.stack(lengths), axis=0),
            too_long=self.too_long,
            room=f"{sides['tokens']:,} tokens",
        )


@dataclasses.dataclass(frozen=True)
class Classification(_OfRow):
    """`label` of `text`, or of the pair with `text_pair`; for a model with a SequenceClassifier.

    An encoder reads `cls text sep` or `cls text sep text_pair sep`, the second text being of type 1
    (Devlin et al. 2019, §4.1); a decoder `bos text eos` or `bos text eos text_pair eos`, and its
    answer stands at the last token (Radford et al. 2018, §3.3). Longer ones lose the end of the
    longer text.

    Attributes:
      labels: names in the order of their numbers, or how many: 0, 1, …
    """

    answers: ClassVar[str] = LABELS
    labels: Sequence[str] | int = 2

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.labels, int):
            object.__setattr__(self, "labels", tuple(map(str, self.labels)))
            twice = {name for name in self.labels if self.labels.count(name) > 1}
            if twice:
                raise UserError(f"label {min(twice)!r} is given twice; name each once.")
        if self.outputs < 2:
            raise UserError(f"labels={self.labels!r} leave nothing to choose; give at least 2.")

    @property
    def tokenizer(self) -> LabelledText:
        """As in `Objective`."""
        return LabelledText(self.labels, self.pair)

    @property
    def outputs(self) -> int:
        """As in `_OfRow`: one for each label."""
        return count_labels(self.labels)


@dataclasses.dataclass(frozen=True)
class Regression(_OfRow):
    """As `Classification`, but `label` is a number; for a SequenceClassifier of 1 label."""

    answers: ClassVar[str] = VALUES

    @property
    def tokenizer(self) -> LabelledText:
        """As in `Objective`."""
        return LabelledText(None, self.pair)

    @property
    def outputs(self) -> int:
        """As in `_OfRow`: the number itself."""
        return 1


def _frame(vocabulary: Vocabulary, family: str) -> tuple[tuple[int, ...], ...]:
    """What stands before, between and after the texts of a row."""
    if family == DECODER:
        vocabulary.require("eos_id")
        bos = () if vocabulary.bos_id is None else (vocabulary.bos_id,)
        return bos, (vocabulary.eos_id,), (vocabulary.eos_id,)
    vocabulary.require("cls_id", "sep_id")
    sep = (vocabulary.sep_id,)
    return (vocabulary.cls_id,), vocabulary.between_ids or sep, sep


def longest_first(first: Lengths, second: Lengths, room: int) -> tuple[Lengths, Lengths]:
    """How much is kept of two texts that share `room`: the longer loses until they are alike.

    As the `tokenizers` library has it: of an odd room the longer one keeps one more, and of two
    alike the second.
    """
    less, more = np.minimum(first, second), np.maximum(first, second)
    more = np.where(less + more > room, np.maximum(room - less, (room + 1) // 2), more)
    less = np.minimum(less, room - more)
    is_first_longer = np.asarray(first) > np.asarray(second)
    return np.where(is_first_longer, more, less), np.where(is_first_longer, less, more)


def read_labels(labels: str | Sequence[str] | int) -> tuple[str, ...] | int:
    """Labels as `Classification` wants them: what is given, or a file's lines, one name each.

    Raises:
      UserError: the file can't be read.
    """
    if not isinstance(labels, str):
        return labels if isinstance(labels, int) else tuple(labels)
    try:
        lines = Path(labels).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"can't read the labels' names in {labels!r} ({error}); give a text file with one a "
            f"line, a list of names, or their number."
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def count_labels(labels: str | Sequence[str] | int) -> int:
    """How many there are; for the model's head."""
    labels = read_labels(labels)
    return labels if isinstance(labels, int) else len(labels)
