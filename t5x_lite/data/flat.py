"""A long row of numbers in one file, read anywhere in it: mapped into memory, checked as it's read.

Beside `NAME.bin` lies `NAME.sums.npy`, a CRC-32 of each block. A block is checked when something in
it is first read, so a torn file or a flipped bit is an error and never a wrong token.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

BLOCK = 2**16  # bytes


class DamagedError(Exception):
    """The file isn't what was written; the message says how."""


class Flat:
    """The numbers of a file. Safe to read from several threads.

    Args:
      path: without its suffix.
      dtype: of the numbers.
      length: how many there must be.

    Raises:
      DamagedError: there are fewer or more, or no file.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int):
        self._path, self._dtype, self._length = path, dtype, length
        file, size = path.with_suffix(".bin"), length * dtype.itemsize
        try:
            self._sums = np.load(path.with_suffix(".sums.npy"))
            found = file.stat().st_size
            # An empty file can't be mapped.
            mapped = np.memmap(file, np.uint8, "r") if found else np.zeros(0, np.uint8)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{file.name}: {error}") from error
        if found != size or len(self._sums) != -(-size // BLOCK):
            raise DamagedError(f"{file.name} has {found} bytes of {size}")
        self._bytes = np.asarray(mapped)  # memmap's own indexing is slow
        self._checked = np.zeros(len(self._sums), bool)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Numbers start..stop-1. Raises DamagedError where they aren't those that were written."""
        first, last = start * self._dtype.itemsize, stop * self._dtype.itemsize
        blocks = slice(first // BLOCK, -(-last // BLOCK))
        if not self._checked[blocks].all():
            self._check(blocks)
        return self._bytes[first:last].view(self._dtype)

    def _check(self, blocks: slice) -> None:
        for block in range(blocks.start, blocks.stop):
            place = block * BLOCK
            if zlib.crc32(self._bytes[place : place + BLOCK]) != self._sums[block]:
                raise DamagedError(f"{self._path.name}.bin changed near byte {place}")
            self._checked[block] = True


def join(parts: Iterable[Path], path: Path) -> None:
    """Writes the bytes of files end to end as one that `Flat` reads; memory stays at a block."""
    sums, waiting = [], b""
    with path.with_suffix(".bin").open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                while more := source.read(BLOCK - len(waiting)):
                    waiting += more
                    if len(waiting) == BLOCK:
                        sums.append(zlib.crc32(waiting))
                        target.write(waiting)
                        waiting = b""
        if waiting:
            sums.append(zlib.crc32(waiting))
            target.write(waiting)
    np.save(path.with_suffix(".sums.npy"), np.array(sums, np.uint32))
