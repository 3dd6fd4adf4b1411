"""Step folders on disk: which there are, whether their files are whole, and setting them aside.

`100/` is the checkpoint of step 100. Until it is committed it is `100.orbax-checkpoint-tmp`; set
aside it is `100.bad` or `100.superseded` (a second time `100.bad.2`), which nothing here deletes.
"""

import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.tensors import gist

RECORD = "meta/metadata"
FILES = "meta/files"
# Orbax writes these two last, after the list of files.
COMMIT_MARKERS = ("_CHECKPOINT_METADATA", "commit_success.txt")
TEMPORARY = ".orbax-checkpoint-tmp"
_ASIDE = re.compile(r"\d+\.(bad|superseded)(\.\d+)?")

# Files of up to this size get a CRC. All that the tensors' digests don't cover are far smaller.
SUMMED_BYTES = 1 << 20


def check_directory(directory: Path) -> None:
    """Raises `UserError` for a path that is a file or holds something other than checkpoints."""
    try:
        names = [path.name for path in entries(directory)]
    except NotADirectoryError as error:
        raise UserError(f"{directory} is not a directory; give another model_dir.") from error
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {gist(error)}.") from error
    ours = [n for n in names if n.isdecimal() or _ASIDE.fullmatch(n) or TEMPORARY in n]
    if names and not ours:
        raise UserError(
            f"{directory} is not a checkpoint directory: it holds {min(names)!r} and no step; "
            "give another model_dir."
        )


def check_writable(directory: Path) -> None:
    """Makes the directory and writes to it once, so that a run fails before it trains."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written: {gist(error)}; give another model_dir."
        ) from error


def entries(directory: Path) -> list[Path]:
    """What the directory holds; nothing if it doesn't exist."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def steps(directory: Path) -> list[int]:
    """The steps whose folders are in place, ascending, sound or not."""
    found = [p for p in entries(directory) if p.name.isdecimal() and p.is_dir()]
    return sorted(int(p.name) for p in found if p.name == str(int(p.name)))


def list_files(folder: Path) -> None:
    """Writes the sizes and sums of the folder's files to its `FILES`, before it is committed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): _size_and_sum(path) for path in paths}
    for marker in COMMIT_MARKERS:
        listed.pop(marker, None)
    (folder / FILES).write_text(json.dumps({"crc": _sum(listed), "files": listed}), "utf-8")


def fault(folder: Path) -> str | None:
    """What is wrong with the files of a step, as one clause; None for nothing.

    Says nothing of bits changed within files larger than `SUMMED_BYTES`: digests find those.
    """
    for name in (*COMMIT_MARKERS, FILES, RECORD):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        listed = json.loads((folder / FILES).read_text("utf-8"))
        if listed["crc"] != _sum(listed["files"]):
            return f"{FILES} is not what was saved (its checksum differs)"
        return next(_changes(folder, listed["files"]), None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{FILES} cannot be read ({gist(error)})"


def set_aside(folder: Path, ending: str) -> Path:
    """Renames `100` to `100.<ending>`, with a number after it if that name is taken."""
    name, count = folder.with_name(f"{folder.name}.{ending}"), 1
    while name.exists():
        count += 1
        name = folder.with_name(f"{folder.name}.{ending}.{count}")
    return folder.rename(name)


def _sum(listed: Any) -> int:
    return zlib.crc32(json.dumps(listed, sort_keys=True).encode())


def _size_and_sum(path: Path) -> list[int | None]:
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= SUMMED_BYTES else None]


def _changes(folder: Path, listed: Mapping[str, Any]) -> Iterator[str]:
    for name, (size, checksum) in listed.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes instead of {size}"
        elif checksum is not None and zlib.crc32(path.read_bytes()) != checksum:
            yield f"{name} is not what was saved (its checksum differs)"
