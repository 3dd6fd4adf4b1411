"""Files of lines, cut in ranges of bytes and read a block of whole lines at a time."""

import codecs
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from t5x_lite.data.sources import base
from t5x_lite.data.sources.base import END, Piece
from t5x_lite.data.sources.paths import compression, file_size, opened, raw_file

BLOCK_BYTES = 2**20
PAST_BYTES = 2**16  # a block behind the range, where only one document's end is wanted
# White space but the line feed, as str.isspace has it, in UTF-8.
SPACE = (
    rb"(?:[ \t\r\v\f\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]"
    rb"|\xe2\x81\x9f|\xe3\x80\x80)"
)
BLANK_LINE = re.compile(SPACE + rb"*+")
# blank lines at a block's start, and those behind a line; a file's last needn't have an end
LEADING_BLANKS = re.compile(rb"(?:%b*+\n)*+(?:%b++\Z)?" % (SPACE, SPACE))
GAP = re.compile(
    rb"\n(?=[\s\x1c-\x1f\xc2\xe1-\xe3])(?:(?:%b*+\n)++(?:%b++\Z)?|%b++\Z)" % (SPACE, SPACE, SPACE)
)
VISIBLE = re.compile(rb"[!-~]")


class Lines(NamedTuple):
    """A line or several of a file that are one document.

    Attributes:
      offset: of the first byte, in the file's content.
      line: the first's number, counted from 1 at the piece's start.
      content: the bytes; line ends may follow.
      read: bytes of the piece's input read so far.
    """

    offset: int
    line: int
    content: bytes
    read: int


def cut(file: str) -> Iterator[tuple[Piece, int]]:
    """Ranges of PART_BYTES and their sizes; one range where the file is compressed."""
    size = file_size(file)
    if compression(file):
        yield Piece(file, 0, END), size
        return
    for start in range(0, size, base.PART_BYTES):
        stop = min(start + base.PART_BYTES, size)
        yield Piece(file, start, stop), stop - start


class Block(NamedTuple):
    """Whole lines of a file, as many as are read at once: `offset` and `read` as in `Lines`."""

    offset: int
    content: bytes
    read: int


def blocks(piece: Piece) -> Iterator[Block]:
    """The lines from the first that begins in the range to the file's end: stop when enough.

    No block but the last of the range reaches beyond it, and that by the end of its last line. A
    byte order mark is left out.
    """
    with opened(piece.path) as (stream, raw):
        offset = _first_line(stream, piece)
        while content := stream.read(_wanted(offset, piece.stop)):
            if not content.endswith(b"\n"):
                content += stream.readline()
            after = offset + len(content)
            if offset == 0 and content.startswith(codecs.BOM_UTF8):
                offset, content = len(codecs.BOM_UTF8), content.removeprefix(codecs.BOM_UTF8)
            yield Block(offset, content, min(raw.tell(), piece.stop) - piece.start)
            offset = after


def _wanted(offset: int, stop: int) -> int:
    return min(BLOCK_BYTES, stop - offset) if offset < stop else PAST_BYTES


def _first_line(stream: io.IOBase, piece: Piece) -> int:
    """Offset of the first line that begins in the range, or one behind it."""
    if piece.start == 0:
        return 0
    stream.seek(piece.start - 1)
    # no further than the range: one huge line isn't read anew for each range in it
    return piece.start - 1 + len(stream.readline(piece.stop - piece.start + 1))


def _first_number(piece: Piece, block: Block) -> int:
    """The number of the first block's first line: one more where the range begins within a line."""
    return 1 + (0 < piece.start < block.offset)


def single_lines(piece: Piece) -> Iterator[Lines]:
    """Each line that begins in the range and isn't blank."""
    number = None
    for block in blocks(piece):
        if block.offset >= piece.stop:
            return
        number = number or _first_number(piece, block)
        offset, lines = block.offset, block.content.split(b"\n")
        for at, line in enumerate(lines, number):
            if not BLANK_LINE.fullmatch(line):
                yield Lines(offset, at, line, block.read)
            offset += len(line) + 1
        number += len(lines) - 1


def paragraphs(piece: Piece) -> Iterator[Lines]:
    """Runs of lines that aren't blank, those of which the first line begins in the range."""
    pending: _Paragraph | None = None
    number = None
    for block in blocks(piece):
        content = block.content
        if number is None:
            number = _first_number(piece, block)
            if piece.start > 0 and not _follows_blank(piece.path, block.offset):
                pending = _Paragraph(0, 0, is_earlier=True)
        if block.offset >= piece.stop and (pending is None or pending.is_earlier):
            return
        runs, counted = _runs(content), 0
        if pending and (not runs or runs[0][0] > 0):
            yield from pending.finished(block.read)
            pending = None
        for start, stop in runs:
            if pending is None:
                if block.offset + start >= piece.stop:
                    return
                number, counted = number + content.count(b"\n", counted, start), start
                if stop < len(content):  # as nearly all: whole in one block
                    yield Lines(block.offset + start, number, content[start:stop], block.read)
                    continue
                pending = _Paragraph(block.offset + start, number)
            pending.add(content[start:stop])
            if stop < len(content):
                yield from pending.finished(block.read)
                pending = None
        number += content.count(b"\n", counted)
    if pending:
        yield from pending.finished(block.read)


class _Paragraph:
    """A paragraph while it's read; of one that an earlier part gives nothing is kept."""

    def __init__(self, offset: int, line: int, is_earlier: bool = False):
        self.is_earlier = is_earlier
        self._offset, self._line, self._chunks = offset, line, []

    def add(self, content: bytes) -> None:
        if not self.is_earlier:
            self._chunks.append(content)

    def finished(self, read: int) -> Iterator[Lines]:
        if not self.is_earlier:
            content = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            yield Lines(self._offset, self._line, content, read)


def _runs(content: bytes) -> list[tuple[int, int]]:
    """Where the runs of lines that aren't blank begin and end."""
    runs, begin = [], LEADING_BLANKS.match(content).end()
    for gap in GAP.finditer(content, begin):
        runs.append((begin, gap.start() + 1))
        begin = gap.end()
    if begin < len(content):
        runs.append((begin, len(content)))
    return runs


def _follows_blank(file: str, offset: int) -> bool:
    """Whether the line before the one that begins at `offset` is blank."""
    window = 256
    with raw_file(file) as stream:
        while True:
            begin = max(0, offset - window)
            stream.seek(begin)
            _, newline, line = stream.read(offset - begin).removesuffix(b"\n").rpartition(b"\n")
            if newline or begin == 0:
                line = line if newline else line.removeprefix(codecs.BOM_UTF8)
                return BLANK_LINE.fullmatch(line) is not None
            if VISIBLE.search(line):
                return False
            window *= 16
