"""The prepared text of a task: a TFDS data set of both splits, one shard per part of the source.

`text/` is readable by TFDS itself (ArrayRecord); `made_from.json` says from what it was made. A
shard is written by one worker and is done when its file under `shards/` is there.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.data.files import difference, disk_errors, read_json, write_json
from t5x_lite.data.preprocessors import Preprocessor, apply
from t5x_lite.data.sources import Part, Place, Record, Source
from t5x_lite.errors import UserError

SPLITS = ("train", "validation")
READ_BYTES = 2**20
PREPARE = "run: t5x_lite data prepare --gin_file YOUR.gin"
DATASET = "text"
Fields = dict[str, str]  # what the store keeps of a record


@dataclasses.dataclass(frozen=True)
class TextStore:
    """The records of both splits, in the source's order."""

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
        """Hash of every record and its split."""
        return self.made_from["digest"]

    @property
    def shards(self) -> list[dict[str, int]]:
        """Records of each split in each shard."""
        return self.made_from["shards"]

    def count(self, split: str) -> int:
        """Records of a split."""
        return sum(shard[split] for shard in self.shards)

    def size(self, split: str) -> int:
        """Bytes of text in a split."""
        return self.made_from["bytes"][split]

    def shard(self, number: int, split: str) -> Iterator[list[Fields]]:
        """The records of one shard's split, in order."""
        start = sum(shard[split] for shard in self.shards[:number])
        return self.chunks(split, range(start, start + self.shards[number][split]))

    def chunks(self, split: str, order: Iterable[int] | None = None) -> Iterator[list[Fields]]:
        """Records, about READ_BYTES at a time; in store order or in the one given."""
        import tensorflow_datasets as tfds

        if not (count := self.count(split)):
            return
        average = max(1, self.size(split) // count)
        step = max(1, min(READ_BYTES // average, 4096))
        numbers = iter(range(count) if order is None else order)
        try:
            records = tfds.builder_from_directory(self.folder).as_data_source(split=split)
            while wanted := list(itertools.islice(numbers, step)):
                yield [
                    {name: text.decode() for name, text in record.items()}
                    for record in records.__getitems__(wanted)
                ]
        except (RuntimeError, ValueError, OSError) as error:
            raise damaged(self.folder, error) from error


@dataclasses.dataclass(frozen=True)
class TextShard:
    """One worker's part of making a text store.

    Attributes:
      folder: of the store that is being made.
      number: of the shard, out of `of`.
      source: read `part` of it.
      preprocessors: applied to each record, one after the other.
      fields: what to keep of a record.
      split: where all records belong; None: where the hash of each falls.
      threshold: records whose 64-bit hash lies below it are for validation.
    """

    folder: Path
    number: int
    of: int
    source: Source
    part: Part
    preprocessors: Sequence[Preprocessor]
    fields: tuple[str, ...]
    split: str | None
    threshold: int

    @property
    def done(self) -> Path:
        """The file that is there when the shard is."""
        return self.folder / "shards" / f"{self.number:05d}.json"

    def path(self, split: str) -> Path:
        """The records' file, named as TFDS does."""
        place = f"{self.number:05d}-of-{self.of:05d}"
        return self.folder / f"{DATASET}-{split}.array_record-{place}"

    def write(self) -> None:
        """Writes the records, then what is to be said of them.

        Raises:
          UserError: a broken record, unless the source skips these; a full disk.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        tally, features = _Tally(), text_features(self.fields)
        with disk_errors(self.folder):
            writers = {s: ArrayRecordWriter(str(self.path(s)), "group_size:1") for s in SPLITS}
            try:
                for fields in self._records(tally):
                    encoded = {name: text.encode() for name, text in fields.items()}
                    split = tally.add(encoded, self.split, self.threshold)
                    writers[split].write(features.serialize_example(encoded))
            finally:
                for writer in writers.values():
                    writer.close()
        write_json(self.done, tally.about())

    def _records(self, tally: "_Tally") -> Iterator[Fields]:
        def on_broken(error: UserError) -> None:
            if self.source.broken != "skip":
                raise error
            tally.skip(error)

        for record, place in self.source.records(self.part, on_broken):
            try:
                for made in apply(self.preprocessors, record, place):
                    fields = kept(made, self.fields, place)
                    if any(text.strip() for text in fields.values()):
                        yield fields
            except UserError as error:
                on_broken(error)


def kept(record: Record, names: Sequence[str], place: Place) -> Fields:
    """The named fields of a record as text; values that aren't text as JSON.

    Raises:
      UserError: a field is missing.
    """
    missing = [name for name in names if record.get(name) is None]
    if missing:
        has = ", ".join(sorted(record)[:8]) or "none"
        raise UserError(
            f"{place} has no field {missing[0]!r} (it has {has}); bind corpus.field for a text, "
            f"rename others with preprocessors.Rename, or choose another objective."
        )
    return {name: _text(record[name], name, place) for name in names}


def _text(value: Any, name: str, place: Place) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}, field {name!r} has half a character ({error.reason}); mend it, or skip "
            f"such records with Source.broken='skip'."
        ) from error
    return text


class _Tally:
    """What is counted and hashed while a shard is written."""

    def __init__(self):
        self.documents, self.bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        self.low, self.high = 2**64, -1
        self.broken: list[str] = []
        self.skipped = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def skip(self, error: UserError) -> None:
        self.skipped += 1
        if len(self.broken) < 3:
            self.broken.append(str(error))

    def add(self, encoded: Mapping[str, bytes], split: str | None, threshold: int) -> str:
        content = b"\0".join(encoded.values())
        value = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        self.low, self.high = min(self.low, value), max(self.high, value)
        split = split or ("validation" if value < threshold else "train")
        self.documents[split] += 1
        self.bytes[split] += len(content)
        self._digest.update(f"{split} {len(content)} ".encode() + content)
        return split

    def about(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "low": self.low,
            "high": self.high,
            "skipped": self.skipped,
            "broken": self.broken,
            "digest": self._digest.hexdigest(),
        }


def text_features(fields: Sequence[str]) -> Any:
    """The TFDS features of a store that keeps these fields."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict({name: tfds.features.Text() for name in fields})


def finish(folder: Path, fields: Sequence[str], shards: list[dict], about: dict[str, Any]) -> None:
    """Makes a folder of whole shards a TFDS data set that knows what it was made from."""
    import tensorflow_datasets as tfds

    digest = hashlib.blake2b("".join(s["digest"] for s in shards).encode(), digest_size=16)
    bytes_of = {split: sum(shard["bytes"][split] for shard in shards) for split in SPLITS}
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=DATASET, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=text_features(fields), disable_shuffling=True
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.set_splits(
        tfds.core.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[shard["documents"][split] for shard in shards],
                    num_bytes=bytes_of[split],
                    filename_template=tfds.core.ShardedFileTemplate(
                        dataset_name=DATASET,
                        data_dir=folder,
                        split=split,
                        filetype_suffix="array_record",
                        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    ),
                )
                for split in SPLITS
            ]
        )
    )
    with disk_errors(folder):
        info.write_to_directory(folder)
    made_from = {
        "digest": digest.hexdigest(),
        "shards": [shard["documents"] for shard in shards],
        "bytes": bytes_of,
        "skipped": sum(shard["skipped"] for shard in shards),
        "broken": [message for shard in shards for message in shard["broken"]][:3],
    }
    write_json(folder / "made_from.json", made_from | about)


def damaged(folder: Path, error: object) -> UserError:
    """What to say of a store that can't be read back."""
    why = str(error).strip().splitlines() or ["unreadable"]
    return UserError(f"{folder} is damaged ({why[0]}); delete it and {PREPARE}")
