"""Whole or not at all: files and folders written beside their place and renamed into it."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5x_lite.errors import UserError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"can't write {path}: {error.strerror or error}; free space or bind data_dir elsewhere."
        ) from error
    except RuntimeError as error:
        # ArrayRecord's way to say that the disk is full: "write() failed: …; writing PATH; …"
        if "; writing " not in str(error):
            raise
        why = str(error).split(";")[0]
        raise UserError(
            f"can't write {path}: {why}; free space or bind data_dir elsewhere."
        ) from error


def write_file(target: Path, content: bytes) -> None:
    """Writes beside, then renames over `target`."""
    beside = target.with_name(target.name + ".partial")
    with disk_errors(target):
        beside.write_bytes(content)
        os.replace(beside, target)


def write_json(target: Path, value: Any) -> None:
    """`value` as readable JSON, whole or not at all."""
    write_file(target, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None where there is no file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}); delete its folder and prepare again."
        ) from error


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One preparing process per folder; the others wait, and then find the work done."""
    import fcntl

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    with handle:
        with contextlib.suppress(OSError):  # a file system without locks: as before there were any
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two configs, in one line."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    parts = []
    for key in keys:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            parts.append(f"{key}: {difference(before, after)}")
        else:
            parts.append(f"{key} {before!r} → {after!r}")
    return ", ".join(parts)
