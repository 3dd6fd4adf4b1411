"""Plain text and JSON lines."""

import codecs
import dataclasses
import json
from collections.abc import Iterator

from t5x_lite.data.sources.base import (
    FileSource,
    OnBroken,
    Piece,
    Place,
    Record,
    decoded,
    renamed,
)
from t5x_lite.data.sources.lines import Lines, cut, paragraphs, single_lines
from t5x_lite.data.sources.paths import opened
from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class Text(FileSource):
    """Plain UTF-8 files, as {"text": …}.

    Attributes:
      documents_by: what ends a document: "blank_line" (paragraphs), "line", or "file". The file's
        end always does. Line ends at a document's end aren't part of it; blank ones are none.
    """

    documents_by: str = "blank_line"

    def __post_init__(self):
        super().__post_init__()
        if self.documents_by not in ("blank_line", "line", "file"):
            raise UserError(
                f"documents_by={self.documents_by!r} is unknown; use blank_line, line or file."
            )

    def pieces(self, file: str) -> Iterator[tuple[Piece, int]]:
        """As in `FileSource`."""
        return super().pieces(file) if self.documents_by == "file" else cut(file)

    def read(
        self, piece: Piece, before: int, on_broken: OnBroken
    ) -> Iterator[tuple[Record, Place]]:
        """As in `FileSource`."""
        split = {"blank_line": paragraphs, "line": single_lines, "file": _whole}[self.documents_by]
        unit = "" if self.documents_by == "file" else "line"
        for offset, line, content, read in split(piece):
            place = Place(piece.path, unit, line, before + read, piece.start)
            try:
                text = decoded(content, piece.path, offset).strip("\r\n")
            except UserError as error:
                on_broken(error)
                continue
            if text and not text.isspace():
                yield {"text": text}, place


def _whole(piece: Piece) -> Iterator[Lines]:
    with opened(piece.path) as (stream, raw):
        content, read = stream.read(), raw.tell()
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    yield Lines(start, 1, content[start:] if start else content, read)


@dataclasses.dataclass(frozen=True)
class JsonLines(FileSource):
    """One JSON object a line; blank lines are none.

    Attributes:
      field: what to give as "text"; None: the objects as they are.
    """

    field: str | None = None

    def pieces(self, file: str) -> Iterator[tuple[Piece, int]]:
        """As in `FileSource`."""
        return cut(file)

    def read(
        self, piece: Piece, before: int, on_broken: OnBroken
    ) -> Iterator[tuple[Record, Place]]:
        """As in `FileSource`."""
        for offset, number, line, read in single_lines(piece):
            place = Place(piece.path, "line", number, before + read, piece.start)
            try:
                record = renamed(_object(line, offset, place), self.field, place, "JsonLines")
            except UserError as error:
                on_broken(error)
                continue
            yield record, place


def _object(line: bytes, offset: int, place: Place) -> Record:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        decoded(line, place.file, offset)
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} isn't JSON ({error}); mend or remove it.") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f'{place} is no JSON object but {kind}; put it in one: {{"text": …}}.')
    return value
