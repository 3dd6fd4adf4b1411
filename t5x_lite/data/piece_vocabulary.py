"""An imported sentencepiece model, with the ids that its family puts around it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from t5x_lite.data.imported import JSON, RESAVE, Frame, ImportedVocabulary, Published
from t5x_lite.data.vocabularies import Offsets, SentencePieceVocabulary, checked_id, read_model
from t5x_lite.errors import UserError

# Pieces of a sentencepiece model whose ids fairseq changed: the others are one higher.
FAIRSEQ = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
FAIRSEQ_CLASSES = ("XLMRobertaTokenizer",)
T5_CLASSES = ("T5Tokenizer", "MT5Tokenizer")
PLAIN_CLASSES = ("LlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer", "TokenizersBackend", "")
CLASS_OF = {
    **dict.fromkeys(("t5", "mt5", "umt5"), "T5Tokenizer"),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), "XLMRobertaTokenizer"),
}
# ModelProto.normalizer_spec.add_dummy_prefix = false, as protocol buffers write it. What follows a
# serialised message is merged into it, so this turns off the space before a text.
NO_PREFIX = b"\x1a\x02\x18\x00"


class PieceVocabulary(ImportedVocabulary):
    """A sentencepiece model with its family's ids around it: T5's sentinels, XLM-R's offset.

    Text is what sentencepiece itself makes of it. Between special tokens it begins anew, with the
    space that the model puts before a text; in Llama's only at the very start.
    """

    def __init__(self, file: Path, published: Published):
        """Raises UserError where it isn't sentencepiece, or the family's ids aren't known."""
        model = read_model(file)
        kind = published.tokenizer_class or CLASS_OF.get(published.model_type, "")
        if kind not in (*FAIRSEQ_CLASSES, *T5_CLASSES, *PLAIN_CLASSES):
            raise UserError(
                f"{file} belongs to a {kind}, whose ids aren't those of its sentencepiece model; "
                f"{JSON} is needed: {RESAVE}."
            )
        self._own = SentencePieceVocabulary(model, 0)
        self._unprefixed = SentencePieceVocabulary(model + NO_PREFIX, 0)
        self._id_of = self._ids_of_pieces(kind)
        self._piece_of = {i: n for n, i in enumerate(self._id_of)}
        pieces = {self._own.piece(n): i for n, i in enumerate(self._id_of)}
        added = _added_pieces(kind, published, pieces)
        names = pieces | {flags["content"]: i for i, flags in added.items()}
        self.size = max(names.values()) + 1
        self._name_of = {i: name for name, i in names.items()}
        special = {self._id_of[n] for n in self._own.control_pieces()}
        special |= {i for i, flags in added.items() if flags["special"]}
        roles = {"pad": "<pad>", "mask": "<mask>"} if kind in FAIRSEQ_CLASSES else {}
        own = {role: names[name] for role, name in roles.items()} | {
            role: self._id_of[n] for role, n in self._own.role_ids().items()
        }
        self._identify(published, names, special, _frame_of(kind, names), own)
        if kind in FAIRSEQ_CLASSES:
            self.between_ids, self.second_type = (names["</s>"],) * 2, 0
        self._always = kind not in ("LlamaTokenizer",) or bool(published.config.get("legacy"))
        parsed = {self._name_of[i]: {} for i in self._special} | {
            flags["content"]: flags for flags in added.values()
        }
        self._mark, self._marks = name_pattern(parsed), {name: names[name] for name in parsed}
        self.fingerprint = published.fingerprint(file)

    def _ids_of_pieces(self, kind: str) -> list[int]:
        count = self._own.size
        if kind not in FAIRSEQ_CLASSES:
            return list(range(count))
        return [FAIRSEQ.get(self._own.piece(n), n + 1) for n in range(count)]

    def encode(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        ids: list[int] = []
        for start, part, mark in split_at_names(text, self._mark):
            ids += self._encode_between(part, start == 0)
            ids += [self._marks[mark[mark.lastgroup]]] if mark else []
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """As in `Vocabulary`."""
        ids, offsets = [], [np.zeros((0, 2), np.int64)]
        for start, part, mark in split_at_names(text, self._mark):
            own, places = self._processor(start == 0).encode_with_offsets(part)
            ids += [self._id_of[piece] for piece in own]
            offsets.append(places + start)
            if mark:
                ids.append(self._marks[mark[mark.lastgroup]])
                offsets.append(np.array([mark.span(mark.lastgroup)], np.int64))
        return ids, np.concatenate(offsets)

    def encode_plain(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        return self._encode_between(text, True)

    def _encode_between(self, text: str, is_first: bool) -> list[int]:
        return [self._id_of[piece] for piece in self._processor(is_first).encode(text)]

    def _processor(self, is_first: bool) -> SentencePieceVocabulary:
        return self._own if is_first or self._always else self._unprefixed

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """As in `Vocabulary`."""
        text, run = "", []
        for i in self._spoken(ids):
            if i in self._piece_of:
                run.append(self._piece_of[i])
            else:
                text += self._decode_run(run, not text) + self._name_of.get(i, "")
                run = []
        return text + self._decode_run(run, not text)

    def _decode_run(self, run: list[int], is_first: bool) -> str:
        """A run's text; only the first one lacks the space before it."""
        return (self._own if is_first else self._unprefixed).decode(run)

    def piece(self, token: SupportsIndex) -> str:
        """As in `Vocabulary`."""
        number = checked_id(token, self.size)
        return self._name_of.get(number, f"<unused {number}>")

    def byte_lengths(self) -> np.ndarray:
        """As in `Vocabulary`."""
        lengths = np.zeros(self.size, np.int32)
        lengths[self._id_of] = self._own.byte_lengths()
        for i in set(self._name_of) - set(self._piece_of):
            lengths[i] = len(self._name_of[i].encode())
        lengths[sorted(self._special)] = 0
        return lengths


def _added_pieces(
    kind: str, published: Published, pieces: Mapping[str, int]
) -> dict[int, dict[str, Any]]:
    """Tokens that aren't pieces, or have flags, by id: sentinels, then what the files add."""
    after = max(pieces.values()) + 1
    sentinels = published.config.get("extra_ids", 100) if kind in T5_CLASSES else 0
    names = [f"<extra_id_{n}>" for n in reversed(range(sentinels))]
    if kind in FAIRSEQ_CLASSES:
        names.append("<mask>")
    added = {after + n: {"content": name, "special": True} for n, name in enumerate(names)}
    if kind in FAIRSEQ_CLASSES:
        added |= {i: {"content": name, "special": True} for name, i in FAIRSEQ.items()}
    known = {**pieces, **{flags["content"]: i for i, flags in added.items()}}
    for i, flags in published.added.items():
        if known.get(flags["content"], i) != i:
            raise UserError(
                f"{published.folder / 'tokenizer_config.json'} gives {flags['content']!r} the id "
                f"{i}, and the sentencepiece model {known[flags['content']]}; {JSON} is needed: "
                f"{RESAVE}."
            )
        added[i] = {"special": False, **flags}
        known[flags["content"]] = i
    for name in (*published.names.values(), *published.extra):
        if name not in known:
            known[name] = max(known.values()) + 1
            added[known[name]] = {"content": name, "special": True}
    return added


def _frame_of(kind: str, names: Mapping[str, int]) -> Frame:
    if kind in FAIRSEQ_CLASSES:
        return (names["<s>"],), (names["</s>"],)
    return (), ((names["</s>"],) if kind in T5_CLASSES else ())


def split_at_names(text: str, names: re.Pattern) -> Iterator[tuple[int, str, re.Match[str] | None]]:
    """Where each part between names begins, the part, and the name after it but for the last."""
    start = 0
    for mark in names.finditer(text):
        yield start, text[start : mark.start()], mark
        start = mark.end()
    yield start, text[start:], None


def name_pattern(parsed: Mapping[str, Mapping[str, Any]]) -> re.Pattern:
    """Finds the longest name at each place, in a group of its own, with the spaces it takes."""
    parts = []
    for n, name in enumerate(sorted(parsed, key=len, reverse=True)):
        left = r"\s*" if parsed[name].get("lstrip") else ""
        right = r"\s*" if parsed[name].get("rstrip") else ""
        parts.append(f"{left}(?P<t{n}>{re.escape(name)}){right}")
    return re.compile("|".join(parts) or r"(?!)")
