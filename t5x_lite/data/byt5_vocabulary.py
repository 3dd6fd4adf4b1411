"""ByT5's tokenizer (Xue et al. 2022), which no file holds: byte b is id b + 3."""

from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np

from t5x_lite.data.imported import ImportedVocabulary, Published
from t5x_lite.data.piece_vocabulary import name_pattern, split_at_names
from t5x_lite.data.vocabularies import Offsets, byte_offsets, checked_id
from t5x_lite.errors import UserError

FIRST = 3  # the id of byte 0
NAMES = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}  # ids 0, 1, 2
EXTRA = 125
ENDS = {"lstrip": True, "rstrip": True}  # the spaces that the first three take, unless files differ


class ByT5Vocabulary(ImportedVocabulary):
    """Bytes, three special ids before them and sentinels after them, the first one lowest.

    So `transformers` has it. ByT5 itself was trained with the ids of the last bytes as sentinels,
    258, 257, …, which have no names.
    """

    def __init__(self, published: Published):
        """Raises UserError where the files name other tokens than ByT5's."""
        published.default(NAMES, dict.fromkeys(NAMES.values(), ENDS))
        extra = published.extra or tuple(
            f"<extra_id_{n}>" for n in range(published.config.get("extra_ids", EXTRA))
        )
        special = [published.names.get(role) for role in NAMES]
        names = [*special, *(None,) * 256, *extra]
        self._marks = {name: i for i, name in enumerate(names) if name}
        for i, flags in published.added.items():
            if self._marks.get(flags["content"]) != i:
                raise UserError(
                    f"{published.folder / 'tokenizer_config.json'} gives {flags['content']!r} the "
                    f"id {i}, and ByT5's tokenizer {self._marks.get(flags['content'])}."
                )
            published.flags.setdefault(flags["content"], {})
            published.flags[flags["content"]] = flags
        self.size, self._names = len(names), {i: name for name, i in self._marks.items()}
        self._mark = name_pattern({n: published.flags.get(n, {}) for n in self._marks})
        self._identify(published, self._marks, self._names, ((), (1,)), {})
        self.fingerprint = published.fingerprint(kind="bytes")

    def encode(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        ids: list[int] = []
        for _, part, mark in split_at_names(text, self._mark):
            ids += self.encode_plain(part)
            ids += [self._marks[mark[mark.lastgroup]]] if mark else []
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """As in `Vocabulary`."""
        offsets = []
        for start, part, mark in split_at_names(text, self._mark):
            offsets.append(byte_offsets(part) + start)
            if mark:
                offsets.append(np.array([mark.span(mark.lastgroup)], np.int64))
        return self.encode(text), np.concatenate(offsets)

    def encode_plain(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        return [byte + FIRST for byte in text.encode()]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """As in `Vocabulary`; bytes that are no UTF-8 give nothing."""
        text = b""
        for i in self._spoken(ids):
            text += bytes([i - FIRST]) if FIRST <= i < FIRST + 256 else self._names[i].encode()
        return text.decode(errors="ignore")

    def piece(self, token: SupportsIndex) -> str:
        """As in `Vocabulary`."""
        number = checked_id(token, self.size)
        if number in self._names:
            return self._names[number]
        byte = number - FIRST
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"

    def byte_lengths(self) -> np.ndarray:
        """As in `Vocabulary`."""
        lengths = np.zeros(self.size, np.int32)
        lengths[FIRST : FIRST + 256] = 1
        return lengths
