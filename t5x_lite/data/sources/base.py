"""What every source is: parts that workers read alone, records in them, and what breaks one."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from t5x_lite.data.sources.paths import (
    BrokenFileError,
    file_size,
    file_stamp,
    lines_before,
    matches,
)
from t5x_lite.errors import UserError

Record = dict[str, Any]  # JSON values; text sources give {"text": …}
OnBroken = Callable[[UserError], None]  # raises, or counts

PART_BYTES = 32 * 2**20  # of input that one worker takes at once; more than a byte order mark
END = 2**63 - 1  # where a piece stops that is to be read to its file's end, wherever that is


class Piece(NamedTuple):
    """What begins in start..stop-1 of a file or data set: bytes, rows or records, as it counts."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What one worker reads alone.

    Attributes:
      pieces: in order.
      size: bytes of input, about; for progress.
    """

    pieces: tuple[Piece, ...]
    size: int


class Place(NamedTuple):
    """Where a record stands.

    Attributes:
      file: or data set.
      unit: what is counted: "line", from 1; "record" or "row", from 0; "" where the file is all.
      number: of them up to the record; of lines, those from byte `start` on.
      read: bytes of the part read so far; for progress.
      start: where the counting of lines began. Those before are counted when the place is shown.
    """

    file: str
    unit: str
    number: int
    read: int
    start: int = 0

    def __str__(self) -> str:
        number = self.number + (lines_before(self.file, self.start) if self.start else 0)
        return f"{self.file}, {self.unit} {number}" if self.unit else self.file


@dataclasses.dataclass(frozen=True)
class Source:
    """Base of the sources.

    Attributes:
      broken: what becomes of a record that can't be read: "error" stops, "skip" leaves it out and
        counts it.
    """

    broken: str = dataclasses.field(default="error", kw_only=True)

    def __post_init__(self):
        if self.broken not in ("error", "skip"):
            raise UserError(f"broken={self.broken!r} is unknown; use 'error' or 'skip'.")

    def parts(self) -> list[Part]:
        """The input in pieces of about PART_BYTES; the same input gives the same, in order.

        Raises:
          UserError: an input is missing.
        """
        raise NotImplementedError

    def records(self, part: Part, on_broken: OnBroken) -> Iterator[tuple[Record, Place]]:
        """The records of one of `parts()`, in order; those of all parts are those of the input.

        Args:
          part: what to read.
          on_broken: called with an error that names record and remedy, for each that is broken;
            where it returns, reading goes on behind the record (a torn file: behind the file).

        Raises:
          UserError: an input is missing, or what `on_broken` raises.
        """
        raise NotImplementedError

    def left_out(self) -> dict[str, int]:
        """How much of the input isn't meant to be read, by reason."""
        return {}

    def place(self) -> str:
        """Where the text lies, for messages."""
        return type(self).__name__

    @property
    def name(self) -> str:
        """A name for the corpus: the place's letters and digits, without a file's suffix."""
        return plain(self.place())

    def describe(self) -> dict[str, Any]:
        """The config, json-able."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"name": type(self).__name__} | fields

    def stamp(self) -> dict[str, str]:
        """What shows cheaply that the input changed since: per file, size and hash of its ends."""
        return {}


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
    """Sources that read named files.

    Attributes:
      paths: one path, URL (gs://, s3://, …) or glob pattern, or several.
    """

    paths: str | tuple[str, ...] | list[str]

    def __post_init__(self):
        super().__post_init__()
        paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
        if not paths:
            raise UserError(f"{type(self).__name__}.paths is empty; name at least one file.")
        object.__setattr__(self, "paths", paths)

    def place(self) -> str:
        """As in `Source`."""
        more = len(self.paths) - 1
        return self.paths[0] + (f" and {more} more" if more else "")

    def files(self) -> list[str]:
        """The files in order. Raises UserError where a path or pattern matches none."""
        return [file for path in self.paths for file in matches(path)]

    def stamp(self) -> dict[str, str]:
        """As in `Source`."""
        return {file: file_stamp(file) for file in self.files()}

    def parts(self) -> list[Part]:
        """As in `Source`: many small files are one part; what can be cut is cut."""
        return grouped(sized for file in self.files() for sized in self.pieces(file))

    def records(self, part: Part, on_broken: OnBroken) -> Iterator[tuple[Record, Place]]:
        """As in `Source`."""
        before = 0
        for piece in part.pieces:
            place = None
            try:
                for record, place in self.read(piece, before, on_broken):
                    yield record, place
            except BrokenFileError as error:
                on_broken(error)
            before = place.read if place else before

    def pieces(self, file: str) -> Iterator[tuple[Piece, int]]:
        """The pieces of a file and their sizes in bytes; here one."""
        yield Piece(file, 0, END), file_size(file)

    def read(
        self, piece: Piece, before: int, on_broken: OnBroken
    ) -> Iterator[tuple[Record, Place]]:
        """The records of one piece, `before` bytes of the part having been read.

        Raises:
          BrokenFileError: the file breaks off.
        """
        raise NotImplementedError


def grouped(pieces: Iterable[tuple[Piece, int]]) -> list[Part]:
    """Parts of consecutive pieces of given sizes, each filled up to PART_BYTES."""
    parts: list[Part] = []
    together: list[Piece] = []
    total = 0
    for piece, size in pieces:
        if together and total + size > PART_BYTES:
            parts.append(Part(tuple(together), total))
            together, total = [], 0
        together.append(piece)
        total += size
    return [*parts, Part(tuple(together), total)] if together else parts


def ranges(path: str, count: int, size: int) -> list[Part]:
    """Parts of a data set of `count` records and about `size` bytes."""
    each = max(1, count * PART_BYTES // max(size, 1))
    average = size / max(count, 1)
    return [
        Part((Piece(path, start, stop),), round(average * (stop - start)))
        for start in range(0, count, each)
        for stop in [min(start + each, count)]
    ]


def renamed(record: Record, field: str | None, place: Place, owner: str) -> Record:
    """The record with its `field` as "text"; as it is where `field` is None.

    Raises:
      UserError: the field is missing, or no text.
    """
    if field is None:
        return record
    text = record.get(field)
    if not isinstance(text, str):
        has = ", ".join(sorted(record)[:8]) or "none"
        raise UserError(f"{place} has no text field {field!r} (it has {has}); bind {owner}.field.")
    if field == "text":
        return record
    return {name: value for name, value in record.items() if name != field} | {"text": text}


def decoded(content: bytes, name: str, start: int = 0) -> str:
    """Text of UTF-8 that begins at byte `start` of `name`.

    Raises:
      UserError: it isn't UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} isn't UTF-8 at byte {start + error.start} (0x{content[error.start]:02x}); "
            f"convert it, for example with iconv -t UTF-8."
        ) from error


def plain(place: str) -> str:
    """A name of letters, digits and dashes for a place."""
    stem = re.sub(r"\.(txt|jsonl|json|csv|tsv|parquet|html?|warc|wet|gz|bz2|xz|zst)\b", "", place)
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-").lower() or "text"
