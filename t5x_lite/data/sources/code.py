"""Source-code trees."""

import dataclasses
import fnmatch
import glob
import hashlib
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from t5x_lite.data.sources.base import (
    END,
    OnBroken,
    Part,
    Piece,
    Place,
    Record,
    Source,
    decoded,
    grouped,
    plain,
)
from t5x_lite.data.sources.paths import file_size, file_stamp, raw_file
from t5x_lite.errors import UserError

SNIFF_BYTES = 8000  # a zero byte among these makes a file binary, as for git


@dataclasses.dataclass(frozen=True)
class Checkout(Source):
    """Source-code trees: of a git checkout the tracked files, else all below the folder.

    A record is a file: {"text", "path", "repository"}, the path as seen from the tree's top, the
    repository the top's name. Symbolic links, submodules and hidden folders of trees that aren't
    git's aren't followed.

    Attributes:
      folders: one folder or pattern of folders, or several.
      include: patterns of paths, of which one must match; `*` crosses folders: "*.py", "src/*".
      exclude: patterns of which none may match.
      max_bytes: of a file; larger ones are mostly data.
    """

    folders: str | tuple[str, ...] | list[str]
    include: str | tuple[str, ...] | list[str] = "*"
    exclude: str | tuple[str, ...] | list[str] = ()
    max_bytes: int = 2**20

    def __post_init__(self):
        super().__post_init__()
        for name in ("folders", "include", "exclude"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not self.folders or not self.include:
            raise UserError("Checkout.folders and Checkout.include must name something.")
        if self.max_bytes < 1:
            raise UserError(f"Checkout.max_bytes={self.max_bytes} must be at least 1; try 2**20.")

    def tops(self) -> list[str]:
        """The trees' folders. Raises UserError where a pattern matches none."""
        found = {f: sorted(glob.glob(f)) if glob.has_magic(f) else [f] for f in self.folders}
        for pattern, tops in found.items():
            if not any(map(os.path.isdir, tops)):
                raise UserError(f"no folder {pattern} (seen from {Path.cwd()}).")
        return [str(Path(top)) for tops in found.values() for top in tops if os.path.isdir(top)]

    def parts(self) -> list[Part]:
        """As in `Source`."""
        files = (f for f in self._files() if f.left_out is None)
        return grouped((Piece(os.path.join(f.top, f.path), 0, END), f.size) for f in files)

    def records(self, part: Part, on_broken: OnBroken) -> Iterator[tuple[Record, Place]]:
        """As in `Source`."""
        tops = sorted(self.tops(), key=len, reverse=True)
        read = 0
        for file, _, _ in part.pieces:
            with raw_file(file) as stream:
                content = stream.read()
            read += len(content)
            top = next(top for top in tops if Path(file).is_relative_to(top))
            about = {
                "path": _shown(os.path.relpath(file, top)),
                "repository": _shown(os.path.basename(os.path.abspath(top))),
            }
            try:
                yield {"text": decoded(content, file)} | about, Place(file, "", 0, read)
            except UserError as error:
                on_broken(error)

    def left_out(self) -> dict[str, int]:
        """Files that aren't read: excluded, binary, too large, links."""
        return dict(Counter(f.left_out for f in self._files() if f.left_out is not None))

    def place(self) -> str:
        """As in `Source`."""
        more = len(self.folders) - 1
        return self.folders[0] + (f" and {more} more" if more else "")

    @property
    def name(self) -> str:
        """As in `Source`: "." is the folder's name."""
        return plain(os.path.basename(os.path.abspath(self.folders[0])))

    def stamp(self) -> dict[str, str]:
        """As in `Source`, one hash for each tree."""
        digests = {top: hashlib.blake2b(digest_size=8) for top in self.tops()}
        for f in self._files():
            if f.left_out is None:
                stamp = file_stamp(os.path.join(f.top, f.path))
                digests[f.top].update(f"{_shown(f.path)} {stamp} ".encode())
        return {top: digest.hexdigest() for top, digest in digests.items()}

    def _files(self) -> Iterator["_File"]:
        for top in self.tops():
            for path in _tracked(top) if (Path(top) / ".git").exists() else _walked(top):
                file = os.path.join(top, path)
                if os.path.islink(file):
                    yield _File(top, path, 0, "link")
                elif os.path.isfile(file):  # not a submodule, nor deleted but tracked
                    size = file_size(file)
                    yield _File(top, path, size, self._reason(path, file, size))

    def _reason(self, path: str, file: str, size: int) -> str | None:
        """Why a file is left out; None where it isn't."""
        is_included = any(fnmatch.fnmatchcase(path, pattern) for pattern in self.include)
        if not is_included or any(fnmatch.fnmatchcase(path, p) for p in self.exclude):
            return "excluded"
        if size > self.max_bytes:
            return "too large"
        with raw_file(file) as stream:
            return "binary" if b"\0" in stream.read(SNIFF_BYTES) else None


class _File(NamedTuple):
    top: str
    path: str
    size: int
    left_out: str | None


def _tracked(top: str) -> list[str]:
    command = ["git", "-C", top, "ls-files", "-z"]
    try:
        output = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise UserError(
            f"{top} is a git checkout, but there is no git here; install it."
        ) from error
    except subprocess.CalledProcessError as error:
        why = error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise UserError(f"git can't list {top}: {why[0]}") from error
    return sorted(set(filter(None, os.fsdecode(output).split("\0"))))


def _walked(top: str) -> list[str]:
    found = []
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(folder, name), top) for name in files]
    return sorted(found)


def _shown(name: str) -> str:
    """A file's name as text, whatever its bytes."""
    return os.fsencode(name).decode(errors="replace")
