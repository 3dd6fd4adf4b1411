"""How a run shows itself: one live line on a terminal, plain lines anywhere else.

240/1000  ━━━━──────────  loss 4.3125  8,123 tok/s  grad 0.91  lr 9.60e-04  MFU 31.2%  ETA 3:12
"""

import collections
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

# The rate behind the ETA is taken over this many updates, so that it follows the machine.
RATE_UPDATES = 20
BAR_WIDTH = 14


class Progress:
    """Shows the rows of metrics that a run logs. Use as a context manager.

    Args:
      total: the step at which the run ends.
      start: the step that it starts or resumes from.
      console: rich console; stdout by default.
      peak_flops: the FLOP/s of one device that `mfu` is a share of, shown beside it.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        start: int,
        console: Console | None = None,
        *,
        peak_flops: float | int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._step, self._peak_flops = total, start, peak_flops
        self._console = console or Console()
        self._clock = clock
        self._marks: collections.deque[tuple[int, float]] = collections.deque(maxlen=RATE_UPDATES)
        self._row: dict[str, Any] = {}
        self._live: Live | None = None

    def __enter__(self):
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._line, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, row: Mapping[str, Any]) -> None:
        """Takes what is known at one step; every key may be missing.

        Args:
          row: `step`, `loss`, `grad_norm`, `learning_rate`, `tokens_per_second`; `mfu`,
            `data_wait` and `expert_dropped` as shares of one; `expert_load_max`, a multiple of the
            mean; `eval/loss`. Other keys are not shown.
        """
        step = int(row.get("step", self._step))
        # The first mark comes after the compilation, which would spoil the rate.
        if not self._marks or step > self._marks[-1][0]:
            self._marks.append((step, self._clock()))
        self._step = step
        self._row.update(row)
        if self._live is not None:
            self._live.refresh()
        elif set(row) - {"step"}:
            shown = "  ".join(
                [f"step {step:>{len(str(self._total))}}/{self._total}", *self._fields(row)]
            )
            self._console.print(shown, markup=False, highlight=False, soft_wrap=True)

    def log(self, text: str) -> None:
        """Prints a line that stays, above the live one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> Text:
        """The live line, with the fields that fit the terminal."""
        width = len(str(self._total))
        head = f"{self._step:>{width}}/{self._total}"
        fields = self._fields(self._row) if self._marks else ["compiling the first step"]
        bar = _bar(self._step / self._total if self._total else 1.0)
        # A narrow terminal loses the bar first and then fields from the middle, never the loss or
        # the ETA.
        parts = [head, bar, *fields]
        while len("  ".join(parts)) >= self._console.width and len(parts) > 3:
            parts.pop(1 if parts[1] == bar else -2)
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")

    def _fields(self, row: Mapping[str, Any]) -> list[str]:
        mfu = "MFU {:.1%}"
        if self._peak_flops:
            mfu += f" of {_flops(self._peak_flops)}"
        formats = {
            "loss": "loss {:.4f}",
            "eval/loss": "eval {:.4f}",
            "tokens_per_second": "{:,.0f} tok/s",
            "grad_norm": "grad {:.3g}",
            "learning_rate": "lr {:.2e}",
            "mfu": mfu,
            "expert_load_max": "experts ≤ {:.2f}×",
            "expert_dropped": "dropped {:.1%}",
            "data_wait": "wait {:.1%}",
        }
        shown = [form.format(row[key]) for key, form in formats.items() if row.get(key) is not None]
        eta = self._eta()
        return [*shown, f"ETA {_duration(eta)}"] if eta is not None else shown

    def _eta(self) -> float | None:
        """Seconds to the end at the rate of the last updates; None while there is no rate."""
        if len(self._marks) < 2 or self._step >= self._total:
            return None
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return (self._total - self._step) * (ended - began) / (last - first)


def _bar(share: float) -> str:
    full = round(BAR_WIDTH * min(max(share, 0.0), 1.0))
    return "━" * full + "─" * (BAR_WIDTH - full)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _flops(rate: float) -> str:
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if rate >= scale:
            return f"{rate / scale:.3g} {prefix}FLOP/s"
    return f"{rate:.3g} FLOP/s"
