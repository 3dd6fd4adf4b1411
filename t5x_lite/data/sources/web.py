"""Web pages: WARC archives and HTML files, through datatrove's reader and extractor."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from t5x_lite.data.sources.base import FileSource, OnBroken, Piece, Place, Record
from t5x_lite.data.sources.paths import BrokenFileError, opened
from t5x_lite.errors import UserError

# mandatory by ISO 28500 (WARC 1.1), section 5
WARC_FIELDS = ("WARC-Type", "WARC-Record-ID", "WARC-Date", "Content-Length")


@dataclasses.dataclass(frozen=True)
class _Pages(FileSource):
    """What archives and files of pages share.

    Attributes:
      precision: rather less text than menus, advertisements and the like in it.
    """

    precision: bool = True

    def _text(self, html: str, place: Place) -> str:
        """The page's main text, "" where it has none."""
        with _needs_curate(place.file):
            import trafilatura  # noqa: F401 - datatrove imports it at the first page: miss it now
            from datatrove.pipeline.extractors import Trafilatura

            # Not through its sandbox, whose time limit would make the text depend on the machine;
            # nor with its memory of paragraphs, by which it would depend on the pages before.
            extractor = Trafilatura(favour_precision=self.precision, deduplicate=False)
        try:
            return extractor.extract(html) or ""
        except Exception as error:  # lxml's and trafilatura's own, whatever a page brings about
            raise UserError(
                f"{place} is no page that text can be taken from ({type(error).__name__}: {error})."
            ) from error


@dataclasses.dataclass(frozen=True)
class Warc(_Pages):
    """WARC archives, and Common Crawl's WET files: {"text", "id", "url", "date"} of each page.

    Other records than HTML pages are left out, as datatrove does, and so are pages without text.
    """

    def read(
        self, piece: Piece, before: int, on_broken: OnBroken
    ) -> Iterator[tuple[Record, Place]]:
        """As in `FileSource`."""
        is_text = ".wet" in piece.path  # extracted when it was crawled
        for page, place in _pages(piece, before):
            try:
                text = page["text"] if is_text else self._text(page["text"], place)
            except UserError as error:
                on_broken(error)
                continue
            if text:
                yield page | {"text": text}, place


def _pages(piece: Piece, before: int) -> Iterator[tuple[dict[str, Any], Place]]:
    """The pages in an archive, as HTML. Raises BrokenFileError where it breaks off."""
    with _needs_curate(piece.path):
        _load_libmagic()
        from datatrove.pipeline.readers.warc import process_record
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed

    with opened(piece.path) as (content, raw):
        archive = ArchiveIterator(content)
        number = -1
        try:
            for number, entry in enumerate(archive):
                place = Place(piece.path, "record", number, before + raw.tell())
                _refuse_torn_head(entry, place)
                page = process_record(entry)
                _refuse_torn(entry, place)
                if page:
                    yield page, place
        except ArchiveLoadFailed as error:
            raise BrokenFileError(f"{piece.path} is no WARC archive ({error}).") from error
        except AttributeError as error:  # warcio's, of a response without the page's address
            raise _torn(piece.path, number + 1, "it has no WARC-Target-URI") from error
        # warcio takes a record that ends within its head for the archive's end
        if archive.next_line or (number < 0 and raw.tell()):
            raise _torn(piece.path, number + 1, "its head breaks off")


def _torn(file: str, number: int, why: str) -> BrokenFileError:
    return BrokenFileError(f"{file}, record {number} is torn: {why}; fetch the file again.")


def _load_libmagic() -> Any:
    """What datatrove tells pages by; pylibmagic brings the library where the system has none."""
    import cchardet  # noqa: F401 - datatrove imports it while it reads: miss it now

    with contextlib.suppress(ImportError):
        import magic

        return magic
    import pylibmagic  # by being imported, it's found

    return pylibmagic


def _refuse_torn_head(entry: Any, place: Place) -> None:
    """Raises BrokenFileError where a field is missing that every record has."""
    for name in WARC_FIELDS:
        if entry.format == "warc" and not entry.rec_headers.get_header(name):
            raise _torn(place.file, place.number, f"it has no {name}")


def _refuse_torn(entry: Any, place: Place) -> None:
    """Raises BrokenFileError where the file ends before its last record does."""
    stream = entry.raw_stream
    while stream.read(2**16):
        pass
    if missing := getattr(stream, "limit", 0):
        raise _torn(place.file, place.number, f"{missing} bytes are missing")


@dataclasses.dataclass(frozen=True)
class Html(_Pages):
    """HTML files: {"text", "path"} of each that has text."""

    def read(
        self, piece: Piece, before: int, on_broken: OnBroken
    ) -> Iterator[tuple[Record, Place]]:
        """As in `FileSource`."""
        with opened(piece.path) as (stream, raw):
            content = stream.read()
            place = Place(piece.path, "", 0, before + raw.tell())
        try:
            text = self._text(_decoded(content, place), place)
        except UserError as error:
            on_broken(error)
            return
        if text:
            yield {"text": text, "path": piece.path}, place


def _decoded(content: bytes, place: Place) -> str:
    """As datatrove decodes pages in archives: UTF-8, else what the bytes look like."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        with _needs_curate(place.file):
            import cchardet
        try:
            return content.decode(cchardet.detect(content)["encoding"] or "utf-8")
        except (UnicodeDecodeError, LookupError) as error:
            raise UserError(f"{place} is in no encoding that is known; convert it.") from error


@contextlib.contextmanager
def _needs_curate(file: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{file} needs what isn't installed ({error}): pip install 't5x_lite[curate]'."
        ) from error
