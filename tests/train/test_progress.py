import io
import math

import pytest
from rich.console import Console

from t5x_lite.train.progress import Progress

ROW = {
    "loss": 4.3125,
    "grad_norm": 0.91234,
    "learning_rate": 9.6e-4,
    "tokens_per_second": 8123.4,
    "mfu": 0.312,
    "data_wait": 0.0042,
    "seconds": 12.0,
}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def plain():
    return Console(file=io.StringIO(), width=60)


def terminal(width):
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None, _environ={}
    )


def live_line(width, rows, **options):
    with Progress(1000, 0, terminal(width), **options) as progress:
        for row in rows:
            progress.update(row)
        return progress._line().plain


def test_without_a_terminal_each_row_is_one_plain_line():
    clock, console = Clock(), plain()
    with Progress(1000, 0, console, peak_flops=95e9, clock=clock) as progress:
        for step in (10, 20):
            clock.now += 4.0
            progress.update({"step": step, **ROW})
        progress.log("saved [bold]step 20[/bold] " + "x" * 80)
        progress.update({"step": 30})
        progress.update({"step": 30, "eval/loss": 4.5})
    fields = "loss 4.3125  8,123 tok/s  grad 0.912  lr 9.60e-04  MFU 31.2% of 95 GFLOP/s  wait 0.4%"
    assert console.file.getvalue().splitlines() == [
        f"step   10/1000  {fields}",
        f"step   20/1000  {fields}  ETA 6:32",  # 980 steps at 4 s per 10
        "saved [bold]step 20[/bold] " + "x" * 80,
        "step   30/1000  eval 4.5000  ETA 3:14",  # 970 steps at 4 s per 20
    ]
    assert "\x1b" not in console.file.getvalue()


@pytest.mark.parametrize("missing", [*ROW, "step"])
def test_any_key_may_be_missing(missing):
    row = {k: v for k, v in {"step": 10, **ROW}.items() if k != missing}
    for console in (plain(), terminal(200)):
        with Progress(1000, 0, console) as progress:
            progress.update(row)
            progress.update({})
            progress.update({"loss": None})
        assert "4.3125" in console.file.getvalue() or missing == "loss"


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e30])
def test_any_number_shows(value):
    console = plain()
    with Progress(10, 0, console) as progress:
        progress.update({"step": 1, **dict.fromkeys(ROW, value)})
    assert f"loss {value:.4f}" in console.file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 140])
def test_the_live_line_fits_and_keeps_loss_and_eta(width):
    clock, rows = Clock(), []
    for step in (10, 20):
        rows.append({"step": step, **ROW})
    clock.now = 1.0

    def ticking():
        clock.now += 1.0
        return clock.now

    line = live_line(width, rows, clock=ticking, peak_flops=95e9)
    assert line.startswith("  20/1000")
    if width >= 40:
        assert len(line) < width
        assert "loss 4.3125" in line
        assert line.endswith("ETA 1:38")
    assert ("MFU 31.2% of 95 GFLOP/s" in line) == (width >= 100)


def test_the_live_line_tells_that_the_first_step_compiles():
    assert live_line(80, []).endswith("compiling the first step")


def test_a_live_line_is_redrawn_in_place_and_logs_stay_above():
    console = terminal(100)
    with Progress(1000, 500, console) as progress:
        progress.update({"step": 510, **ROW})
        progress.log("saved step 510")
        progress.update({"step": 520, **ROW})
    text = console.file.getvalue()
    assert "\r" in text
    assert text.index("saved step 510") < text.index("520/1000")
    assert text.count("saved step 510") == 1


def test_the_rate_leaves_the_compilation_out_and_follows_the_machine():
    clock = Clock()
    progress = Progress(2000, 0, plain(), clock=clock)
    clock.now = 60.0  # compiling
    progress.update({"step": 1})
    for step in range(2, 102):
        clock.now += 1.0
        progress.update({"step": step})
    assert progress._eta() == pytest.approx(2000 - 101)
    for step in range(102, 140):
        clock.now += 3.0
        progress.update({"step": step})
    assert progress._eta() == pytest.approx(3 * (2000 - 139))
    progress.update({"step": 2000})
    assert progress._eta() is None
