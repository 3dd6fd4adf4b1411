"""Kaplan's powers of size, tokens and compute alone."""

from typing import Any

import numpy as np

from t5x_lite.scaling import drawing, labels
from t5x_lite.scaling.pictures import parts
from t5x_lite.scaling.points import Points


def kaplan_powers(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Each power with the runs that it was fitted to, a panel for each of N, D and C."""
    names = parts.powers_alone(result)
    if not names:
        return None
    figure, row = drawing.panels(1, len(names), height=3.9)
    columns = points.columns
    for axes, (column, methods) in zip(row, names.items(), strict=True):
        x, loss = columns[column], columns["loss"]
        axes.scatter(x, loss, s=8, color=drawing.INK, alpha=0.25, linewidths=0)
        rows = result["methods"][methods[0]].get("rows", [])
        axes.scatter(x[rows], loss[rows], s=16, color=drawing.COLOURS[0], linewidths=0)
        fine = np.geomspace(x.min(), x.max() * 3, 100)
        for name, colour, dash in zip(
            methods, (drawing.COLOURS[3], drawing.COLOURS[2]), ("-", "--"), strict=False
        ):
            method = result["methods"][name]
            p = {key: each["value"] for key, each in method["parameters"].items()}
            along = p.get("E", 0.0) + (p[f"{column.upper()}_c"] / fine) ** p["alpha"]
            label = f"{drawing.maths(method['law'])}, α = {labels.number(p['alpha'], 3)}"
            axes.plot(fine, along, color=colour, ls=dash, lw=1.7, label=label)
        axes.set(xscale="log", xlabel=parts.COLUMNS[column])
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
        drawing.loss_axis(axes.yaxis, loss, always_log=True)
        drawing.log_ticks(axes.xaxis)
    row[0].set_ylabel(parts.LOSS)
    return parts.Picture(
        "kaplan", "Power laws of size, tokens and compute alone",
        "Blue runs are the best of their size, of their number of tokens, or so far as compute "
        "rises; the lines are fitted to them. They mean what Kaplan et al. 2020 say only where the "
        "other quantity doesn't hold these runs back.",
        figure,
    )  # fmt: skip
