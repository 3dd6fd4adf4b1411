"""Tables: Parquet by its row groups, CSV and TSV as whole files."""

import contextlib
import csv
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

from t5x_lite.data.sources import base
from t5x_lite.data.sources.base import (
    END,
    FileSource,
    OnBroken,
    Piece,
    Place,
    Record,
    decoded,
    renamed,
)
from t5x_lite.data.sources.lines import blocks
from t5x_lite.data.sources.paths import BrokenFileError, file_size, raw_file, suffix
from t5x_lite.data.sources.values import BATCH_BYTES, places, rows
from t5x_lite.errors import UserError

FIELD_BYTES = 2**31 - 1  # the csv module's own limit is 128 KiB, less than a long document


@dataclasses.dataclass(frozen=True)
class Parquet(FileSource):
    """Parquet files; a record is a row.

    A part can't be less than a row group; its columns' pages are read as they are needed.

    Attributes:
      field: what to give as "text"; None: the rows as they are.
      columns: the columns to read; None: all.
    """

    field: str | None = None
    columns: tuple[str, ...] | list[str] | None = None

    def pieces(self, file: str) -> Iterator[tuple[Piece, int]]:
        """As in `FileSource`: row groups, as many as make PART_BYTES."""
        try:
            with _parquet(file) as table:
                sizes = _group_sizes(table.metadata)
        except BrokenFileError:
            if self.broken == "error":
                raise
            yield Piece(file, 0, END), file_size(file)  # is counted when it's read
            return
        start = total = 0
        for number, size in enumerate(sizes):
            if number > start and total + size > base.PART_BYTES:
                yield Piece(file, start, number), total
                start, total = number, 0
            total += size
        if sizes:
            yield Piece(file, start, len(sizes)), total

    def read(
        self, piece: Piece, before: int, on_broken: OnBroken
    ) -> Iterator[tuple[Record, Place]]:
        """As in `FileSource`."""
        with _parquet(piece.path) as table:
            first = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
            for group in range(piece.start, min(piece.stop, table.num_row_groups)):
                about = table.metadata.row_group(group)
                share = about.total_byte_size / max(1, about.num_rows)
                many = max(1, int(BATCH_BYTES / max(1, share)))
                for batch in table.iter_batches(many, [group], self._columns(piece.path, table)):
                    place = places(piece.path, "row", first, before, share)
                    yield from rows(batch, place, self.field, "Parquet", on_broken)
                    first += batch.num_rows
                    before += int(batch.num_rows * share)

    def _columns(self, file: str, table: Any) -> list[str] | None:
        if self.columns is None:
            return None
        has = table.schema_arrow.names
        if missing := [name for name in self.columns if name not in has]:
            raise UserError(
                f"{file} has no column {missing[0]!r} (it has {', '.join(has[:8])}); bind "
                f"Parquet.columns."
            )
        return list(self.columns)


@contextlib.contextmanager
def _parquet(file: str) -> Iterator[Any]:
    """Raises BrokenFileError where the file isn't Parquet to its end."""
    import pyarrow
    from pyarrow import parquet

    with raw_file(file) as stream:
        try:
            yield parquet.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            why = str(error).strip().splitlines()[0].rstrip(".")
            raise BrokenFileError(f"{file} is torn ({why}); fetch or write it again.") from error


def _group_sizes(metadata: Any) -> list[int]:
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


@dataclasses.dataclass(frozen=True)
class Table(FileSource):
    """CSV and TSV files; a record is a row, its values text.

    A file is read by one worker, because a line feed between quotes can't be told from the end of
    a row without what comes before.

    Attributes:
      field: what to give as "text"; None: the rows as they are.
      header: the columns' names, where the first row isn't them.
      delimiter: between fields; None: a tab in .tsv files, else a comma.
      quote: around fields that hold delimiters and line feeds; None: quotes mean nothing.
    """

    field: str | None = None
    header: tuple[str, ...] | list[str] | None = None
    delimiter: str | None = None
    quote: str | None = '"'

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("delimiter", self.delimiter), ("quote", self.quote)):
            if value is not None and len(value) != 1:
                raise UserError(f"Table.{name}={value!r} must be one character, or None.")

    def read(
        self, piece: Piece, before: int, on_broken: OnBroken
    ) -> Iterator[tuple[Record, Place]]:
        """As in `FileSource`."""
        csv.field_size_limit(FIELD_BYTES)
        lines = _TextLines(piece)
        reader = csv.reader(iter(lines), strict=True, **self._format(piece.path))
        names = list(self.header) if self.header else None
        while True:
            place = Place(piece.path, "line", reader.line_num + 1, 0)
            try:
                row = _next(reader, lines, place)
                if row is None:
                    return
                if not row:  # an empty line
                    continue
                if names is None:
                    names = _names(row, place)
                    continue
                record = renamed(_record(names, row, place), self.field, place, "Table")
            except UserError as error:
                if names is None:
                    raise BrokenFileError(str(error)) from error
                on_broken(error)
                continue
            yield record, place._replace(read=before + lines.read)

    def _format(self, file: str) -> dict[str, Any]:
        delimiter = self.delimiter or ("\t" if suffix(file) == ".tsv" else ",")
        if self.quote is None:
            return {"delimiter": delimiter, "quoting": csv.QUOTE_NONE}
        return {"delimiter": delimiter, "quotechar": self.quote}


class _TextLines:
    """A file's lines as text for the csv module; what isn't UTF-8 is told when the row is whole."""

    def __init__(self, piece: Piece):
        self.read, self._piece, self._broken = 0, piece, None

    def __iter__(self) -> Iterator[str]:
        for block in blocks(self._piece):
            self.read, offset = block.read, block.offset
            for line in io.BytesIO(block.content):
                try:
                    yield decoded(line, self._piece.path, offset)
                except UserError as error:
                    self._broken = error
                    yield line.decode(errors="replace")
                offset += len(line)

    def broken(self) -> UserError | None:
        """What was wrong with a line since the last call."""
        error, self._broken = self._broken, None
        return error


def _next(reader: Any, lines: _TextLines, place: Place) -> list[str] | None:
    """The next row; None at the end. Raises UserError where it's broken."""
    try:
        row = next(reader, None)
    except csv.Error as error:
        lines.broken()
        raise UserError(
            f"{place} isn't a row ({error}); mend or remove it, or bind Table.quote=None where "
            f"quotes mean nothing."
        ) from error
    if error := lines.broken():
        raise error
    return row


def _names(row: list[str], place: Place) -> list[str]:
    doubled = [name for name in row if row.count(name) > 1]
    if doubled:
        raise UserError(f"{place} names column {doubled[0]!r} twice; bind Table.header.")
    return row


def _record(names: list[str], row: list[str], place: Place) -> Record:
    if len(row) != len(names):
        raise UserError(
            f"{place} has {len(row)} fields where the header has {len(names)}; mend or remove it, "
            f"or bind Table.delimiter or Table.quote."
        )
    return dict(zip(names, row, strict=True))
