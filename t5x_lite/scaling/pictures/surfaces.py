"""A fitted law over sizes and tokens, and what it leaves of each run."""

from typing import Any

import numpy as np

from t5x_lite.scaling import drawing, labels
from t5x_lite.scaling.pictures import parts
from t5x_lite.scaling.points import Points


def surface(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Contours of the first law of N and D, with each run and its residual."""
    methods = result["methods"]
    name = next((k for k, m in methods.items() if "predicted" in m and parts.law_of(m)), None)
    if name is None:
        return None
    from matplotlib import ticker
    from matplotlib.gridspec import GridSpec

    method = methods[name]
    rows = method.get("rows", slice(None))
    columns = {key: values[rows] for key, values in points.columns.items()}
    parameters = {key: each["value"] for key, each in method["parameters"].items()}
    residual = 100 * (columns["loss"] / np.array(method["predicted"])[rows] - 1)
    figure = drawing.new_figure(5.0)
    grid = GridSpec(2, 2, figure=figure, width_ratios=(1.7, 1))
    axes, *sides = (figure.add_subplot(cell) for cell in (grid[:, 0], grid[0, 1], grid[1, 1]))

    spread = [np.geomspace(v.min() / 1.5, v.max() * 1.5, 120) for v in (columns["n"], columns["d"])]
    n, d = np.meshgrid(*spread)
    loss = parts.law_of(method).predict(parameters, {"n": n, "d": d})
    levels = ticker.MaxNLocator(12).tick_values(columns["loss"].min(), columns["loss"].max())
    lines = axes.contour(n, d, loss, levels, colors=drawing.INK, linewidths=0.7, alpha=0.65)
    axes.clabel(lines, fontsize=7.5, fmt=lambda v: labels.number(v, 3))
    limit = max(np.nanpercentile(np.abs(residual), 98), 1e-6)
    look = {
        "c": residual,
        "cmap": drawing.between("PuOr", 0.12, 0.88),
        "vmin": -limit,
        "vmax": limit,
    }
    look |= {"edgecolors": drawing.INK, "linewidths": 0.4, "s": 20, "zorder": 3}
    dots = axes.scatter(columns["n"], columns["d"], **look)
    if "frontier" in method:
        best = method["frontier"]
        line = {"color": drawing.COLOURS[0], "lw": 2, "label": "best N and D of a budget"}
        axes.plot(best["n"]["value"], best["d"]["value"], **line)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left")
    axes.set(xscale="log", yscale="log", xlabel=parts.COLUMNS["n"], ylabel=parts.COLUMNS["d"])
    axes.set(
        xlim=spread[0][[0, -1]],
        ylim=spread[1][[0, -1]],
        title=f"loss by {drawing.maths(method['law'])}",
    )
    for side, column in zip(sides, "nd", strict=True):
        side.axhline(0, color=drawing.INK, lw=0.8)
        side.scatter(columns[column], residual, **look)
        side.set(xscale="log", xlabel=parts.COLUMNS[column])
        drawing.log_ticks(side.xaxis)
    sides[0].set_title("residual: measured / fitted − 1 (%)")
    drawing.log_ticks(axes.xaxis)
    drawing.log_ticks(axes.yaxis)
    bar = figure.colorbar(dots, ax=axes, label="residual (%)", extend="both", aspect=35, pad=0.02)
    bar.outline.set_visible(False)
    return parts.Picture(
        "surface", f"Fitted surface of {labels.method(name)}, with residuals",
        "Contours of equal loss by the fitted law; each point is a run, coloured by how far its "
        "loss lies above (purple) or below (orange) the surface. Residuals that drift with N or D "
        "mean that the law has the wrong form or range there.",
        figure,
    )  # fmt: skip


def residuals(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Of the first law, where `surface` doesn't show them: what it says has no two dimensions."""
    methods = result["methods"]
    alone = [name for names in parts.powers_alone(result).values() for name in names]
    name = next((k for k, m in methods.items() if "predicted" in m and k not in alone), None)
    if name is None or parts.law_of(methods[name]):
        return None
    columns = points.columns
    across = {parts.COLUMNS["n"]: columns["n"], parts.COLUMNS["d"]: columns["d"]}
    if "density" in columns:
        across["share of weights that aren't zero"] = columns["density"]
    if "unique" in columns:
        across["D / unique tokens"] = columns["d"] / columns["unique"]
    residual = 100 * (columns["loss"] / np.array(methods[name]["predicted"]) - 1)
    figure, row = drawing.panels(1, len(across), height=3.2, sharey=True)
    colour = drawing.colours(columns["c"])
    for axes, (label, values) in zip(row, across.items(), strict=True):
        axes.axhline(0, color=drawing.INK, lw=0.8)
        axes.scatter(values, residual, c=colour(columns["c"]), s=14, linewidths=0, alpha=0.9)
        axes.set(xscale="log", xlabel=label)
        drawing.log_ticks(axes.xaxis, most=3)
    row[0].set_ylabel("measured / fitted − 1 (%)")
    drawing.colour_bar(figure, row, colour, parts.COLUMNS["c"])
    return parts.Picture(
        "residuals", f"Residuals of {labels.method(name)}",
        "How far each run's loss lies above or below what the law says. A drift along an axis "
        "means that the law has the wrong form or range there.",
        figure,
    )  # fmt: skip
