"""Where documents come from: text files, JSON lines, TFDS data sets, a package's dialogues.

A source gives documents one after another in a fixed order, without holding them all. Everything
broken in a file is a UserError that names the file and the place.
"""

import codecs
import dataclasses
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5x_lite.errors import UserError

STAMP_BYTES = 2**20  # read from both ends of a file to tell whether it changed


@dataclasses.dataclass(frozen=True)
class Source:
    """Base of the sources."""

    def documents(self) -> Iterator[tuple[str, int]]:
        """Each document that isn't blank, with the bytes of input read so far."""
        raise NotImplementedError

    def total_bytes(self) -> int | None:
        """Input bytes in all, where that's known; for progress."""
        return None

    def place(self) -> str:
        """Where the text lies, for messages."""
        return type(self).__name__

    @property
    def name(self) -> str:
        """A name for the corpus: the place's letters and digits, without a file's suffix."""
        return _plain(self.place())

    def describe(self) -> dict[str, Any]:
        """The config, json-able."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"name": type(self).__name__} | fields

    def stamp(self) -> dict[str, str]:
        """What shows cheaply that the input changed since: per file, size and hash of its ends."""
        return {}


@dataclasses.dataclass(frozen=True)
class _Files(Source):
    """Sources that read named files; `paths` is one path or glob pattern, or several."""

    paths: str | tuple[str, ...] | list[str]

    def __post_init__(self):
        paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
        if not paths:
            raise UserError(f"{type(self).__name__}.paths is empty; name at least one file.")
        object.__setattr__(self, "paths", paths)

    def place(self) -> str:
        """As in `Source`."""
        more = len(self.paths) - 1
        return self.paths[0] + (f" and {more} more" if more else "")

    def files(self) -> list[Path]:
        """The files in order. Raises UserError where a path or pattern matches none."""
        return [file for path in self.paths for file in _matches(path)]

    def total_bytes(self) -> int | None:
        """As in `Source`."""
        return sum(_size(file) for file in self.files())

    def stamp(self) -> dict[str, str]:
        """As in `Source`."""
        return {str(file): _stamp(file) for file in self.files()}


@dataclasses.dataclass(frozen=True)
class Text(_Files):
    """Plain UTF-8 files.

    `documents_by` says what ends a document: "blank_line" (paragraphs, the default), "line", or
    "file". The file's end always does.
    """

    documents_by: str = "blank_line"

    def __post_init__(self):
        super().__post_init__()
        if self.documents_by not in ("blank_line", "line", "file"):
            raise UserError(
                f"documents_by={self.documents_by!r} is unknown; use blank_line, line or file."
            )

    def documents(self) -> Iterator[tuple[str, int]]:
        """As in `Source`."""
        before = 0
        for file in self.files():
            lines: list[str] = []
            for line, read in _lines(file):
                is_end = self.documents_by == "line"
                if self.documents_by == "blank_line" and not line.strip():
                    is_end = True
                lines.append(line)
                if is_end:
                    yield from _document(lines, before + read)
                    lines = []
            before += _size(file)
            yield from _document(lines, before)


@dataclasses.dataclass(frozen=True)
class JsonLines(_Files):
    """One JSON object a line; the document is its `field`."""

    field: str = "text"

    def documents(self) -> Iterator[tuple[str, int]]:
        """As in `Source`."""
        before = 0
        for file in self.files():
            for number, (line, read) in enumerate(_lines(file), start=1):
                if line.strip():
                    text = self._text(line, f"{file}, line {number}")
                    yield from _document([text], before + read)
            before += _size(file)

    def _text(self, line: str, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} isn't JSON ({error}); mend or remove it.") from error
        text = record.get(self.field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            has = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else "no object"
            raise UserError(
                f"{place} has no text field {self.field!r} (it has {has}); bind JsonLines.field."
            )
        return text


@dataclasses.dataclass(frozen=True)
class TFDS(Source):
    """A split of a TFDS data set, by name or by the folder of a prepared one.

    The folder's files must be ArrayRecord (TFDS reads the others with TensorFlow only).
    """

    data: str
    field: str = "text"
    split: str = "train"
    tfds_dir: str | None = None

    def documents(self) -> Iterator[tuple[str, int]]:
        """As in `Source`."""
        records = self._open()
        read = 0
        for number in range(len(records)):
            record = records[number]
            text = record.get(self.field) if isinstance(record, dict) else None
            if not isinstance(text, bytes | str):
                raise UserError(
                    f"{self.data}, record {number} has no text field {self.field!r} (it has "
                    f"{', '.join(sorted(record))}); bind TFDS.field."
                )
            if isinstance(text, bytes):
                text = _decoded(text, f"{self.data}, record {number}", 0)
            read += len(text)
            yield from _document([text], read)

    def place(self) -> str:
        """As in `Source`."""
        return f"{self.data} ({self.split})"

    @property
    def name(self) -> str:
        """As in `Source`; the training split's without the split."""
        return _plain(self.data if self.split == "train" else self.place())

    def _open(self):
        import tensorflow_datasets as tfds

        try:
            if Path(self.data).is_dir():
                builder = tfds.builder_from_directory(self.data)
            else:
                builder = tfds.builder(
                    self.data, data_dir=self.tfds_dir, file_format="array_record"
                )
                builder.download_and_prepare()
            return builder.as_data_source(split=self.split)
        # TFDS raises a class of its own for every cause, and TensorFlow's absence as yet another.
        except Exception as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"TFDS can't give {self.data!r} ({self.split}): {why[0]}") from error

    def stamp(self) -> dict[str, str]:
        """As in `Source`."""
        info = Path(self.data) / "dataset_info.json"
        return {str(info): _stamp(info)} if info.is_file() else {}


@dataclasses.dataclass(frozen=True)
class Chitchat(Source):
    """7,168 English dialogues of the PyPI package chitchat-dataset (MIT).

    A document is a dialogue, one line per message.
    """

    def documents(self) -> Iterator[tuple[str, int]]:
        """As in `Source`."""
        file = self._file()
        try:
            dialogues = json.loads(file.read_bytes())
            for number, dialogue in enumerate(dialogues.values(), start=1):
                messages = (m["text"] for turn in dialogue["messages"] for m in turn)
                read = self.total_bytes() * number // len(dialogues)
                yield from _document(["\n".join(messages)], read)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} isn't chitchat-dataset's: reinstall the package.") from error

    def total_bytes(self) -> int:
        """As in `Source`."""
        return _size(self._file())

    def stamp(self) -> dict[str, str]:
        """As in `Source`."""
        return {"dataset.json": _stamp(self._file())}

    def _file(self) -> Path:
        import importlib.util

        # found, not imported: the package's own code has nothing to do here
        spec = importlib.util.find_spec("chitchat_dataset")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        for folder in folders:
            if (Path(folder) / "dataset.json").is_file():
                return Path(folder) / "dataset.json"
        raise UserError("the chitchat corpus isn't installed: pip install 't5x_lite[demo]'.")


def _plain(place: str) -> str:
    stem = re.sub(r"\.(txt|jsonl|json)\b", "", place)
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-").lower() or "text"


def corpus(
    text: str | tuple[str, ...] | list[str],
    field: str = "text",
    documents_by: str = "blank_line",
    split: str = "train",
) -> Source:
    """The source that a text's name stands for.

    Args:
        text: "chitchat"; .jsonl files or other text files, by path, pattern or several of either;
            or a TFDS data set, by name or by the folder of a prepared one.
        field: of JSON lines and TFDS: where an example has its text.
        documents_by: of text files: what ends a document.
        split: of a TFDS data set.
    """
    paths = (text,) if isinstance(text, str) else tuple(text)
    if paths == ("chitchat",):
        return Chitchat()
    jsonl = [path.endswith((".jsonl", ".json")) for path in paths]
    if any(jsonl) and not all(jsonl):
        raise UserError(f"{', '.join(paths)}: give either JSON lines or plain text, not both.")
    if any(jsonl):
        return JsonLines(paths, field)
    is_files = len(paths) > 1 or glob.has_magic(paths[0]) or Path(paths[0]).suffix
    if is_files and not Path(paths[0]).is_dir():
        return Text(paths, documents_by)
    return TFDS(paths[0], field, split)


def _document(lines: list[str], read: int) -> Iterator[tuple[str, int]]:
    text = "".join(lines).strip("\r\n")
    if text.strip():
        yield text, read


def _matches(path: str) -> list[Path]:
    if glob.has_magic(path) and not Path(path).exists():
        found = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        found = [file for file in found if file.is_file()]
    else:
        found = [Path(path)] if Path(path).is_file() else []
    if not found:
        raise UserError(f"no file {path} (seen from {Path.cwd()}); name a file or a pattern.")
    return found


def _lines(file: Path) -> Iterator[tuple[str, int]]:
    """Each line with its end, and the bytes read so far. A byte order mark is dropped."""
    read = 0
    try:
        with file.open("rb") as stream:
            for raw in stream:
                content = raw.removeprefix(codecs.BOM_UTF8) if read == 0 else raw
                yield _decoded(content, str(file), read + len(raw) - len(content)), read + len(raw)
                read += len(raw)
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}.") from error


def _decoded(content: bytes, name: str, start: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        place = start + error.start
        raise UserError(
            f"{name} isn't UTF-8 at byte {place} (0x{content[error.start]:02x}); "
            f"convert it, for example with iconv -t UTF-8."
        ) from error


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}.") from error


def _stamp(file: Path) -> str:
    """Size and a hash of the first and last MiB: cheap for any size."""
    size = _size(file)
    try:
        with file.open("rb") as stream:
            digest = hashlib.blake2b(stream.read(STAMP_BYTES), digest_size=8)
            stream.seek(max(size - STAMP_BYTES, 0))
            digest.update(stream.read(STAMP_BYTES))
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}.") from error
    return f"{size} bytes, {digest.hexdigest()}"
