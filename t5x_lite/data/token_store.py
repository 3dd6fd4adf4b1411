"""The ids of each record of a task, read by number, or as one long stream.

`tokens-<fingerprint>/` is of one text, one vocabulary and one way to make ids; the fingerprint
names all three, so none can go stale unseen. Each column of a split is one file of all records end
to end, with checksums (`flat.py`), and `SPLIT-COLUMN.offsets.npy` says where each begins. Both are
mapped into memory, never read whole. A file of records would be read whole for every window that
lies in it; documents may have any length.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from t5x_lite.data.files import disk_errors, read_json, write_json
from t5x_lite.data.flat import DamagedError, Flat, join
from t5x_lite.data.text_store import PREPARE, SPLITS, TextStore, damaged
from t5x_lite.data.vocabularies import Vocabulary, VocabularyConfig, load_vocabulary
from t5x_lite.errors import UserError

FORMAT = 3


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """How a record's text `fields` become its columns of ids and other numbers."""

    fields: ClassVar[tuple[str, ...]]

    @property
    def columns(self) -> Mapping[str, str | None]:
        """Name to dtype, None for ids, in the order that records keep."""
        raise NotImplementedError

    def tokenize(
        self, records: Sequence[Mapping[str, str]], vocabulary: Vocabulary
    ) -> list[tuple[np.ndarray, ...]]:
        """The columns of each record; ids without begin and end."""
        raise NotImplementedError

    def key(self, vocabulary: Vocabulary) -> str:
        """What names this way to make ids, besides the vocabulary's fingerprint."""
        del vocabulary
        return repr(self)


class TokenStore:
    """The columns of each record of one split, by number. Safe to read from several threads."""

    def __init__(self, folder: Path, split: str, about: dict[str, Any]):
        self.folder, self.split = folder, split
        self.digest: str = about["digest"]
        self._count = sum(shard[split] for shard in about["shards"])
        self._columns = {
            name: Column(folder, f"{split}-{name}", np.dtype(dtype or about["dtype"]), self._count)
            for name, dtype in about["columns"]
        }

    @classmethod
    def open(
        cls,
        task_folder: Path,
        split: str,
        text_digest: str,
        vocabulary: Vocabulary,
        tokenizer: Tokenizer,
    ) -> "TokenStore":
        """Raises UserError where this text hasn't been tokenised so with this vocabulary."""
        folder = task_folder / tokens_name(text_digest, vocabulary, tokenizer)
        about = read_json(folder / "made_from.json")
        if about is None:
            raise UserError(f"{folder} isn't prepared; {PREPARE}")
        return cls(folder, split, about)

    def __len__(self) -> int:
        return self._count

    def column(self, name: str) -> "Column":
        """One column, as `streams.Documents`."""
        return self._columns[name]

    def lengths(self, column: str) -> np.ndarray:
        """[records] entries of each record in a column."""
        return np.diff(self._columns[column].offsets).astype(np.int64)

    def read(self, numbers: Sequence[int]) -> list[tuple[np.ndarray, ...]]:
        """The columns of records by number; ids as int32."""
        return list(zip(*(own.read(numbers) for own in self._columns.values()), strict=True))


class Column:
    """One column of a split: all records' entries end to end."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, records: int):
        self._folder, self._name = folder, name
        # Ids as the models take them; what has a type of its own keeps it.
        self._given = np.dtype(np.int32) if dtype.kind == "u" else dtype
        try:
            # As a plain array: memmap's own indexing is slow.
            self.offsets = np.asarray(np.load(folder / f"{name}.offsets.npy", mmap_mode="r"))
            self._entries = Flat(folder / name, dtype, int(self.offsets[-1]))
        except (ValueError, OSError, EOFError, IndexError, DamagedError) as error:
            raise damaged(folder, error) from error
        if len(self.offsets) != records + 1:
            raise damaged(folder, f"{name}: {len(self.offsets) - 1} of {records} records")

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Entries start..stop-1 of all records end to end. Raises UserError where torn."""
        try:
            return self._entries.read(start, stop).astype(self._given)
        except DamagedError as error:
            raise damaged(self._folder, error) from error

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The entries of records by number."""
        ends = ((int(self.offsets[n]), int(self.offsets[n + 1])) for n in numbers)
        return [self.slice(start, stop) for start, stop in ends]


def tokens_name(text_digest: str, vocabulary: Vocabulary, tokenizer: Tokenizer) -> str:
    """Folder of the tokens of a text in a vocabulary."""
    key = f"{FORMAT}/{text_digest}/{vocabulary.fingerprint}/{tokenizer.key(vocabulary)}"
    return f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def shard_path(folder: Path, split: str, column: str, number: int) -> Path:
    """The entries of a shard's column, until the store is whole."""
    return folder / "shards" / f"{split}-{column}-{number:05d}.part"


@dataclasses.dataclass(frozen=True)
class TokenShard:
    """One worker's part of making a token store: shard `number` of the text."""

    folder: Path
    number: int
    text: TextStore
    vocabulary: VocabularyConfig
    task_folder: Path  # where a trained vocabulary lies
    tokenizer: Tokenizer

    @property
    def done(self) -> Path:
        """The file that is there when the shard is."""
        return self.folder / "shards" / f"{self.number:05d}.json"

    def write(self) -> None:
        """Writes ids and lengths, then what is to be said of them.

        Raises:
          UserError: an id beyond the vocabulary; a full disk.
        """
        vocabulary = load_vocabulary(self.vocabulary, self.task_folder)
        digest = hashlib.blake2b(digest_size=16)
        counts, tokens = {}, {}
        for split in SPLITS:
            with disk_errors(self.folder):
                sizes = self._write_split(split, vocabulary, digest)
            counts[split], tokens[split] = len(sizes), int(sizes.sum())
        about = {"documents": counts, "tokens": tokens, "digest": digest.hexdigest()}
        write_json(self.done, about)

    def _write_split(self, split: str, vocabulary: Vocabulary, digest: Any) -> np.ndarray:
        columns = self.tokenizer.columns
        parts = [np.zeros((0, len(columns)), np.uint32)]
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(shard_path(self.folder, split, name, self.number).open("wb"))
                for name in columns
            ]
            for chunk in self.text.shard(self.number, split):
                rows = self.tokenizer.tokenize(chunk, vocabulary)
                for file, dtype, own in zip(
                    files, columns.values(), zip(*rows, strict=True), strict=True
                ):
                    for entries in own:
                        raw = as_bytes(entries, dtype, vocabulary)
                        file.write(raw)
                        digest.update(raw)
                parts.append(np.array([[len(c) for c in row] for row in rows], np.uint32))
        sizes = np.concatenate(parts)
        digest.update(f"{split} ".encode() + sizes.tobytes())
        np.save(sizes_path(self.folder, split, self.number), sizes)
        return sizes


def as_bytes(column: Any, dtype: str | None, vocabulary: Vocabulary) -> bytes:
    """A column as it is stored. Raises UserError where an id isn't the vocabulary's."""
    if dtype is not None:
        return np.asarray(column, dtype).tobytes()
    ids = np.asarray(column, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary.size:
        raise UserError(
            f"the tokenizer gave id {ids.max()} and the vocabulary has {vocabulary.size}; its "
            f"files don't belong together: export the tokenizer again."
        )
    return ids.astype(id_dtype(vocabulary)).tobytes()


def id_dtype(vocabulary: Vocabulary) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)


def sizes_path(folder: Path, split: str, number: int) -> Path:
    """[records, columns] lengths of a shard, until the store is whole."""
    return folder / "shards" / f"{split}-{number:05d}.npy"


def finish(
    folder: Path, text_digest: str, vocabulary: Vocabulary, tokenizer: Tokenizer, shards: list[dict]
) -> None:
    """Makes a folder of whole shards a store."""
    for split in SPLITS:
        counts = [shard["documents"][split] for shard in shards]
        for place, name in enumerate(tokenizer.columns):
            with disk_errors(folder):
                numbers = range(len(counts))
                parts = (shard_path(folder, split, name, number) for number in numbers)
                join(parts, folder / f"{split}-{name}")
                _write_offsets(folder, split, name, place, counts)
    digest = hashlib.blake2b("".join(s["digest"] for s in shards).encode(), digest_size=16)
    about = {
        "format": FORMAT,
        "text": text_digest,
        "vocabulary": vocabulary.fingerprint,
        "vocabulary_size": vocabulary.size,
        "tokenizer": tokenizer.key(vocabulary),
        "dtype": id_dtype(vocabulary).name,
        "columns": [*tokenizer.columns.items()],  # in order, which JSON's objects don't keep
        "shards": [shard["documents"] for shard in shards],
        "tokens": {split: sum(s["tokens"][split] for s in shards) for split in SPLITS},
        "digest": digest.hexdigest(),
    }
    write_json(folder / "made_from.json", about)


def _write_offsets(folder: Path, split: str, name: str, place: int, counts: list[int]) -> None:
    """One shard's lengths after the other: memory doesn't grow with the corpus."""
    with (folder / f"{split}-{name}.offsets.npy").open("wb") as file:
        header = {"descr": "<u8", "fortran_order": False, "shape": (sum(counts) + 1,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.zeros(1, "<u8").tobytes())
        total = 0
        for number in range(len(counts)):
            sizes = np.load(sizes_path(folder, split, number))[:, place]
            ends = total + np.cumsum(sizes, dtype=np.uint64)
            file.write(ends.astype("<u8").tobytes())
            total = ends[-1] if len(ends) else total
