"""Accuracy on a task against the loss and against compute."""

from typing import Any

import numpy as np

from t5x_lite.scaling import downstream, drawing, labels
from t5x_lite.scaling.pictures import parts
from t5x_lite.scaling.points import Points


def capability(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """The sigmoid from loss to accuracy, and accuracy against compute."""
    found = result.get("downstream")
    if not found or "accuracy" not in points.columns:
        return None
    columns = points.columns
    parameters = {name: each["value"] for name, each in found["parameters"].items()}
    figure, row = drawing.panels(1, 2 if "frontier" in found else 1, height=3.9, sharey=True)
    size = next(name for name in "cnd" if name in columns)
    colour = drawing.colours(columns[size])
    loss = np.sort(columns["loss"])
    fine = np.linspace(loss[0] * 0.97, loss[-1] * 1.01, 200)
    look = {"c": colour(columns[size]), "s": 16, "linewidths": 0}
    row[0].plot(fine, downstream.accuracy(parameters, fine), color=drawing.COLOURS[0], lw=1.7)
    row[0].scatter(columns["loss"], columns["accuracy"], **look)
    row[0].set(xlabel=parts.LOSS, ylabel="accuracy", title="loss to accuracy")
    row[0].invert_xaxis()
    if "frontier" in found:
        c, along = found["frontier"]["c"], found["frontier"]["accuracy"]
        row[1].scatter(columns["c"], columns["accuracy"], **look)
        row[1].plot(c, along["value"], color=drawing.COLOURS[0], lw=1.7)
        if "low" in along:
            row[1].fill_between(
                c, along["low"], along["high"], color=drawing.COLOURS[0], alpha=0.16, lw=0
            )
        title = f"compute to accuracy, by {labels.method(found['loss_by'])}"
        row[1].set(xscale="log", xlabel=parts.COLUMNS["c"], title=title)
        parts.mark_computes(row[1], result)
        drawing.log_ticks(row[1].xaxis)
    drawing.colour_bar(figure, row, colour, parts.COLUMNS[size])
    return parts.Picture(
        "downstream", "Capability against scale",
        "Left, a sigmoid from the loss to the accuracy on the task, better to the right; right, "
        "the accuracy that the best use of a compute budget reaches, with a 95% band. Runs lie "
        "below the line where their size wasn't the best for their compute.",
        figure,
    )  # fmt: skip
