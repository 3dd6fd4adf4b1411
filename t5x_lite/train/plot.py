"""Pictures: the loss curves of a run, from its metrics.jsonl, and what a model's width changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.metrics import MetricsLog

# Colours that a colour-blind reader tells apart.
CURVES = {"loss": ("training", "#9ecae1"), "eval/loss": ("held out", "#d95f02")}


def plot_loss(model_dir: str, out: str | None = None) -> Path:
    """Draws the training and held-out loss over steps; returns the file (default: DIR/loss.png).

    Raises:
        UserError: no losses yet, no matplotlib, or a file that can't be written as such a picture.
    """
    log = MetricsLog(model_dir)
    rows = log.read()
    if not any(name in row for row in rows for name in CURVES):
        raise UserError(f"{log.path} has no losses; train into {model_dir} first.")
    figure = _figure()(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, color) in CURVES.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, ms=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=Path(model_dir).resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, Path(out) if out else Path(model_dir) / "loss.png")


def _figure() -> Any:
    """The class of figures. No pyplot: it keeps them in global state and looks for a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 't5x_lite[demo]'.") from error
    return Figure


def _save(figure, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib doesn't know
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    return path


def plot_coordinates(rows: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> Path:
    """Draws the rows of coordinate checks, a row of pictures for each parametrisation.

    Each picture is a place in the model: the mean change of its coordinates over the width, a line
    for each number of updates.
    """
    places = list(dict.fromkeys(row["name"] for found in rows.values() for row in found))
    size = (2.6 * len(places), 2.6 * len(rows))
    figure = _figure()(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(places), sharex=True, sharey="col", squeeze=False)
    for line, (title, found) in zip(grid, rows.items(), strict=True):
        for axes, place in zip(line, places, strict=True):
            own = [row for row in found if row["name"] == place and row["step"]]
            for step in sorted({row["step"] for row in own}):
                points = [(r["width"], r["change"]) for r in own if r["step"] == step]
                widths = sorted({width for width, _ in points})
                means = [
                    sum(y for x, y in points if x == width) / sum(x == width for x, _ in points)
                    for width in widths
                ]
                axes.plot(widths, means, marker="o", ms=3, label=f"{step}", color=_shade(step, 5))
            axes.set(xscale="log", yscale="log", title=f"{title}: {place}")
            axes.set_xticks(widths, [str(width) for width in widths], minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        line[0].set_ylabel("mean |change|")
    grid[-1][0].legend(title="updates")
    figure.supxlabel("width")
    return _save(figure, out)


def plot_transfer(
    rates: Sequence[float], curves: Mapping[str, Mapping[int, Sequence[float]]], out: Path
) -> Path:
    """Draws the loss over the learning rate, a picture for each parametrisation, a line a width."""
    figure = _figure()(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, (title, widths) in zip(
        figure.subplots(1, len(curves), sharey=True, squeeze=False)[0], curves.items(), strict=True
    ):
        for number, (width, losses) in enumerate(widths.items()):
            color = _shade(number, len(widths))
            axes.plot(rates, losses, marker="o", ms=3, label=f"width {width}", color=color)
            lowest = min(range(len(losses)), key=lambda n, y=losses: (y[n] != y[n], y[n]))
            axes.plot(rates[lowest], losses[lowest], marker="*", ms=12, color=color)
        axes.set(xscale="log", xlabel="learning rate", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss (nats per byte)")
    figure.axes[0].legend()
    return _save(figure, out)


def _shade(number: int, count: int) -> tuple[float, float, float]:
    """From light to dark blue."""
    share = number / max(count - 1, 1)
    return (0.75 - 0.7 * share, 0.85 - 0.6 * share, 0.95 - 0.4 * share)
