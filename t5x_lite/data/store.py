"""What preparation leaves on disk: the text as a TFDS data set, and its tokens.

`text/` holds the documents of both splits (ArrayRecord, readable by TFDS itself) and
`made_from.json`, which says from what. `tokens-<fingerprint>/` holds one record of ids per document
and an index of lengths; the fingerprint is of the text and the vocabulary, so neither can go stale
unseen.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.data.files import difference, disk_errors, new_folder, read_json, write_json
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

SPLITS = ("train", "validation")
FORMAT = 1
SHARD_DOCUMENTS = 1_000_000
WRITE_BYTES = 8 * 2**20  # TFDS rewrites its metadata at every write: many documents at once
READ_BYTES = 2**20
PREPARE = "run: t5x_lite data prepare --gin_file YOUR.gin"


@dataclasses.dataclass(frozen=True)
class TextStore:
    """The documents of both splits, in the source's order."""

    folder: Path
    made_from: dict[str, Any]

    @classmethod
    def open(cls, task_folder: Path, config: dict[str, Any]) -> "TextStore":
        """Raises UserError where there is none, or it was made from another config."""
        folder = task_folder / "text"
        made_from = read_json(folder / "made_from.json")
        if made_from is None:
            raise UserError(f"{folder} isn't prepared; {PREPARE}")
        if made_from["config"] != config:
            changed = difference(made_from["config"], config)
            raise UserError(
                f"{folder} was made from another config ({changed}); give the task another name "
                f"or delete {task_folder}."
            )
        return cls(folder, made_from)

    @property
    def digest(self) -> str:
        """Hash of every document and its split."""
        return self.made_from["digest"]

    def count(self, split: str) -> int:
        """Documents of a split."""
        return self.made_from["documents"][split]

    def size(self, split: str) -> int:
        """Bytes of text in a split."""
        return self.made_from["bytes"][split]

    def chunks(self, split: str, order: Iterable[int] | None = None) -> Iterator[list[str]]:
        """Texts, about READ_BYTES at a time; in store order or in the one given."""
        import tensorflow_datasets as tfds

        try:
            records = tfds.builder_from_directory(self.folder).as_data_source(split=split)
            average = max(1, self.size(split) // self.count(split))
            step = max(1, min(READ_BYTES // average, 4096))
            numbers = iter(range(len(records)) if order is None else order)
            while wanted := [number for _, number in zip(range(step), numbers, strict=False)]:
                yield [record["text"].decode() for record in records.__getitems__(wanted)]
        except (RuntimeError, ValueError, OSError) as error:
            raise damaged(self.folder, error) from error


def write_text(
    task_folder: Path, documents: Iterable[str], split_of: Any, about: dict[str, Any]
) -> dict[str, int]:
    """Writes `text/` in one pass; `split_of(text)` names each document's split.

    Returns the number of documents per split. Where a split stays empty nothing is kept: the caller
    splits otherwise and writes again.
    """
    target = task_folder / "text"
    counts, sizes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    digest = hashlib.blake2b(digest_size=16)
    try:
        with new_folder(target) as folder:
            writer = _TextWriter(folder)
            for text in documents:
                split, encoded = split_of(text), text.encode()
                counts[split] += 1
                sizes[split] += len(encoded)
                digest.update(f"{split} {len(encoded)} ".encode() + encoded)
                writer.add(split, encoded)
            writer.close()
            if not all(counts.values()):
                raise _EmptySplit
            made_from = {"documents": counts, "bytes": sizes, "digest": digest.hexdigest()}
            write_json(folder / "made_from.json", made_from | about)
    except _EmptySplit:
        pass
    return counts


class _EmptySplit(Exception):  # noqa: N818 - a signal between the lines above, not an error
    pass


class _TextWriter:
    """Batches documents for TFDS's `SequentialWriter`, which needs no TensorFlow."""

    def __init__(self, folder: Path):
        import tensorflow_datasets as tfds

        identity = tfds.core.dataset_info.DatasetIdentity(
            name="text", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
        )
        self._writer = tfds.core.SequentialWriter(
            info, SHARD_DOCUMENTS, file_format=tfds.core.FileFormat.ARRAY_RECORD
        )
        self._writer.initialize_splits(list(SPLITS))
        self._waiting: dict[str, list[dict[str, bytes]]] = {split: [] for split in SPLITS}
        self._bytes = 0

    def add(self, split: str, text: bytes) -> None:
        self._waiting[split].append({"text": text})
        self._bytes += len(text)
        if self._bytes >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.add_examples(self._waiting)
        self._waiting = {split: [] for split in SPLITS}
        self._bytes = 0

    def close(self) -> None:
        self._flush()
        self._writer.close_all()


class TokenStore:
    """The ids of each document of one split, by number. Safe to read from several threads."""

    def __init__(self, folder: Path, split: str, about: dict[str, Any]):
        from array_record.python.array_record_module import ArrayRecordReader

        self._folder, self._dtype = folder, np.dtype(about["dtype"])
        self.digest: str = about["digest"]
        try:
            self.lengths = np.load(folder / f"{split}.lengths.npy")
            # The reader itself: Grain's data source starts a pool of threads at every read.
            self._reader = ArrayRecordReader(
                str(folder / f"{split}.array_record"), options="readahead_buffer_size:0"
            )
            count = self._reader.num_records()
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            raise damaged(folder, error) from error
        if count != len(self.lengths):
            raise damaged(folder, f"{count} records, {len(self.lengths)} lengths")

    @classmethod
    def open(
        cls, task_folder: Path, split: str, text_digest: str, vocabulary: Vocabulary
    ) -> "TokenStore":
        """Raises UserError where this text hasn't been tokenised with this vocabulary."""
        folder = task_folder / tokens_name(text_digest, vocabulary)
        about = read_json(folder / "made_from.json")
        if about is None:
            raise UserError(f"{folder} isn't prepared; {PREPARE}")
        return cls(folder, split, about)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, first: int, last: int) -> list[np.ndarray]:
        """Ids (int32) of documents first..last-1."""
        try:
            raw = self._reader.read(first, last)
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            raise damaged(self._folder, error) from error
        rows = [np.frombuffer(record, self._dtype).astype(np.int32) for record in raw]
        if any(len(row) != n for row, n in zip(rows, self.lengths[first:last], strict=True)):
            raise damaged(self._folder, f"documents {first} to {last} have other lengths")
        return rows


def tokens_name(text_digest: str, vocabulary: Vocabulary) -> str:
    """Folder of the tokens of a text in a vocabulary."""
    key = f"{FORMAT}/{text_digest}/{vocabulary.fingerprint}"
    return f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def write_tokens(
    task_folder: Path,
    text_digest: str,
    vocabulary: Vocabulary,
    texts: dict[str, Iterable[list[str]]],
) -> None:
    """Tokenises chunks of texts per split into a new folder; bounded by the largest chunk."""
    dtype = np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)
    digest, counts = hashlib.blake2b(digest_size=16), {}
    with new_folder(task_folder / tokens_name(text_digest, vocabulary)) as folder:
        for split, chunks in texts.items():
            lengths = _write_split(folder, split, chunks, vocabulary, dtype, digest)
            counts[split] = {"documents": len(lengths), "tokens": int(lengths.sum())}
        about = {"text": text_digest, "vocabulary": vocabulary.fingerprint, "splits": counts}
        about |= {"format": FORMAT, "dtype": dtype.name, "digest": digest.hexdigest()}
        write_json(folder / "made_from.json", about)


def _write_split(
    folder: Path,
    split: str,
    chunks: Iterable[list[str]],
    vocabulary: Vocabulary,
    dtype: np.dtype,
    digest: Any,
) -> np.ndarray:
    from array_record.python.array_record_module import ArrayRecordWriter

    path, parts = folder / f"{split}.array_record", [np.zeros(0, np.uint32)]
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for texts in chunks:
            rows = [np.array(ids, dtype) for ids in vocabulary.encode_all(texts)]
            for row in rows:
                writer.write(row.tobytes())
                digest.update(row.tobytes())
            parts.append(np.array([len(row) for row in rows], np.uint32))
    finally:
        writer.close()
    lengths = np.concatenate(parts)
    digest.update(f"{split} ".encode() + lengths.tobytes())
    with disk_errors(path):
        np.save(folder / f"{split}.lengths.npy", lengths)
    return lengths


def damaged(folder: Path, error: object) -> UserError:
    """What to say of a store that can't be read back."""
    why = str(error).strip().splitlines() or ["unreadable"]
    return UserError(f"{folder} is damaged ({why[0]}); delete it and {PREPARE}")
