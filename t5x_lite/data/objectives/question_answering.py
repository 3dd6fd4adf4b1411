"""Extractive question answering: where in a text the answer begins and ends."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from t5x_lite.data.converters import Segment, Shapes, token_shapes
from t5x_lite.data.objectives.base import ENCODER, NONE, Examples, NoiseOf, Objective, Sides
from t5x_lite.data.objectives.records import Records, framed
from t5x_lite.data.task_metrics import TEXT
from t5x_lite.data.token_store import Tokenizer
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class QuestionAndContext(Tokenizer):
    """The ids of `question` and `context`, and the answer's first and last token, -1 for none.

    `answers` is SQuAD's: {"text": […], "answer_start": […]}, characters counted from 0, or a list
    of {"text": …, "answer_start": …}. The first one counts; none at all: unanswerable (SQuAD 2).
    """

    fields: ClassVar[tuple[str, ...]] = ("question", "context", "answers")

    @property
    def columns(self) -> Mapping[str, str | None]:
        """As in `Tokenizer`."""
        return {"question": None, "context": None, "answer": "int32"}

    def tokenize(
        self, records: Sequence[Mapping[str, str]], vocabulary: Vocabulary
    ) -> list[tuple[Any, ...]]:
        """As in `Tokenizer`. Raises UserError where an answer isn't where the record says."""
        questions = vocabulary.encode_all([record["question"].strip() for record in records])
        made = []
        for question, record in zip(questions, records, strict=True):
            ids, offsets = vocabulary.encode_with_offsets(record["context"])
            made.append((question, ids, _tokens_of(_answer(record), offsets, record)))
        return made


def _answer(record: Mapping[str, str]) -> tuple[int, int] | None:
    """The first answer's characters begin..end-1."""
    try:
        answers = json.loads(record["answers"])
        if isinstance(answers, list):
            answers = {name: [a[name] for a in answers] for name in ("text", "answer_start")}
        if not answers["text"]:
            return None
        text, begin = str(answers["text"][0]), int(answers["answer_start"][0])
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"question {record['question'][:60]!r} has answers {record['answers'][:60]!r}, which "
            f'aren\'t {{"text": […], "answer_start": […]}} ({type(error).__name__}: {error}).'
        ) from error
    if not text or begin < 0 or record["context"][begin : begin + len(text)] != text:
        raise UserError(
            f"question {record['question'][:60]!r}: its answer {text[:40]!r} isn't at character "
            f"{begin} of the context; count characters from 0, before any change of the context."
        )
    return begin, begin + len(text)


def answer_texts(record: Mapping[str, str]) -> list[str]:
    """All the right answers of a stored record; none: unanswerable."""
    answers = json.loads(record["answers"])
    texts = [a["text"] for a in answers] if isinstance(answers, list) else answers["text"]
    return [str(text) for text in texts]


def _tokens_of(
    answer: tuple[int, int] | None, offsets: np.ndarray, record: Mapping[str, str]
) -> tuple[int, int]:
    if answer is None:
        return -1, -1
    inside = np.flatnonzero((offsets[:, 0] < answer[1]) & (offsets[:, 1] > answer[0]))
    if not len(inside):
        raise UserError(
            f"question {record['question'][:60]!r}: no token of the context holds its answer; "
            f"leave it out with preprocessors.Keep."
        )
    return int(inside[0]), int(inside[-1])


@dataclasses.dataclass(frozen=True)
class ExtractiveQA(Objective):
    """An answer's place in a context, for a QuestionAnswering head (Devlin et al. 2019, §4.2).

    The encoder reads `cls question sep context sep`, the context being of type 1. A context that is
    too long is read in windows that overlap, each an example of its own; where the answer isn't
    whole in a window, or there is none (§4.3), both its ends are at cls. An entry `spans` [B, 2]
    holds the answer's first and last position.

    Attributes:
      stride: tokens from the begin of a window to the next one's (BERT's doc_stride).
      question_length: a question's tokens at most; longer ones lose their end.
    """

    families: ClassVar[tuple[str, ...]] = (ENCODER,)
    packings: ClassVar[tuple[str, ...]] = (NONE,)
    packing: ClassVar[str] = NONE
    answers: ClassVar[str] = TEXT
    stride: int = 128
    question_length: int = 64

    def __post_init__(self):
        for name in ("stride", "question_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def tokenizer(self) -> Tokenizer:
        """As in `Objective`."""
        return QuestionAndContext()

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        least = self.question_length + 8
        if length < least:
            raise UserError(
                f"length={length} leaves no room for a context beside a question of "
                f"question_length={self.question_length}; give at least {least} or lower that."
            )
        return {"tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        shapes = token_shapes(sides["tokens"], "token_types")
        del shapes["targets"], shapes["weights"]
        more = {"spans": ((2,), np.dtype(np.int32)), "label_weights": ((), np.dtype(np.float32))}
        return shapes | more

    def examples(self, store: Records, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        vocabulary.require("cls_id", "sep_id")
        return _Windows(store, vocabulary, sides["tokens"], self)


class _Window(NamedTuple):
    """Tokens start..stop-1 of a record's context; or of each of several."""

    record: Any
    start: Any
    stop: Any


class _Windows:
    """Every record's windows, one after the other. As `Examples`."""

    are_sizes_fixed, is_noisy = True, False

    def __init__(
        self, store: Records, vocabulary: Vocabulary, length: int, objective: ExtractiveQA
    ):
        self._store, self._objective = store, objective
        sep = (vocabulary.sep_id,)
        self._cls, self._sep = (vocabulary.cls_id,), sep
        self._between, self._type = vocabulary.between_ids or sep, vocabulary.second_type
        self._frame = 2 + len(self._between)
        asked = store.lengths("question")
        self._questions = np.minimum(asked, objective.question_length)
        self._long = int((asked > self._questions).sum())
        self._contexts = store.lengths("context")
        self._room = length - self._frame - self._questions  # of each record's windows
        self._steps = np.minimum(objective.stride, self._room)  # no token is stepped over
        beyond = np.maximum(self._contexts - self._room, 0)
        counts = 1 + -(-beyond // self._steps)
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def sizes(self, noise_of: NoiseOf) -> np.ndarray:
        """As in `Examples`."""
        del noise_of
        windows = self._windows(np.arange(len(self)))
        sizes = self._frame + self._questions[windows.record] + windows.stop - windows.start
        return np.expand_dims(sizes, 1)

    def _windows(self, index: int | np.ndarray) -> _Window:
        record = np.searchsorted(self._firsts, index, side="right") - 1
        start = (index - self._firsts[record]) * self._steps[record]
        stop = np.minimum(start + self._room[record], self._contexts[record])
        return _Window(record, start, stop)

    def place(self, index: int) -> tuple[int, int, int, int]:
        """A window's record, its first token of the context and where the row has that, its end."""
        record, start, stop = map(int, self._windows(index))
        return record, start, self._frame - 1 + int(self._questions[record]), stop

    def segments(self, index: int, noise: np.random.Generator) -> list[Segment]:
        """As in `Examples`."""
        del noise
        window = _Window(*map(int, self._windows(index)))
        question, context, answer = self._store.read([window.record])[0]
        question = question[: self._objective.question_length]
        first = framed(self._cls, question, self._between)
        second = framed(context[window.start : window.stop], self._sep)
        begin, end = answer.tolist()
        is_inside = window.start <= begin and end < window.stop
        span = answer + len(first) - window.start if is_inside else np.zeros(2, np.int32)
        types = framed(np.zeros(len(first)), np.full(len(second), self._type))
        segment = {"tokens": framed(first, second), "token_types": types}
        return [segment | {"spans": span, "label_weights": np.float32(1)}]

    @functools.cached_property
    def note(self) -> str:
        """As of `records.FromRecords`."""
        records, limit = len(self._contexts), self._objective.question_length
        parts = []
        if self._long:
            parts.append(f"{self._long:,} questions are longer than {limit} tokens and are trimmed")
        if len(self) > records:
            parts.append(f"long contexts make {len(self):,} windows")
        return f"of {records:,} examples {'; '.join(parts)}" if parts else ""
