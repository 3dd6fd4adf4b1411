"""A run's vocabulary in the form that `transformers` loads: tokenizer.json and what names its ids.

The `tokenizers` library cuts a text as sentencepiece does where pieces are merged (BPE). In a
Unigram model both look for the most likely pieces, but sentencepiece adds their scores in 32 bits
and the library in 64: where two cuts are equally likely, as in a row of dashes, rounding decides,
and not always alike. So a Unigram model goes out only where the nearest tokenizer is asked for.
"""

import dataclasses
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from t5x_lite.data.imported import ImportedVocabulary, Published
from t5x_lite.data.json_vocabulary import JsonVocabulary, byte_of, tokenizers_library
from t5x_lite.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from t5x_lite.errors import UserError
from t5x_lite.hub.source import read_json
from t5x_lite.nn.config import ModelConfig

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what stands for a space in pieces
EXACT, NEAREST = "exact", "nearest"
ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
# What begins and ends a text, by the model's kind: as `Reader` reads a prompt.
FRAMES = {"decoder-only": ("bos", None), "encoder-only": ("cls", "sep"),
          "encoder-decoder": (None, "eos")}  # fmt: skip
ADDS = ("add_bos_token", "add_eos_token")
INPUTS = ["input_ids", "attention_mask"]
# Of a sentencepiece model's protocol buffer: types of models and of pieces.
BPE = 2
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


class UnlikeError(UserError):
    """Why no tokenizer of `transformers` has a vocabulary's ids."""


def write(vocabulary: Vocabulary, model: ModelConfig, target: Path, how: str) -> None:
    """Writes the files of a vocabulary of our own.

    Args:
        vocabulary: the run's, trained or bytes.
        model: the run's: its kind says what begins and ends a text.
        target: the exported model's folder.
        how: "exact", or "nearest" for one that may differ in ties too.

    Raises:
        UnlikeError: no tokenizer has its ids; nothing is written then.
    """
    tokenizer = make(vocabulary, model.kind, how)
    names = {f"{r}_token": vocabulary.piece(i) for r, i in _roles(vocabulary).items()}
    sentinels = [vocabulary.piece(i) for i in vocabulary.sentinel_ids]
    if sentinels:
        names["additional_special_tokens"] = sentinels
    _save(tokenizer, {**names, "model_input_names": INPUTS}, target)
    if model.decoder is not None:
        ids = {f"{role}_token_id": i for role, i in _roles(vocabulary).items()}
        ids = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")
               if name in ids}  # fmt: skip
        if model.encoder is not None:
            ids["decoder_start_token_id"] = vocabulary.start_id
        _write_json(target / "generation_config.json", ids)


def write_imported(vocabulary: ImportedVocabulary, target: Path, model_type: str) -> bool:
    """Writes an imported tokenizer for a model that may be of another type than its own.

    Returns:
        Whether it did; else its folder's files can go out as they are.

    Raises:
        UnlikeError: only the other model's class reads its files.
    """
    folder = vocabulary.folder
    file = folder / "config.json"
    if file.is_file() and read_json(file).get("model_type") == model_type:
        return False
    if not isinstance(vocabulary, JsonVocabulary):
        raise UnlikeError(
            f"the tokenizer in {folder} has no tokenizer.json, and what its files mean depends on "
            f"the model's type, which is now {model_type}"
        )
    # What the files leave to their class or to config.json is named: but no padding, which may be
    # borrowed.
    published, roles = Published(folder), _roles(vocabulary)
    named = {role: vocabulary.tokenizer.id_to_token(i) for role, i in roles.items()}
    named = {role: name for role, name in named.items() if role != "pad"} | published.names
    config = {"model_input_names": INPUTS, **published.config}
    config |= {f"{role}_token": name for role, name in named.items()}
    config = {k: v for k, v in config.items() if k not in (*ADDS, "auto_map")}
    tokenizer, ends = vocabulary.tokenizer, published.added_ends()
    if ends is not None:  # not every class heeds what config says of them
        tokenizer = tokenizers_library().Tokenizer.from_str(tokenizer.to_str())
        added = (
            roles.get(role) if add else None for role, add in zip(("bos", "eos"), ends, strict=True)
        )
        tokenizer.post_processor = _template(*added, tokenizer.id_to_token)
    _save(tokenizer, config, target)
    return True


def make(vocabulary: Vocabulary, kind: str, how: str = EXACT) -> Any:
    """The `tokenizers` library's tokenizer with a vocabulary's ids.

    Raises:
        UnlikeError: there is none.
    """
    if isinstance(vocabulary, ByteVocabulary):
        tokenizer = _of_bytes(vocabulary)
    elif isinstance(vocabulary, SentencePieceVocabulary):
        tokenizer = _of_pieces(vocabulary, how)
    else:
        raise UnlikeError(f"a {type(vocabulary).__name__} has no such form")
    tokenizer.post_processor = _frame(vocabulary, kind)
    return tokenizer


def _roles(vocabulary: Vocabulary) -> dict[str, int]:
    ids = {role: getattr(vocabulary, f"{role}_id") for role in ROLES}
    return {role: i for role, i in ids.items() if i is not None}


def _frame(vocabulary: Vocabulary, kind: str) -> Any:
    roles = _roles(vocabulary)
    ends = (None if role is None else roles.get(role) for role in FRAMES[kind])
    return _template(*ends, vocabulary.piece)


def _template(begin: int | None, end: int | None, name: Callable[[int], str]) -> Any:
    """Puts ids before and after a text, and the latter after a second one too."""
    known = [(name(i), i) for i in (begin, end) if i is not None]
    first, last = ([] if i is None else [name(i)] for i in (begin, end))
    single, again = [*first, "$A", *last], ["$B:1", *(f"{name}:1" for name in last)]
    return tokenizers_library().processors.TemplateProcessing(
        single=single, pair=[*single, *again], special_tokens=known
    )


def _of_bytes(vocabulary: ByteVocabulary) -> Any:
    """Bytes as the characters of byte-level BPE that merges nothing."""
    library = tokenizers_library()
    special = {vocabulary.piece(i): int(i) for i in vocabulary.special_ids}
    characters = {char: byte + vocabulary.FIRST for char, byte in byte_of().items()}
    tokenizer = library.Tokenizer(library.models.BPE(vocab=special | characters, merges=[]))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens(_special(special))
    return tokenizer


def _of_pieces(vocabulary: SentencePieceVocabulary, how: str) -> Any:
    library, pieces = tokenizers_library(), Pieces(vocabulary.model)
    pieces.require_plain()
    if pieces.is_bpe:
        model = library.models.BPE(
            vocab=pieces.ids, merges=pieces.merges(), unk_token=pieces.unknown, fuse_unk=True,
            byte_fallback=pieces.has_bytes,
        )  # fmt: skip
    elif how == NEAREST:
        scored = pieces.scored()
        model = library.models.Unigram(scored, pieces.ids[pieces.unknown], pieces.has_bytes)
    else:
        raise UnlikeError(
            "sentencepiece adds a Unigram model's scores in 32 bits and transformers in 64, which "
            "cuts some rows of one character differently (--tokenizer nearest writes it all the "
            "same; a task with SentencePiece.model_type = 'bpe' has one with equal ids)"
        )
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = library.normalizers.Replace(" ", SPACE)
    apart = pieces.unread_in_names()
    if apart:
        tokenizer.pre_tokenizer = library.pre_tokenizers.Split(
            library.Regex(f"[{apart}]"), "isolated"
        )
    tokenizer.decoder = library.decoders.Sequence(
        [
            library.decoders.Replace(SPACE, " "),
            library.decoders.ByteFallback(),
            library.decoders.Fuse(),
        ]
    )
    named = [p.name for p in pieces.all if p.kind in (CONTROL, UNKNOWN)]
    sentinels = [vocabulary.piece(i) for i in sorted(vocabulary.sentinel_ids)]
    tokenizer.add_special_tokens(_special([*named, *sentinels]))
    _require_same(vocabulary, tokenizer, pieces, how)
    return tokenizer


def _special(names: Any) -> list[Any]:
    added = tokenizers_library().AddedToken
    return [added(name, special=True, normalized=False) for name in names]


def _require_same(vocabulary: Vocabulary, tokenizer: Any, pieces: "Pieces", how: str) -> None:
    """Compares both over what the pieces make: what was reasoned above must hold for this model."""
    names = [p.name for p in pieces.all if p.kind in (NORMAL, USER)]
    pairs = [a + b for a, b in itertools.pairwise(names)]
    for text in ["".join(names), *names, *pairs, *(a + b for a, b in itertools.pairwise(pairs))]:
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        if how == EXACT and theirs != vocabulary.encode(text):
            raise UnlikeError(f"it would cut {text[:40]!r} differently")
        if tokenizer.decode(theirs) != vocabulary.decode(theirs):
            raise UnlikeError(f"it would write {text[:40]!r} differently")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a sentencepiece model."""

    name: str
    score: float
    kind: int


class Pieces:
    """What a sentencepiece model's protocol buffer says (sentencepiece_model.proto)."""

    def __init__(self, model: bytes):
        message = _fields(model)
        self.all = [_piece(_fields(value)) for value in message.get(1, ())]
        trainer, self._normalizer = (
            {k: v[-1] for k, v in _fields(b"".join(message.get(number, ()))).items()}
            for number in (2, 3)
        )
        self.is_bpe = trainer.get(3, 1) == BPE
        self._is_suffix = bool(trainer.get(24, False))
        self.ids = {piece.name: i for i, piece in enumerate(self.all)}
        self.has_bytes = any(piece.kind == BYTE for piece in self.all)
        self.unknown = next(piece.name for piece in self.all if piece.kind == UNKNOWN)

    def require_plain(self) -> None:
        """Raises UnlikeError where text is changed before it is cut, or for unknown pieces."""
        normalizer = self._normalizer
        # name, precompiled_charsmap; add_dummy_prefix, remove_extra_whitespaces,
        # escape_whitespaces: all three are true unless they are said to be false.
        if normalizer.get(2) or normalizer.get(1, b"identity") != b"identity":
            raise UnlikeError("its sentencepiece model normalises the text")
        if [normalizer.get(n, 1) for n in (3, 4, 5)] != [0, 0, 1] or self._is_suffix:
            raise UnlikeError("its sentencepiece model adds or removes spaces")
        user = {piece.name for piece in self.all if piece.kind == USER}
        normal = [piece.name for piece in self.all if piece.kind == NORMAL]
        known = {name for name in (*normal, *user) if len(name) == 1}
        if not {piece.kind for piece in self.all} <= {NORMAL, UNKNOWN, CONTROL, USER, BYTE}:
            raise UnlikeError("its sentencepiece model has unused pieces")
        if not user <= known or any(symbol in name for name in normal for symbol in user):
            raise UnlikeError(
                "its sentencepiece model has user-defined symbols of several characters"
            )
        if not set("".join(normal)) <= known:
            raise UnlikeError(
                "its sentencepiece model has pieces of characters that it doesn't know"
            )

    def merges(self) -> list[tuple[str, str]]:
        """Every pair that makes a piece, the best piece first."""
        found = []
        for piece in self.all:
            for cut in range(1, len(piece.name)) if piece.kind == NORMAL else ():
                left, right = piece.name[:cut], piece.name[cut:]
                if left in self.ids and right in self.ids:
                    found.append((-piece.score, self.ids[left], self.ids[right]))
        return [(self.all[left].name, self.all[right].name) for _, left, right in sorted(found)]

    def scored(self) -> list[tuple[str, float]]:
        """Pieces and scores, those that no text becomes so low that no text does.

        The name of a byte, such as <0x0A>, is a piece of its own to the library. Written in a text
        it must cost more than its six characters.
        """
        lowest = min(piece.score for piece in self.all if piece.kind == NORMAL)
        return [(p.name, p.score if p.kind in (NORMAL, USER) else 6 * lowest - 1) for p in self.all]

    def unread_in_names(self) -> str:
        """Characters of bytes' names that the model doesn't know; they stand apart, for the same
        reason. No piece holds them, so that this cuts nothing."""
        if self.is_bpe or not self.has_bytes:
            return ""
        return "".join(char for char in "<0123456789ABCDEFx>" if char not in self.ids)


def _piece(message: dict[int, list[Any]]) -> Piece:
    (score,) = struct.unpack("<f", message.get(2, [bytes(4)])[-1])
    return Piece(message[1][-1].decode(), score, message.get(3, [NORMAL])[-1])


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The values of a protocol buffer by field: numbers, or bytes as they stand."""
    found: dict[int, list[Any]] = {}
    for number, value in _read(message):
        found.setdefault(number, []).append(value)
    return found


def _read(message: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def _save(tokenizer: Any, config: dict[str, Any], target: Path) -> None:
    """Names the one class that takes tokenizer.json as it is, whatever the model's type."""
    usual = {"clean_up_tokenization_spaces": False}
    config = {**usual, **config, "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer.save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
