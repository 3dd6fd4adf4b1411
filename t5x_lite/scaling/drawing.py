"""Axes, colours and numbers of pictures for a page and for paper, in matplotlib."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite.scaling import labels

INK = "#1b1d1f"  # of text and axes; a page puts its own in its place
LOOK = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "svg.fonttype": "path",  # looks the same whatever fonts a reader has
    "svg.hashsalt": "t5x_lite",  # the same picture is the same file
    **dict.fromkeys(
        [
            *("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"),
            *("xtick.color", "ytick.color", "grid.color"),
        ],
        INK,
    ),
}
# Okabe and Ito 2008: colours that colour-blind readers tell apart; dashes and marks say it again.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7A7A7A"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (1, 2)), (0, (3, 4))]
MARKS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
WIDTH = 9.2  # inches


def keep_to(axes: Any, lines: Sequence[np.ndarray]) -> None:
    """Wide bands are cut, or there is nothing to see of the lines."""
    every = np.concatenate(lines)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, np.nanmin(every) / 4), min(high, np.nanmax(every) * 4))


def new_figure(height: float) -> Any:
    """An empty figure as wide as a page."""
    from matplotlib.figure import Figure  # no pyplot: it keeps figures, and looks for a display

    return Figure(figsize=(WIDTH, height), layout="constrained")


def panels(down: int, across: int, height: float, **shared: Any) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row; `shared` is of matplotlib's `subplots`."""
    figure = new_figure(height)
    return figure, list(figure.subplots(down, across, squeeze=False, **shared).flat)


def colours(values: np.ndarray) -> Any:
    """A function from numbers to colours, by their logarithm; its `scale` is for a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    low, high = float(np.min(values)), float(np.max(values))
    if low == high:
        low, high = low / 2, high * 2
    scale = ScalarMappable(LogNorm(low, high), between("viridis", 0.22, 0.92))

    def colour(of):
        return scale.to_rgba(of)

    colour.scale = scale
    return colour


def between(name: str, low: float, high: float) -> Any:
    """A colour map without its ends, which vanish on dark or on white paper."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[name](np.linspace(low, high, 256)))


def colour_bar(figure: Any, axes: Sequence[Any], colour: Any, label: str) -> None:
    """The scale of `colours`, beside axes."""
    bar = figure.colorbar(colour.scale, ax=axes, label=label, aspect=30, pad=0.02)
    log_ticks(bar.ax.yaxis)
    bar.outline.set_visible(False)


def log_ticks(axis: Any, most: int = 6) -> None:
    """Two or three to `most` numbers on a logarithmic axis: powers of ten, or steps between."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    every = max(1, round(np.log10(high / low) / 6))
    for steps in ([1.0], [1.0, 3.0], [1.0, 2.0, 5.0], [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]):
        powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1, every)
        ticks = [step * power for power in powers for step in steps if low <= step * power <= high]
        if len(ticks) >= min(3, most - 1):
            break
    else:
        ticks = ticker.MaxNLocator(3).tick_values(low, high)
    axis.set_major_locator(ticker.FixedLocator(ticks[:: -(-len(ticks) // most)]))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: labels.short(value)))
    axis.set_minor_formatter(ticker.NullFormatter())


def maths(text: str) -> str:
    """N_opt ∝ C^a and the like with letters raised and lowered."""
    return re.sub(r"([_^])(\w+|\([^()]*\))", r"$\1{\2}$", text)


def loss_axis(axis: Any, losses: np.ndarray, always_log: bool = False) -> None:
    """Logarithmic where losses span more than a factor of two; plain numbers either way."""
    from matplotlib import ticker

    low, high = float(np.nanmin(losses)), float(np.nanmax(losses))
    room = max((high / low) ** 0.05, 1.001)
    low, high = low / room, high * room
    name = f"{axis.axis_name}scale"
    axis.axes.set(**{name: "log" if always_log or high > 2 * low else "linear"})
    ticks = ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    places = max(0, -int(np.floor(np.log10(ticks[1] - ticks[0]) + 1e-9)))
    places += round((ticks[1] - ticks[0]) * 10**places, 6) % 1 > 0  # steps of 0.25
    axis.set_major_locator(ticker.FixedLocator([t for t in ticks if low <= t <= high]))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.{places}f}"))
    axis.set_minor_locator(ticker.NullLocator())
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
