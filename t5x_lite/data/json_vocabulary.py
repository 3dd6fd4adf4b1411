"""An imported tokenizer of the `tokenizers` library: byte-level BPE, WordPiece, Unigram, …"""

import contextlib
import functools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from t5x_lite.data.imported import JSON, Frame, ImportedVocabulary, Published
from t5x_lite.data.vocabularies import Offsets, checked_id
from t5x_lite.errors import UserError


def read(file: Path) -> Any:
    """The tokenizer of a tokenizer.json. Raises UserError where the library can't read it."""
    with unreadable(file):
        tokenizer = tokenizers_library().Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class JsonVocabulary(ImportedVocabulary):
    """A tokenizer of the `tokenizers` library, and the special ids of its family.

    Attributes:
      tokenizer: the library's, with every special token.
    """

    def __init__(self, tokenizer: Any, published: Published, files: Sequence[Path], kind: str = ""):
        """Raises UserError where the files beside the tokenizer contradict it."""
        self.tokenizer = tokenizer
        _add_tokens(tokenizer, published)
        names = tokenizer.get_vocab()
        self.size = max(names.values(), default=-1) + 1
        added = tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        special = {i for i, token in added.items() if token.special}
        unknown = names.get(getattr(tokenizer.model, "unk_token", None))
        own = {} if unknown is None else {"unk": unknown}
        self._identify(published, names, special, _frame(tokenizer), own)
        self.between_ids, self.second_type = _pair_frame(tokenizer)
        self._model = type(tokenizer.model).__name__
        decoder = tokenizer.decoder
        self._is_bytes = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        # It takes spaces out of BPE's text, where every space counts: as in transformers.
        self._tidies = published.config.get("clean_up_tokenization_spaces") and self._model != "BPE"
        self.fingerprint = published.fingerprint(*files, kind=kind)

    def encode(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[Any]:
        """As in `Vocabulary`."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """As in `Vocabulary`."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def encode_plain(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        return self._plain.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _plain(self):
        """The tokenizer whose special tokens have names that nobody can write.

        The library's own `encode_special_tokens` isn't enough: a Unigram model would find the name
        of a special token among its pieces.
        """
        spec = json.loads(self.tokenizer.to_str())
        nobody = secrets.token_hex(16)
        hidden = {
            token["content"]: f"\x00{nobody}{token['id']}\x00"
            for token in spec["added_tokens"]
            if token["special"] and token["id"] != self.unk_id
        }
        for token in spec["added_tokens"]:
            token["content"] = hidden.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(name, name): i for name, i in model["vocab"].items()}
        else:
            model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [m for m in model["merges"] if not _touches(m, hidden)]
        spec["post_processor"] = None
        tokenizer = tokenizers_library().Tokenizer.from_str(json.dumps(spec))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """As in `Vocabulary`."""
        text = self.tokenizer.decode(self._spoken(ids), skip_special_tokens=False)
        return _tidy(text) if self._tidies else text

    def piece(self, token: SupportsIndex) -> str:
        """As in `Vocabulary`."""
        number = checked_id(token, self.size)
        name = self.tokenizer.id_to_token(number)
        if name is None:
            return f"<unused {number}>"
        raw = self._bytes_of(number, name)
        if raw is None:
            return name
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in raw)

    def spelling(self, token: SupportsIndex) -> str:
        """As in `Vocabulary`: WordPiece marks what goes on, BPE without bytes perhaps what ends."""
        text = super().spelling(token)
        if self._model in ("WordPiece", "WordLevel"):
            prefix = getattr(self.tokenizer.model, "continuing_subword_prefix", None)
            is_part = prefix is not None and text.startswith(prefix)
            return text.removeprefix(prefix) if is_part else f" {text}"
        suffix = getattr(self.tokenizer.model, "end_of_word_suffix", None)
        return f"{text.removesuffix(suffix)} " if suffix and text.endswith(suffix) else text

    def _bytes_of(self, number: int, name: str) -> bytes | None:
        """What a token of a byte-level tokenizer stands for."""
        if not self._is_bytes or number in self._added or not set(name) <= set(byte_of()):
            return None
        return bytes(byte_of()[char] for char in name)

    def byte_lengths(self) -> np.ndarray:
        """As in `Vocabulary`. A word of WordPiece counts the space before it."""
        lengths = np.zeros(self.size, np.int32)
        for name, token in self.tokenizer.get_vocab().items():
            if token not in self._special:
                lengths[token] = self._byte_length(token, name)
        return lengths

    def _byte_length(self, token: int, name: str) -> int:
        raw = self._bytes_of(token, name)
        if raw is not None:
            return len(raw)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return 1
        if token in self._added:
            return len(name.encode())
        if self._model == "WordPiece":
            prefix = self.tokenizer.model.continuing_subword_prefix
            return len(name.removeprefix(prefix).encode()) + (not name.startswith(prefix))
        return len(name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())


@contextlib.contextmanager
def unreadable(file: Path) -> Iterator[None]:
    """Says in one line what the library can't read of a file; it raises no class of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{file} can't be read by tokenizers: {why}") from error


def tokenizers_library() -> Any:
    """Raises UserError where it isn't installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "tokenizers is missing; install it: pip install 't5x_lite[hub]'."
        ) from error
    return tokenizers


def _add_tokens(tokenizer: Any, published: Published) -> None:
    """Adds what only the files beside tokenizer.json name, in the order of transformers.

    Raises:
      UserError: these files give a token another id.
    """
    added_token = tokenizers_library().AddedToken
    known = tokenizer.get_added_tokens_decoder()
    for number, flags in published.added.items():
        token = added_token(**flags)
        if repr(known.get(number)) != repr(token):
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise UserError(
                f"{published.folder / 'tokenizer_config.json'} gives {token.content!r} the id "
                f"{number} and {JSON} makes it {tokenizer.token_to_id(token.content)}; take both "
                f"from one release, or remove the former."
            )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for name in dict.fromkeys((*published.names.values(), *published.extra)):
        if name not in known:
            flags = {"normalized": False} | published.flags.get(name, {}) | {"special": True}
            tokenizer.add_special_tokens([added_token(name, **flags)])


def _frame(tokenizer: Any) -> Frame:
    """What a tokenizer puts before and after every text."""
    for text in ("a", "0", ".", "\n"):
        encoding = tokenizer.encode(text)
        text_at = [n for n, special in enumerate(encoding.special_tokens_mask) if not special]
        if text_at:
            return tuple(encoding.ids[: text_at[0]]), tuple(encoding.ids[text_at[-1] + 1 :])
    return (), ()


def _pair_frame(tokenizer: Any) -> tuple[tuple[int, ...] | None, int]:
    """What a tokenizer puts between the texts of a pair, and the type of the second."""
    for text in ("a", "0", ".", "\n"):
        encoding = tokenizer.encode(text, text)
        own = [n for n, special in enumerate(encoding.special_tokens_mask) if not special]
        first, second = ([n for n in own if encoding.sequence_ids[n] == m] for m in (0, 1))
        if first and second:
            between = tuple(encoding.ids[first[-1] + 1 : second[0]])
            return between or None, encoding.type_ids[second[0]]
    return None, 1


def _touches(merge: str | list[str], hidden: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in hidden or right in hidden or left + right in hidden


@functools.cache
def byte_of() -> dict[str, int]:
    """The byte of each character of byte-level BPE (Radford et al. 2019): the printable ones are
    themselves, the others come in order from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


_TIDIED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def _tidy(text: str) -> str:
    """Without the spaces that a tokenizer of words leaves before marks; for older models."""
    for mark in _TIDIED:
        text = text.replace(mark, mark.strip())
    return text
