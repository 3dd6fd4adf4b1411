"""Chat transcripts, with loss on what the assistant says."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from t5x_lite.data.chat import ChatTemplate
from t5x_lite.data.converters import Segment, Shapes, token_shapes
from t5x_lite.data.objectives.base import (
    BEST_FIT,
    DECODER,
    NONE,
    Examples,
    Objective,
    Sides,
    check_length,
)
from t5x_lite.data.objectives.records import TRIM, FromRecords, Records, check_too_long, framed
from t5x_lite.data.token_store import Tokenizer
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

PLAIN = "plain"
ASSISTANT = "assistant"
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Transcript(Tokenizer):
    """The ids of a record's `messages`: before its first answer, and from there on with 1 for each
    id that the assistant says.

    Attributes:
      template: as of `Chat`.
    """

    fields: ClassVar[tuple[str, ...]] = ("messages",)
    template: str | None

    @property
    def columns(self) -> Mapping[str, str | None]:
        """As in `Tokenizer`."""
        # Two columns of ids, so that their lengths tell where the first answer begins.
        return {"opening": None, "turns": None, "is_answer": "uint8"}

    def key(self, vocabulary: Vocabulary) -> str:
        """As in `Tokenizer`: the template's text counts, not where it lies."""
        template = self._load(vocabulary)
        source = PLAIN if template is None else hashlib.sha256(template.key.encode()).hexdigest()
        return f"{type(self).__name__}({source})"

    def _load(self, vocabulary: Vocabulary) -> ChatTemplate | None:
        """None: the format of our own."""
        folder = getattr(vocabulary, "folder", None)  # an imported vocabulary's
        if self.template == PLAIN:
            return None
        if self.template is not None:
            path = Path(self.template)
            return ChatTemplate.read(path, folder) if path.is_file() else ChatTemplate.load(path)
        return None if folder is None else ChatTemplate.find(folder)

    def tokenize(
        self, records: Sequence[Mapping[str, str]], vocabulary: Vocabulary
    ) -> list[tuple[Any, ...]]:
        """As in `Tokenizer`. Raises UserError where a record has no messages, or others."""
        template = self._load(vocabulary)
        made = []
        for record in records:
            messages = _messages(record["messages"])
            try:
                if template is None:
                    ids, is_answer = plain(messages, vocabulary)
                else:
                    ids, is_answer = templated(messages, template, vocabulary)
            except UserError as error:
                raise UserError(f"chat {record['messages'][:60]!r}: {error}") from error
            first = int(np.argmax(is_answer)) if any(is_answer) else len(ids)
            made.append((ids[:first], ids[first:], is_answer[first:]))
        return made


def _messages(text: str) -> list[Message]:
    try:
        messages = json.loads(text)
    except ValueError:
        messages = None
    is_list = isinstance(messages, list) and messages
    if not is_list or any(not isinstance(m, dict) or "role" not in m for m in messages):
        raise UserError(
            f'messages {text[:60]!r} aren\'t a list of {{"role": …, "content": …}}; mend them, or '
            f"name another field by preprocessors.Rename."
        )
    return messages


def plain(
    messages: Sequence[Message], vocabulary: Vocabulary
) -> tuple[Sequence[int], Sequence[int]]:
    """`bos`, then `role: content eos` for each message; for models without a template.

    Returns:
      Ids, and 1 where the assistant speaks: its contents and their eos. No text becomes a special
      id, so that nobody speaks in another's place.

    Raises:
      UserError: a content that isn't text.
    """
    vocabulary.require("eos_id")
    ids = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    is_answer = [0] * len(ids)
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str):
            raise UserError(f"content {str(content)[:40]!r} of {message['role']} isn't text.")
        head = vocabulary.encode_plain(f"{message['role']}: ")
        body = [*vocabulary.encode_plain(content), vocabulary.eos_id]
        ids += head + body
        is_answer += [0] * len(head) + [int(message["role"] == ASSISTANT)] * len(body)
    return ids, is_answer


def templated(
    messages: Sequence[Message], template: ChatTemplate, vocabulary: Vocabulary
) -> tuple[Sequence[int], np.ndarray]:
    """Ids of a chat by a published template, and 1 where the assistant speaks.

    Raises:
      UserError: the template refuses the messages, or doesn't show which text is an answer.
    """
    text, answers = template.render_answers(messages)
    ids, offsets = vocabulary.encode_with_offsets(text)
    is_answer = np.zeros(len(ids), np.uint8)
    for begin, end in answers:
        is_answer[(offsets[:, 0] < end) & (offsets[:, 1] > begin)] = 1
    return ids, is_answer


@dataclasses.dataclass(frozen=True)
class Chat(Objective):
    """Chats as [{"role": …, "content": …}, …] in `messages`; only the assistant's turns bear loss.

    What a published template marks by `{% generation %}` is the assistant's; else what it writes
    after the prompt for an answer, to the end of that turn.

    Attributes:
      template: a file in Jinja or a published model's folder; "plain": `role: content eos` for each
        message; None: the vocabulary's own template, or plain where it has none.
      too_long: "trim" or "drop" chats that don't fit; one whose first answer lies beyond the row's
        end is left out either way.
      packing: "best_fit": several chats a row; "none": one.
    """

    families: ClassVar[tuple[str, ...]] = (DECODER,)
    packings: ClassVar[tuple[str, ...]] = (BEST_FIT, NONE)
    template: str | None = None
    too_long: str = TRIM
    packing: str = dataclasses.field(default=BEST_FIT, kw_only=True)

    def __post_init__(self):
        self._check_packing(self.packing)
        check_too_long(self.too_long)

    @property
    def tokenizer(self) -> Tokenizer:
        """As in `Objective`."""
        return Transcript(self.template)

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        check_length(length, 2, "a chat")
        return {"tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        return token_shapes(sides["tokens"])

    def examples(self, store: Records, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`."""
        del vocabulary
        length = sides["tokens"]
        opening, turns = store.lengths("opening"), store.lengths("turns")
        wanted = np.maximum(opening + turns - 1, 0)  # each id but the first is a target

        def make(columns: tuple[np.ndarray, ...]) -> Segment:
            opening, turns, is_answer = columns
            ids = framed(opening, turns)[: length + 1]
            weights = np.concatenate([np.zeros(len(opening)), is_answer]).astype(np.float32)
            return {"tokens": ids[:-1], "targets": ids[1:], "weights": weights[1 : len(ids)]}

        return FromRecords(
            store,
            make,
            sizes=np.expand_dims(np.minimum(wanted, length), 1),
            is_long=wanted > length,
            too_long=self.too_long,
            room=f"{length:,} tokens",
            is_useless=(turns == 0) | (opening > length) | (wanted == 0),
        )
