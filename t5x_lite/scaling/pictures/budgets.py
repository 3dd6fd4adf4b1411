"""What a compute budget buys: IsoFLOP curves, the lowest loss, the best size and tokens."""

from typing import Any

import numpy as np

from t5x_lite.scaling import drawing, isoflop, labels
from t5x_lite.scaling.pictures import parts
from t5x_lite.scaling.points import FLOPS, Points


def isoflop_curves(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Each budget's runs, the curve through them and its minimum."""
    methods = {k: m for k, m in result["methods"].items() if m.get("budgets")}
    if not methods:
        return None
    figure, row = drawing.panels(1, len(methods), height=4.2, sharey=True)
    columns = points.columns
    colour = drawing.colours(columns["c"])
    for axes, (name, method) in zip(row, methods.items(), strict=True):
        minima = method["budgets"]
        centres = np.log([minimum["c"] for minimum in minima])
        nearest = np.argmin(np.abs(np.log(columns["c"])[:, None] - centres), axis=1)
        for number, minimum in enumerate(minima):
            n, loss = (columns[column][nearest == number] for column in ("n", "loss"))
            shade = colour(minimum["c"])
            refused = minimum["n"] is None
            face = "none" if refused else shade
            axes.scatter(n, loss, s=13, facecolors=face, edgecolors=shade, linewidths=0.8)
            if not refused:
                axes.plot(*curve(name, minimum, n, loss), color=shade, lw=1.2)
                axes.plot(
                    minimum["n"], minimum["loss"], "*", ms=11, mfc=shade, mec=drawing.INK, mew=0.8
                )
        exponent = labels.number(method["n_exponent"]["value"], 3)
        title = f"{labels.method(name)}, {drawing.maths('N_opt ∝ C^a')} with a = {exponent}"
        axes.set(xscale="log", xlabel=parts.COLUMNS["n"], title=title)
        drawing.log_ticks(axes.xaxis)
        drawing.loss_axis(axes.yaxis, columns["loss"])
    row[0].set_ylabel(parts.LOSS)
    drawing.colour_bar(figure, row, colour, parts.COLUMNS["c"])
    return parts.Picture(
        "isoflop", "IsoFLOP curves",
        "Runs of one compute budget share a colour. Filled points belong to budgets with a curve "
        "through them; a star marks the curve's minimum, the best size of that budget. Open points "
        "belong to budgets that were refused: too few sizes, or no minimum between them.",
        figure,
    )  # fmt: skip


def curve(
    name: str, minimum: dict[str, Any], n: np.ndarray, loss: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and losses along a budget's curve, from its minimum and its runs."""
    x, best = np.log(n), np.log(minimum["n"])
    if name.endswith("akima"):
        sizes, values = isoflop.akima(x, loss)
        return np.exp(sizes), values
    # At the least-squares minimum the bend alone is free, so this is the very parabola.
    fine = np.linspace(x.min(), x.max(), 200)
    square = (x - best) ** 2
    bend = np.sum(square * (loss - minimum["loss"])) / np.sum(square**2)
    return np.exp(fine), minimum["loss"] + bend * (fine - best) ** 2


def compute(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Every run's loss against its compute, and the lowest that each law expects."""
    columns = points.columns
    if not {"n", "c"} <= columns.keys():
        return None
    figure, (axes,) = drawing.panels(1, 1, height=4.6)
    colour = drawing.colours(columns["n"])
    if points.curves is not None:
        for run in np.unique(points.curves["run"]):
            n, c, loss = (points.curves[k][points.curves["run"] == run] for k in ("n", "c", "loss"))
            axes.plot(c, loss, color=colour(n[-1]), lw=0.7, alpha=0.8)
    look = {"s": 14, "linewidths": 0, "alpha": 0.9}
    axes.scatter(columns["c"], columns["loss"], c=colour(columns["n"]), **look)
    for method in result["methods"].values():
        if "envelope" in method:
            c, loss = method["envelope"]["c"], method["envelope"]["loss"]
            axes.plot(c, loss, ".", color=drawing.INK, ms=3.5, label="lowest so far (approach 1)")
    curves = {name: f for name, f in parts.frontiers(result).items() if "loss" in f}
    for name, frontier in curves.items():
        parts.line(axes, result, name, frontier, "loss")
    along = np.concatenate([columns["loss"], *(f["loss"]["value"] for f in curves.values())])
    axes.set(xscale="log", xlabel=parts.COLUMNS["c"], ylabel=parts.LOSS)
    drawing.loss_axis(axes.yaxis, along)
    parts.mark_computes(axes, result, top=True)
    drawing.log_ticks(axes.xaxis)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawing.colour_bar(figure, [axes], colour, parts.COLUMNS["n"])
    says = "Every run, coloured by its size"
    says += ", with its training curve. " if points.curves is not None else ". "
    if curves:
        says += (
            "Lines are the lowest loss that each law expects of a compute budget, with 95% bands: "
            "runs above them were too large or too small for their compute. "
        )
    return parts.Picture(
        "compute", "Loss against compute",
        f"{says}The shaded part lies beyond every run.",
        figure,
    )  # fmt: skip


def frontier(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """The best N, D and D/N of a budget by every method."""
    curves = {name: each for name, each in parts.frontiers(result).items() if "n" in each}
    found = {name: _marks(method, result) for name, method in result["methods"].items()}
    marks = {name: each for name, each in found.items() if len(each[0])}
    if not curves and not marks:
        return None
    figure, row = drawing.panels(1, 3, height=4.0)
    for axes, quantity in zip(row, ("n", "d", "tokens_per_parameter"), strict=True):
        for name, frontier in curves.items():
            parts.line(axes, result, name, frontier, quantity)
        for name, (c, n, d) in marks.items():
            colour, _, mark = parts.style(result, name)
            y = {"n": n, "d": d, "tokens_per_parameter": d / n}[quantity]
            look = {"ms": 5, "mec": drawing.INK, "mew": 0.5} if len(c) < 30 else {"ms": 3, "mew": 0}
            axes.plot(c, y, mark, color=colour, alpha=0.8, zorder=2.5, **look)
        axes.set(xscale="log", yscale="log", xlabel=parts.COLUMNS["c"])
        axes.set_title(parts.COLUMNS[quantity])
        drawing.keep_to(axes, [line.get_ydata() for line in axes.lines])
        parts.mark_computes(axes, result)
        drawing.log_ticks(axes.xaxis)
        drawing.log_ticks(axes.yaxis)
    figure.legend(
        handles=[_handle(result, name, name in curves, name in marks)
                 for name in result["methods"] if name in curves or name in marks],
        loc="outside lower center", ncols=4,
    )  # fmt: skip
    return parts.Picture(
        "frontier", "Best size and tokens of a compute budget",
        "Lines are each method's optimum with its 95% band; marks are what a line goes through: "
        "minima of budgets, or the lowest losses so far. The shaded part lies beyond every run: "
        "there the methods part.",
        figure,
    )  # fmt: skip


def _marks(method, result):
    """C, N and D of what a method's line goes through."""
    if "envelope" in method:
        return tuple(np.array(method["envelope"][name]) for name in ("c", "n", "d"))
    found = [(b["c"], b["n"]) for b in method.get("budgets", []) if b["n"] is not None]
    c, n = np.reshape(found, (-1, 2)).T
    return c, n, c / (result.get("flops_per_token_and_parameter", FLOPS) * n)


def _handle(result, name, line, mark):
    """Of a legend: a method's line, mark or both."""
    from matplotlib.lines import Line2D

    colour, dash, shape = parts.style(result, name)
    dash, shape = dash if line else "none", shape if mark else "none"
    look = {"color": colour, "ls": dash, "marker": shape, "lw": 1.7, "ms": 5, "mec": drawing.INK}
    return Line2D([], [], mew=0.5, label=labels.method(name), **look)
