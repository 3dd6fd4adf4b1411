"""Examples that are one record each; those longer than a row are trimmed or left out."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from t5x_lite.data.converters import Segment
from t5x_lite.data.objectives.base import NoiseOf
from t5x_lite.errors import UserError

TRIM, DROP = "trim", "drop"


@runtime_checkable
class Records(Protocol):
    """Tokenised records by number, as `token_store.TokenStore` has them."""

    def lengths(self, column: str) -> np.ndarray:
        """[records] entries of each record in a column."""
        ...

    def read(self, numbers: Sequence[int]) -> list[tuple[np.ndarray, ...]]:
        """The columns of records by number; ids as int32."""
        ...


class FromRecords:
    """One example a record; no noise.

    Args:
      store: the records.
      make: a record's columns to a segment, trimmed to the row.
      sizes: [records, sides] positions of each, trimmed.
      is_long: [records] whether a row is too short for all of it.
      too_long: "trim" or "drop".
      room: what `is_long` compares with, for people: "128 tokens".
      is_useless: [records] whether there's nothing to learn; such records are left out.
    """

    are_sizes_fixed, is_noisy = True, False

    def __init__(
        self,
        store: Records,
        make: Callable[[tuple[np.ndarray, ...]], Segment],
        *,
        sizes: Int[np.ndarray, "records sides"],
        is_long: Bool[np.ndarray, " records"],
        too_long: str,
        room: str,
        is_useless: Bool[np.ndarray, " records"] | None = None,
    ):
        self._store, self._make = store, make
        useless = np.zeros(len(sizes), bool) if is_useless is None else is_useless
        is_long = is_long & ~useless
        self.long, self.useless = int(is_long.sum()), int(useless.sum())
        self._records, self._room, self._too_long = len(sizes), room, too_long
        kept = ~useless & ~is_long if too_long == DROP else ~useless
        self._numbers = None if kept.all() else np.flatnonzero(kept)
        self._sizes = sizes if self._numbers is None else sizes[self._numbers]

    def __len__(self) -> int:
        return len(self._sizes)

    def segments(self, index: int, noise: np.random.Generator) -> list[Segment]:
        """As in `Examples`."""
        del noise
        number = index if self._numbers is None else int(self._numbers[index])
        return [self._make(self._store.read([number])[0])]

    def sizes(self, noise_of: NoiseOf) -> np.ndarray:
        """As in `Examples`."""
        del noise_of
        return self._sizes

    @property
    def note(self) -> str:
        """What didn't fit; "" where all did."""
        fate = {TRIM: "trimmed", DROP: "left out"}[self._too_long]
        parts = []
        if self.long:
            parts.append(f"{self.long:,} are longer than {self._room} and are {fate}")
        if self.useless:
            parts.append(f"{self.useless:,} have nothing to learn and are left out")
        return f"of {self._records:,} examples {'; '.join(parts)}" if parts else ""


def check_too_long(policy: str) -> None:
    """Raises UserError for what is neither "trim" nor "drop"."""
    if policy not in (TRIM, DROP):
        raise UserError(f"too_long={policy!r} is unknown; use 'trim' or 'drop'.")


def framed(*parts: tuple[int, ...] | np.ndarray) -> Int[np.ndarray, " n"]:
    """Parts end to end, as int32."""
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
