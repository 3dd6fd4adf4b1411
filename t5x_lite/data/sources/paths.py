"""Files on local disks and behind URLs: found, measured and opened, with errors that name them."""

import contextlib
import functools
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.errors import UserError

STAMP_BYTES = 2**20  # read from both ends of a file to tell whether it changed
COUNT_BYTES = 32 * 2**20  # lines are counted once in each such stretch of a file
REMOTE_BUFFER = 2**20
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub"}


class BrokenFileError(UserError):
    """A file that breaks off or isn't what its name says; records before that place are good."""


class Opened(NamedTuple):
    """A file's content, and the file itself: another one where the content is compressed."""

    content: io.IOBase
    raw: io.IOBase


def is_url(path: str) -> bool:
    """Whether fsspec is to open it."""
    return "://" in path


def compression(path: str) -> str | None:
    """What a file's name says of how it's compressed."""
    return COMPRESSIONS.get(os.path.splitext(path)[1])


def suffix(path: str) -> str:
    """A file's own suffix, without that of its compression: ".jsonl" of "a.jsonl.gz"."""
    stem, last = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if last in COMPRESSIONS else last).lower()


def matches(path: str) -> list[str]:
    """The files that a path, URL or glob pattern stands for, in order.

    Raises:
      UserError: none.
    """
    if is_url(path):
        found = _remote_matches(path)
    elif glob.has_magic(path) and not Path(path).exists():
        found = [str(Path(name)) for name in sorted(glob.glob(path, recursive=True))]
        found = [file for file in found if os.path.isfile(file)]
    else:
        found = [str(Path(path))] if os.path.isfile(path) else []
    if not found:
        seen_from = "" if is_url(path) else f" (seen from {Path.cwd()})"
        raise UserError(f"no file {path}{seen_from}; name a file or a pattern.")
    return found


def _remote_matches(path: str) -> list[str]:
    with readable(path):
        system, inside = _file_system(path)
        names = system.glob(inside) if glob.has_magic(inside) else [inside]
        return [system.unstrip_protocol(name) for name in sorted(names) if system.isfile(name)]


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        driver = DRIVERS.get(url.split("://")[0], "fsspec")
        raise UserError(f"{url} needs a driver: pip install {driver}.") from error
    except ValueError as error:  # an unknown protocol
        raise UserError(f"can't read {url}: {_why(error)}.") from error


def file_size(path: str) -> int:
    """Bytes of a file as it lies there. Raises UserError where it can't be read."""
    with readable(path):
        if is_url(path):
            system, inside = _file_system(path)
            return system.size(inside)
        return os.stat(path).st_size


def file_stamp(path: str) -> str:
    """Size and a hash of the first and last MiB: cheap for any size."""
    size = file_size(path)
    with raw_file(path) as stream:
        digest = hashlib.blake2b(stream.read(STAMP_BYTES), digest_size=8)
        stream.seek(max(size - STAMP_BYTES, 0))
        digest.update(stream.read(STAMP_BYTES))
    return f"{size} bytes, {digest.hexdigest()}"


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """What goes wrong while a file is read becomes a UserError that names it.

    Raises:
      BrokenFileError: the compressed content breaks off or isn't that.
    """
    try:
        yield
    except Exception as error:
        if compression(path) and _is_torn(error):
            why = _why(error)
            raise BrokenFileError(f"{path} is torn ({why}); fetch or write it again.") from error
        if isinstance(error, OSError) or (is_url(path) and _is_foreign(error)):
            raise UserError(f"can't read {path}: {_why(error)}.") from error
        raise


def _is_torn(error: Exception) -> bool:
    """Whether it's a decompressor's; bz2 and gzip have OSErrors without a number."""
    if isinstance(error, OSError):
        return error.errno is None
    is_zstd = type(error).__name__ == "ZstdError"  # of a package that needn't be there
    return isinstance(error, EOFError | zlib.error | lzma.LZMAError) or is_zstd


def _is_foreign(error: Exception) -> bool:
    """Whether a driver's own class, such as botocore's; Python's would be a bug."""
    return type(error).__module__ != "builtins" and not isinstance(error, UserError)


def _why(error: Exception) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return (lines or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def raw_file(path: str) -> Iterator[io.IOBase]:
    """A file's bytes as they lie there, to read and seek in."""
    with readable(path):
        if not is_url(path):
            with open(path, "rb") as stream:
                yield stream
            return
        system, inside = _file_system(path)
        with (
            system.open(inside, "rb") as remote,
            io.BufferedReader(remote, REMOTE_BUFFER) as stream,
        ):
            yield stream


@contextlib.contextmanager
def opened(path: str) -> Iterator[Opened]:
    """A file's content, decompressed where its name says that it's compressed."""
    with raw_file(path) as raw:
        kind = compression(path)
        if kind is None:
            yield Opened(raw, raw)
        else:
            with _decompressed(raw, kind, path) as content:
                yield Opened(content, raw)


def _decompressed(raw: io.IOBase, kind: str, path: str) -> io.IOBase:
    if kind == "gzip":
        return gzip.open(raw)
    if kind == "bz2":
        import bz2

        return bz2.open(raw)
    if kind == "xz":
        return lzma.open(raw)
    # not the package `zstandard`: it takes a torn file for a short one
    try:
        from backports import zstd
    except ImportError as error:
        raise UserError(f"{path} needs a decoder: pip install backports.zstd.") from error
    return zstd.open(raw)


def lines_before(path: str, start: int) -> int:
    """Lines that end before byte `start`; 0 where the file has gone."""
    stretches = range(0, start, COUNT_BYTES)
    try:
        return sum(_newlines(path, at, min(at + COUNT_BYTES, start)) for at in stretches)
    except UserError:
        return 0


@functools.lru_cache(maxsize=2**16)
def _newlines(path: str, start: int, stop: int) -> int:
    with raw_file(path) as stream:
        stream.seek(start)
        return stream.read(stop - start).count(b"\n")
