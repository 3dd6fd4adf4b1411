"""Which task the r-th row of a mixture belongs to: an exact, deterministic interleave.

A tree of two-way splits. A node that r rows have reached has sent floor(r·p + 1/2) of them to its
left: a pure function of r in whole numbers, so any row is found without counting those before it,
and every task gets its share to within one row a level.
"""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

from t5x_lite.errors import UserError

SCALE = 2**53  # as fine as the rates' own floats


@dataclasses.dataclass(frozen=True)
class Interleave:
    """Rows among tasks in proportion to `weights`, which needn't add up to 1.

    Raises:
      UserError: a negative weight, or none that is positive.
    """

    weights: tuple[float | int, ...]

    def __post_init__(self):
        if any(not 0 <= weight < float("inf") for weight in self.weights):
            raise UserError(f"rates {list(self.weights)} must not be negative or infinite.")
        if not sum(self.weights) > 0:
            raise UserError(f"rates {list(self.weights)} sum to zero; give one task a rate above.")

    def locate(self, row: int) -> tuple[int, int]:
        """(task, how many of its rows came before) of a row."""
        first, last = 0, len(self.weights)
        while last - first > 1:
            middle, share = self._split(first, last)
            left = _sent(row, share)
            if _sent(row + 1, share) > left:
                row, last = left, middle
            else:
                row, first = row - left, middle
        return first, row

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each task has."""
        counts = [0] * len(self.weights)

        def descend(first: int, last: int, rows: int) -> None:
            if last - first == 1:
                counts[first] = rows
                return
            middle, share = self._split(first, last)
            left = _sent(rows, share)
            descend(first, middle, left)
            descend(middle, last, rows - left)

        descend(0, len(self.weights), rows)
        return counts

    def _split(self, first: int, last: int) -> tuple[int, int]:
        """Where a run of tasks is cut, and the left part's share in SCALE parts."""
        if (first, last) not in self._shares:
            middle = (first + last) // 2
            left, whole = (sum(map(Fraction, self.weights[first:end])) for end in (middle, last))
            # A subtree without weight is never entered; its share doesn't matter.
            self._shares[first, last] = middle, round(left / whole * SCALE) if whole else 0
        return self._shares[first, last]

    @functools.cached_property
    def _shares(self) -> dict[tuple[int, int], tuple[int, int]]:
        return {}


def _sent(rows: int, share: int) -> int:
    return (2 * rows * share + SCALE) // (2 * SCALE)


def proportional(
    counts: Sequence[int],
    cap: int | None = None,
    temperature: float | int = 1,
    scale: float | int = 1,
) -> list[float]:
    """Rates by the number of examples (Raffel et al. 2020, §3.5.2): min(scale·n, cap)^(1/T).

    Args:
      counts: examples of each task.
      cap: the artificial limit K; None for none.
      temperature: T; large ones make all tasks alike.
      scale: of the counts, before the cap.

    Raises:
      UserError: a cap, temperature or scale that isn't positive.
    """
    for name, value in {"cap": cap, "temperature": temperature, "scale": scale}.items():
        if value is not None and not value > 0:
            raise UserError(f"{name}={value} must be positive; T5 has cap 2^19 and temperature 1.")
    limit = float("inf") if cap is None else cap
    return [min(scale * count, limit) ** (1 / temperature) for count in counts]
