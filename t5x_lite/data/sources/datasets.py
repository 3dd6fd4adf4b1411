"""Data sets of TFDS and of Hugging Face's `datasets`, by ranges of records."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5x_lite.data.sources.base import (
    OnBroken,
    Part,
    Place,
    Record,
    Source,
    plain,
    ranges,
    renamed,
)
from t5x_lite.data.sources.paths import file_stamp, is_url
from t5x_lite.data.sources.values import BATCH_BYTES, json_field, places, rows
from t5x_lite.errors import UserError

UNKNOWN_BYTES = 1024  # of an example, where the data set doesn't say


@dataclasses.dataclass(frozen=True)
class TFDS(Source):
    """A split of a TFDS data set, by name or by the folder of a prepared one.

    The folder's files must be ArrayRecord (TFDS reads the others with TensorFlow only).

    Attributes:
      data: name or folder.
      field: what to give as "text"; None: the examples as they are.
      split: as TFDS has them; "train[:1000]" too.
      tfds_dir: where TFDS keeps what it downloads; None: its own place.
    """

    data: str
    field: str | None = None
    split: str = "train"
    tfds_dir: str | None = None

    def parts(self) -> list[Part]:
        """As in `Source`."""
        builder, examples = self._open()
        size = builder.info.splits[self.split].num_bytes
        return ranges(self.data, len(examples), size or len(examples) * UNKNOWN_BYTES)

    def records(self, part: Part, on_broken: OnBroken) -> Iterator[tuple[Record, Place]]:
        """As in `Source`."""
        _, examples = self._open()
        ((_, start, stop),) = part.pieces
        share = part.size / (stop - start)
        many = max(1, int(BATCH_BYTES / max(1, share)))
        for first in range(start, stop, many):
            numbers = range(first, min(first + many, stop))
            for number, example in zip(numbers, self._read(examples, numbers), strict=True):
                place = Place(self.data, "record", number, int((number + 1 - start) * share))
                try:
                    record = renamed(_record(example, place), self.field, place, "TFDS")
                except UserError as error:
                    on_broken(error)
                    continue
                yield record, place

    def _read(self, examples: Any, numbers: range) -> list[Any]:
        """The examples; in the place of one that can't be read, why not."""
        # ArrayRecord has no class of its own for what is torn, and the decoder's are protobuf's
        try:
            return examples.__getitems__(list(numbers))
        except Exception as error:
            if len(numbers) == 1:
                return [error]
            return [
                one for number in numbers for one in self._read(examples, range(number, number + 1))
            ]

    def place(self) -> str:
        """As in `Source`."""
        return f"{self.data} ({self.split})"

    @property
    def name(self) -> str:
        """As in `Source`; the training split's without the split."""
        return plain(self.data if self.split == "train" else self.place())

    def _open(self) -> tuple[Any, Any]:
        if is_url(self.data):
            raise UserError(
                f"TFDS reads ArrayRecord from local disks only; copy {self.data} to one first."
            )
        import tensorflow_datasets as tfds

        try:
            if Path(self.data).is_dir():
                builder = tfds.builder_from_directory(self.data)
            else:
                builder = tfds.builder(
                    self.data, data_dir=self.tfds_dir, file_format="array_record"
                )
                builder.download_and_prepare()
            return builder, builder.as_data_source(split=self.split)
        # TFDS raises a class of its own for every cause, and TensorFlow's absence as yet another.
        except Exception as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"TFDS can't give {self.data!r} ({self.split}): {why[0]}") from error

    def stamp(self) -> dict[str, str]:
        """As in `Source`."""
        info = Path(self.data) / "dataset_info.json"
        return {str(info): file_stamp(str(info))} if info.is_file() else {}


def _record(example: Any, place: Place) -> Record:
    fields = example if isinstance(example, dict) else {"text": example}
    why = None
    if isinstance(example, Exception):
        why = (str(example).strip().splitlines() or [type(example).__name__])[0].rstrip(".")
    elif all(value is None for value in fields.values()):
        why = "it holds nothing"  # what ArrayRecord gives of a file that ends between two blocks
    if why is not None:
        raise UserError(f"{place} is torn ({why}); fetch or prepare the data set again.")
    return {name: json_field(lambda: value, name, place) for name, value in fields.items()}  # noqa: B023


@dataclasses.dataclass(frozen=True)
class HuggingFace(Source):
    """A split of a data set of Hugging Face's hub, of files, or saved by `save_to_disk`.

    Attributes:
      data: name on the hub, or folder.
      config: of the several that some data sets have.
      split: as `datasets` has them; "train[:1000]" too.
      field: what to give as "text"; None: the examples as they are.
      columns: the columns to read; None: all. Images and sound can't become text: leave them out.
      revision: of the hub's; None: the newest.
    """

    data: str
    config: str | None = None
    split: str = "train"
    field: str | None = None
    columns: tuple[str, ...] | list[str] | None = None
    revision: str | None = None

    def parts(self) -> list[Part]:
        """As in `Source`."""
        examples = self._open()
        size = examples.data.nbytes * len(examples) // max(1, examples.data.num_rows)
        return ranges(self.data, len(examples), size)

    def records(self, part: Part, on_broken: OnBroken) -> Iterator[tuple[Record, Place]]:
        """As in `Source`."""
        examples = self._open().with_format("arrow")
        ((_, start, stop),) = part.pieces
        share = part.size / (stop - start)
        many = max(1, int(BATCH_BYTES / max(1, share)))
        for first in range(start, stop, many):
            table = examples[first : min(first + many, stop)]
            place = places(self.data, "record", first, int((first - start) * share), share)
            yield from rows(table, place, self.field, "HuggingFace", on_broken)

    def place(self) -> str:
        """As in `Source`."""
        config = f"/{self.config}" if self.config else ""
        return f"{self.data}{config} ({self.split})"

    @property
    def name(self) -> str:
        """As in `Source`; the training split's without the split."""
        return plain(self.place().removesuffix(" (train)"))

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{self.data!r} needs Hugging Face's datasets: pip install 't5x_lite[datasets]'."
            ) from error
        saved = [Path(self.data) / name for name in ("state.json", "dataset_dict.json")]
        try:
            if any(file.is_file() for file in saved):
                examples = datasets.load_from_disk(self.data)
                examples = examples[self.split] if saved[1].is_file() else examples
            else:
                examples = datasets.load_dataset(
                    self.data, self.config, split=self.split, revision=self.revision
                )
            return examples.select_columns(list(self.columns)) if self.columns else examples
        # the library's own classes, those of its files' readers and those of the network
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"datasets can't give {self.place()}: {why}.") from error

    def stamp(self) -> dict[str, str]:
        """As in `Source`: the fingerprint that `datasets` gives."""
        return {self.place(): self._open()._fingerprint}
