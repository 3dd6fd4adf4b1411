"""Text to ids and back: sentencepiece models (trained or given), plain bytes, imported tokenizers.

Special ids follow T5 where T5 has them (pad 0, end 1, unknown 2); sentinels are the topmost ids,
the first one highest, as in Raffel et al. 2020. Nothing is normalised away: what `train` makes is
lossless, so bytes of text can be counted exactly (`byte_lengths`).
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int

from t5x_lite.data.files import difference, read_json
from t5x_lite.data.whole_words import WordEdges, spelling, word_edges
from t5x_lite.errors import UserError

MAX_LINE_BYTES = 4096  # longer lines reach the trainer in pieces, so that it skips none
# sentencepiece's result depends on the number of threads (it adds floats in another order), so the
# number is the same on every machine.
TRAINER_THREADS = 4
Offsets = Int[np.ndarray, "n 2"]


class Vocabulary:
    """Ids 0..size-1. An id that the vocabulary lacks (such as `bos_id`) is None.

    Subclasses set the attributes and give `encode`, `decode`, `piece`, `byte_lengths`.
    """

    size: int
    pad_id: int = 0
    eos_id: int | None
    bos_id: int | None = None
    unk_id: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    mask_id: int | None = None
    sentinel_ids: tuple[int, ...] = ()
    # What an imported tokenizer puts before every text; None: a text begins as the family has it.
    prefix_ids: tuple[int, ...] | None = None
    # Between two texts that an encoder reads as a pair, and the type of the second: BERT's are one
    # sep (None) and 1, RoBERTa's two and 0.
    between_ids: tuple[int, ...] | None = None
    second_type: int = 1
    start_id: int = 0  # a decoder's first token where an encoder reads the prompt
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin or end.

        In an imported vocabulary the names of special tokens become their ids, wherever they stand.
        """
        raise NotImplementedError

    def encode_plain(self, text: str) -> list[int]:
        """As `encode`, but no text becomes a special id (but unknown): for what users write."""
        return self.encode(text)

    def encode_all(self, texts: list[str]) -> list[Any]:
        """Ids of several texts, each a list or an array; the fast way to do many."""
        return [self.encode(text) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """As `encode`, and the characters begin..end-1 that each id stands for.

        Raises:
          UserError: the vocabulary can't tell.
        """
        raise UserError(
            f"{type(self).__name__} can't tell which characters its ids stand for; use Bytes, "
            f"SentencePiece or an imported tokenizer."
        )

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of ids; special ids (but unknown) and sentinels give no text."""
        raise NotImplementedError

    def piece(self, token: SupportsIndex) -> str:
        """Name of one id, for people."""
        raise NotImplementedError

    def spelling(self, token: SupportsIndex) -> str:
        """An id's text, with a space where one is part of its word: what `word_edges` looks at."""
        return spelling(self.piece(token))

    @functools.cached_property
    def word_edges(self) -> WordEdges:
        """Which ids begin a word, and which end one."""
        return word_edges(map(self.spelling, range(self.size)), self.special_ids)

    def byte_lengths(self) -> np.ndarray:
        """[V] int32: bytes of raw text that each id stands for (0 for special ids).

        Exact for what `train` makes and for bytes; a given model that normalises its text counts
        the normalised text.
        """
        raise NotImplementedError

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end what a model writes."""
        return () if self.eos_id is None else (self.eos_id,)

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """Ids that stand for no text: never masked, never drawn as a random word."""
        named = (self.pad_id, self.eos_id, self.bos_id, self.unk_id)
        named += (self.cls_id, self.sep_id, self.mask_id)
        return np.unique([i for i in (*named, *self.sentinel_ids) if i is not None])

    @functools.cached_property
    def ordinary_ids(self) -> np.ndarray:
        """Every other id."""
        return np.setdiff1d(np.arange(self.size, dtype=np.int32), self.special_ids)

    def require(self, *names: str) -> None:
        """Raises UserError unless the vocabulary has these special ids (`bos_id`, …)."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise UserError(
                f"the vocabulary ({self.size} ids) has no {', '.join(missing)}, which the "
                f"objective needs; train one with SentencePiece() or use Bytes()."
            )


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes with ByT5's ids (Xue et al. 2022): byte b is id b + 3; ours are added after."""

    FIRST = 3

    def __init__(self, extra_ids: int):
        self.eos_id, self.unk_id = 1, 2
        after = self.FIRST + 256
        self.bos_id, self.cls_id, self.sep_id, self.mask_id = range(after, after + 4)
        self.size = after + 4 + extra_ids
        self.sentinel_ids = _sentinels(self.size, extra_ids)
        self.fingerprint = f"bytes-{extra_ids}"

    def encode(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        return [byte + self.FIRST for byte in text.encode()]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """As in `Vocabulary`."""
        return self.encode(text), byte_offsets(text)

    def encode_all(self, texts: list[str]) -> list[Any]:
        """As in `Vocabulary`."""
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + self.FIRST for t in texts]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """As in `Vocabulary`."""
        low, high = self.FIRST, self.FIRST + 256
        return bytes(i - low for i in map(int, ids) if low <= i < high).decode(errors="replace")

    def piece(self, token: SupportsIndex) -> str:
        """As in `Vocabulary`."""
        names = {self.pad_id: "<pad>", self.eos_id: "</s>", self.unk_id: "<unk>"}
        names |= {self.bos_id: "<s>", self.cls_id: "<cls>", self.sep_id: "<sep>"}
        names |= {self.mask_id: "<mask>"}
        if token in names:
            return names[token]
        if token in self.sentinel_ids:
            return f"<extra_id_{self.size - 1 - token}>"
        byte = checked_id(token, self.size) - self.FIRST
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"

    def byte_lengths(self) -> np.ndarray:
        """As in `Vocabulary`."""
        lengths = np.zeros(self.size, np.int32)
        lengths[self.FIRST : self.FIRST + 256] = 1
        return lengths


class SentencePieceVocabulary(Vocabulary):
    """A sentencepiece model with `extra_ids` sentinels after its own pieces.

    Attributes:
      model: the model's file.
    """

    def __init__(self, model: bytes, extra_ids: int):
        """Raises UserError where `model` isn't a sentencepiece model."""
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"not a sentencepiece model: {error}".splitlines()[0]) from error
        self.model, processor = model, self._processor
        self._pieces = processor.get_piece_size()
        self.size = self._pieces + extra_ids
        known = {"eos_id": processor.eos_id(), "bos_id": processor.bos_id()}
        known["unk_id"] = processor.unk_id()
        self.eos_id, self.bos_id, self.unk_id = (i if i >= 0 else None for i in known.values())
        self.cls_id, self.sep_id, self.mask_id = map(self._find, ("<cls>", "<sep>", "<mask>"))
        # A model without padding (Llama's) pads with 0: padding never counts, whatever its id.
        self.pad_id = max(processor.pad_id(), 0)
        self.sentinel_ids = _sentinels(self.size, extra_ids)
        self.fingerprint = f"{hashlib.sha256(model).hexdigest()[:16]}-{extra_ids}"

    def role_ids(self) -> dict[str, int]:
        """Ids that the model itself gives the roles pad, eos, bos and unk."""
        processor = self._processor
        ids = {"pad": processor.pad_id(), "eos": processor.eos_id()}
        ids |= {"bos": processor.bos_id(), "unk": processor.unk_id()}
        return {role: i for role, i in ids.items() if i >= 0}

    def control_pieces(self) -> list[int]:
        """Ids that no text becomes: unknown is none of them."""
        return [i for i in range(self._pieces) if self._processor.is_control(i)]

    def _find(self, piece: str) -> int | None:
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None

    def encode(self, text: str) -> list[int]:
        """As in `Vocabulary`."""
        return self._processor.encode(text)

    def encode_all(self, texts: list[str]) -> list[Any]:
        """As in `Vocabulary`."""
        # A worker of `data prepare` has one core; alone, a process takes all.
        threads = 1 if multiprocessing.parent_process() else -1
        return self._processor.encode(texts, return_type="numpy", num_threads=threads)

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """As in `Vocabulary`. Of a character in several pieces, all stand for it."""
        mapping = self._processor.encode(text, return_type="offset_mapping")
        offsets = np.array(mapping["offsets"], np.int64).reshape(-1, 2)
        for place in range(len(offsets) - 2, -1, -1):
            begin, end = offsets[place]
            if begin == end == offsets[place + 1, 0]:  # sentencepiece gives it to the last alone
                offsets[place, 1] = offsets[place + 1, 1]
        return list(mapping["ids"]), offsets

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """As in `Vocabulary`."""
        return self._processor.decode([i for i in map(int, ids) if 0 <= i < self._pieces])

    def piece(self, token: SupportsIndex) -> str:
        """As in `Vocabulary`."""
        if token in self.sentinel_ids:
            return f"<extra_id_{self.size - 1 - token}>"
        return self._processor.id_to_piece(checked_id(token, self.size))

    def byte_lengths(self) -> np.ndarray:
        """As in `Vocabulary`."""
        processor, lengths = self._processor, np.zeros(self.size, np.int32)
        for token in range(self._pieces):
            if processor.is_byte(token):
                lengths[token] = 1
            elif not (processor.is_control(token) or processor.is_unknown(token)):
                text = processor.id_to_piece(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
                lengths[token] = len(text.encode())
        return lengths


def byte_offsets(text: str) -> Offsets:
    """The character that each byte of UTF-8 belongs to."""
    sizes = [len(character.encode()) for character in text]
    begins = np.repeat(np.arange(len(text), dtype=np.int64), sizes)
    return np.stack([begins, begins + 1], axis=1)


def _sentinels(size: int, extra_ids: int) -> tuple[int, ...]:
    return tuple(range(size - 1, size - 1 - extra_ids, -1))


def checked_id(token: SupportsIndex, size: int) -> int:
    """An id as an int; raises UserError where the vocabulary has no such id."""
    number = operator.index(token)
    if not 0 <= number < size:
        raise UserError(f"id {number} is outside the vocabulary of {size}; give 0 to {size - 1}.")
    return number


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """Base of the configs that `load_vocabulary` takes."""


@dataclasses.dataclass(frozen=True)
class Imported(VocabularyConfig):
    """The tokenizer of a published model: nothing to train, every id as it was published.

    Attributes:
      path: folder with tokenizer.json or a sentencepiece model, and what was published beside it.
    """

    path: str


@dataclasses.dataclass(frozen=True)
class WithSentinels(VocabularyConfig):
    """What a vocabulary of our own has: `extra_ids` sentinels at the top of the ids."""

    extra_ids: int = 100

    def __post_init__(self):
        if self.extra_ids < 0:
            raise UserError(f"extra_ids={self.extra_ids} can't be negative; 0 gives no sentinels.")


@dataclasses.dataclass(frozen=True)
class Bytes(WithSentinels):
    """UTF-8 bytes: nothing to train, 263 + extra_ids ids."""

    @property
    def size(self) -> int:
        """Ids in all."""
        return ByteVocabulary(self.extra_ids).size


@dataclasses.dataclass(frozen=True)
class SentencePiece(WithSentinels):
    """A sentencepiece model, trained on the task's own text unless `path` names one.

    Attributes:
      vocab_size: ids in all, sentinels included (T5's published model: 32,000 pieces + 100).
      model_type: "unigram" (Kudo 2018) or "bpe".
      byte_fallback: spell unknown characters in bytes, so that no text is lost (256 ids).
      sample: bytes of training text that the trainer sees; documents drawn at random without bias.
      path: a ready-made model; nothing is trained then.
      user_symbols: texts that are one id each, wherever they stand, such as "<think>".
    """

    vocab_size: int = 4096
    model_type: str = "unigram"
    byte_fallback: bool = True
    sample: int = 4_000_000
    path: str | None = None
    user_symbols: Sequence[str] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "user_symbols", tuple(self.user_symbols))
        if len({*self.user_symbols, "", "\n"}) != len(self.user_symbols) + 2:
            raise UserError(
                f"user_symbols={list(self.user_symbols)} must be different texts, none of them "
                f"empty or the newline, which is a symbol anyway."
            )
        if self.model_type not in ("unigram", "bpe"):
            raise UserError(f"model_type={self.model_type!r} is unknown; use 'unigram' or 'bpe'.")
        if self.sample < 1:
            raise UserError(f"sample={self.sample} bytes is no text to train on; try 4000000.")
        reserved = self.reserved
        if self.path is None and self.vocab_size <= reserved:
            raise UserError(
                f"vocab_size={self.vocab_size} is too small: special ids, bytes and "
                f"{self.extra_ids} sentinels take {reserved}; give at least {reserved + 64}."
            )

    @property
    def size(self) -> int:
        """Ids in all."""
        return self.vocab_size

    @property
    def reserved(self) -> int:
        """Ids that aren't learnt: 7 special ones, the newline, symbols, bytes, sentinels."""
        return 8 + len(self.user_symbols) + 256 * self.byte_fallback + self.extra_ids

    def train(self, lines: Iterable[str]) -> bytes:
        """The model file's bytes. Same lines, same bytes.

        Raises:
          UserError: the text has too few different pieces for `vocab_size`.
        """
        import io

        import sentencepiece

        model, sentences = io.BytesIO(), _Sentences(lines)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=self.vocab_size - self.extra_ids,
                model_type=self.model_type,
                byte_fallback=self.byte_fallback,
                user_defined_symbols=["\n", *self.user_symbols],
                **_LOSSLESS,
                **_SPECIAL,
            )
        except (RuntimeError, OSError) as error:
            if sentences.error is not None:
                raise sentences.error from None
            raise UserError(self._failure(str(error))) from error
        return model.getvalue()

    def _failure(self, message: str) -> str:
        limit = re.search(r"value <= (\d+)", message)
        if limit:
            largest = int(limit[1]) + self.extra_ids
            return (
                f"vocab_size={self.vocab_size} is too large for this text; "
                f"give at most {largest} or more text."
            )
        required = re.search(r"smaller than required_chars.*?(\d+) vs (\d+)", message)
        if required:
            return (
                f"vocab_size={self.vocab_size} is too small for the text's alphabet; "
                f"give at least {int(required[2]) + self.extra_ids}."
            )
        return f"sentencepiece could not train: {message}".replace("\n", " ")


# Identity normalisation and no added or removed spaces: decode(encode(text)) == text, and a word
# is spelt the same at the start of a document as at the start of any line.
_LOSSLESS = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "character_coverage": 0.9995,
    "max_sentence_length": 2 * MAX_LINE_BYTES,
    "num_threads": TRAINER_THREADS,
    "minloglevel": 2,
}
_SPECIAL = {
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": 3,
    "pad_piece": "<pad>",
    "control_symbols": ["<cls>", "<sep>", "<mask>"],
}


class _Sentences:
    """Lines in pieces that the trainer takes; keeps what went wrong, which it would wrap up."""

    def __init__(self, lines: Iterable[str]):
        self._lines = lines
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        width = MAX_LINE_BYTES // 4  # a character is at most 4 bytes
        try:
            for line in self._lines:
                yield from (line[i : i + width] for i in range(0, len(line), width))
        except BaseException as error:
            self.error = error
            raise


def load_vocabulary(config: VocabularyConfig, folder: Path) -> Vocabulary:
    """The vocabulary of a config; `folder` holds the one that was trained.

    Raises:
      UserError: not trained yet, trained for another config, or of another size than `vocab_size`;
        an imported one that isn't there or isn't understood.
    """
    if isinstance(config, Imported):
        from t5x_lite.data import imported

        return imported.load(Path(config.path))
    if isinstance(config, Bytes):
        return ByteVocabulary(config.extra_ids)
    if config.path is not None:
        vocabulary = SentencePieceVocabulary(read_model(Path(config.path)), config.extra_ids)
        if vocabulary.size != config.vocab_size:
            raise UserError(
                f"{config.path} and {config.extra_ids} sentinels make {vocabulary.size} ids, not "
                f"vocab_size={config.vocab_size}; bind vocab_size={vocabulary.size}."
            )
        return vocabulary
    model = folder / "tokenizer.model"
    about = read_json(folder / "tokenizer.json")
    if not model.exists() or about is None:
        raise UserError(f"{model} isn't trained; run: t5x_lite tokenizer train --gin_file YOUR.gin")
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    about["config"] = {"user_symbols": []} | about["config"]  # from before there were any
    if about["config"] != now:
        raise UserError(
            f"{model} was trained for another config ({difference(about['config'], now)}); "
            f"give the task another name or delete {folder}."
        )
    return SentencePieceVocabulary(read_model(model), config.extra_ids)


def read_model(path: Path) -> bytes:
    """The bytes of a sentencepiece model's file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read the sentencepiece model {path}: {error.strerror}.") from error
