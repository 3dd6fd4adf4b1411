"""Which examples share a row: plans made once over the examples' sizes, kept beside the tokens."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from t5x_lite.errors import UserError

CHUNK = 2**20  # examples planned at a time: bounds memory, and costs one half-empty row a chunk
TRIES = 16  # rows of equal room looked at for one that has room on the other side too


@dataclasses.dataclass(frozen=True)
class Plan:
    """Row r holds examples order[starts[r]:starts[r + 1]]."""

    order: np.ndarray  # [examples]
    starts: np.ndarray  # [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def examples(self) -> int:
        """How many the rows hold."""
        return len(self.order)

    def members(self, row: int) -> list[int]:
        """The examples of a row."""
        return self.order[int(self.starts[row]) : int(self.starts[row + 1])].tolist()


def best_fit(sizes: Int[np.ndarray, "examples sides"], room: Sequence[int]) -> Plan:
    """Best-fit decreasing: the largest first, each where it leaves the least room.

    Used for language models by Ding et al. 2024 ("Fewer Truncations Improve Language Modeling").
    With two sides the fuller one decides which row fits best, and the other whether it fits.

    Args:
      sizes: positions that each example takes on each side; those of size 0 are left out.
      room: positions of a row on each side.

    Raises:
      UserError: an example that is larger than a row.
    """
    too_large = np.argwhere(sizes > np.array(room))
    if len(too_large):
        example, side = too_large[0]
        raise UserError(
            f"example {example} has {sizes[example, side]} positions and a row {room[side]}; give "
            f"a larger length."
        )
    # First the side of which more is needed: it decides, and the other one seldom forbids.
    sides = np.argsort(-sizes.sum(axis=0) / np.array(room), kind="stable")
    sizes, room = sizes[:, sides], [room[side] for side in sides]
    row_of = np.full(len(sizes), -1, np.int64)
    rows = 0
    for start in range(0, len(sizes), CHUNK):
        chunk = slice(start, start + CHUNK)
        row_of[chunk], rows = _fit_chunk(sizes[chunk], room, rows)
    order = np.argsort(row_of, kind="stable")
    order = order[np.searchsorted(row_of[order], 0) :]
    counts = np.bincount(row_of[order], minlength=rows)
    kind = np.uint32 if len(sizes) < 2**32 else np.uint64
    return Plan(order.astype(kind), np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64))


def _fit_chunk(sizes: np.ndarray, room: Sequence[int], rows: int) -> tuple[np.ndarray, int]:
    """The row of each example, from row number `rows` on; -1 where there's nothing to hold."""
    share = (sizes / np.array(room)).max(axis=1)
    row_of = np.full(len(sizes), -1, np.int64)
    finder = _Finder(room)
    # as Python's numbers: this loop is all of the work
    listed = sizes.tolist()
    for example in np.argsort(-share, kind="stable").tolist():
        need = listed[example]
        if any(need):
            row_of[example] = rows + finder.place(need)
    return row_of, rows + len(finder.left)


class _Finder:
    """Rows by what is left of their first side: `bits` has bit n set where some row has n left."""

    def __init__(self, room: Sequence[int]):
        self._room, self.left = list(room), []
        self._rows: list[list[int]] = [[] for _ in range(room[0] + 1)]
        self._bits = 0

    def place(self, need: list[int]) -> int:
        """Puts an example where it leaves the least; gives the row."""
        first, row = need[0], None
        fitting = self._bits >> first << first
        while fitting and row is None:
            left = (fitting & -fitting).bit_length() - 1
            row = self._take(left, need)
            fitting &= fitting - 1
        if row is None:
            row = len(self.left)
            self.left.append(list(self._room))
        left = [have - take for have, take in zip(self.left[row], need, strict=True)]
        self.left[row] = left
        if all(left):
            self._rows[left[0]].append(row)
            self._bits |= 1 << left[0]
        return row

    def _take(self, left: int, need: list[int]) -> int | None:
        """Removes from those with `left` a row that has room on every side."""
        rows = self._rows[left]
        for place in range(len(rows) - 1, max(len(rows) - 1 - TRIES, -1), -1):
            if all(h >= n for h, n in zip(self.left[rows[place]], need, strict=True)):
                row = rows.pop(place)
                if not rows:
                    self._bits &= ~(1 << left)
                return row
        return None


@dataclasses.dataclass(frozen=True)
class OneEach:
    """Every example in a row of its own; takes no memory, however many there are."""

    examples: int

    def __len__(self) -> int:
        return self.examples

    def members(self, row: int) -> list[int]:
        """The example of a row."""
        return [row]


def kept(
    folder: Path | None, key: Mapping[str, Any], make: Callable[[], Plan], kind: type[Plan] = Plan
) -> Plan:
    """The plan of `key`, made where it isn't in `folder` yet; mapped into memory, not read."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**kept_arrays(folder, key, names, lambda: vars(make())))


def kept_arrays(
    folder: Path | None,
    key: Mapping[str, Any],
    names: Sequence[str],
    make: Callable[[], Mapping[str, np.ndarray]],
) -> Mapping[str, np.ndarray]:
    """The arrays of `key`, made where they aren't in `folder` yet; mapped into memory, not read.

    A folder that can't be written (another user's) costs making them in every process.
    """
    if folder is None:
        return make()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    target = folder / "plans" / name
    if not target.is_dir():
        arrays = make()
        try:
            _save(arrays, target)
        except OSError:
            return arrays
    try:
        return {n: np.load(target / f"{n}.npy", mmap_mode="r") for n in names}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{target} can't be read ({error}); delete it.") from error


def _save(arrays: Mapping[str, np.ndarray], target: Path) -> None:
    """Whole or not at all; of several processes that make the same plan, the first one's stays."""
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as beside:
        whole = Path(beside) / "plan"
        whole.mkdir()
        for name, array in arrays.items():
            np.save(whole / f"{name}.npy", array)
        with contextlib.suppress(OSError):  # not empty: another was first
            os.replace(whole, target)
