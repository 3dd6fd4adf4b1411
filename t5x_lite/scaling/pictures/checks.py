"""How far to believe a fit: predicted against measured, and methods side by side."""

from typing import Any

import numpy as np

from t5x_lite.scaling import drawing, labels
from t5x_lite.scaling.pictures import parts
from t5x_lite.scaling.points import Points


def predicted(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Each law's losses of the runs that it was fitted to."""
    alone = [name for names in parts.powers_alone(result).values() for name in names]
    found = {k: m for k, m in result["methods"].items() if "predicted" in m and k not in alone}
    if not found:
        return None
    colour = drawing.colours(points.columns["c"])
    figure, cells = _grid_of(found, sharex=True, sharey=True)
    for axes, method in zip(cells, found.values(), strict=False):
        rows = method.get("rows", slice(None))
        loss, predicted = points.columns["loss"][rows], np.array(method["predicted"])[rows]
        shades = colour(points.columns["c"][rows])
        axes.scatter(loss, predicted, c=shades, s=12, linewidths=0, alpha=0.9)
        _identity(axes, points.columns["loss"], points.columns["loss"], loss, predicted)
    drawing.colour_bar(figure, cells, colour, parts.COLUMNS["c"])
    return parts.Picture(
        "predicted", "Predicted against measured",
        "A run on the line is predicted exactly; only the runs that a method was fitted to are "
        "shown, so this tells how well the law describes them, not how it will do on others.",
        figure,
    )  # fmt: skip


def validation(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Each law's losses of the budgets that it didn't see."""
    validation = result.get("validation") or {}
    found = validation.get("methods", {})
    if not found:
        return None
    loss = points.columns["loss"][validation["rows"]]
    figure, cells = _grid_of(found, sharex=True, sharey=True)
    every = np.concatenate([loss, *(method["predicted"] for method in found.values())])
    for axes, (name, method) in zip(cells, found.items(), strict=False):
        colour, _, mark = parts.style(result, name)
        predicted = np.array(method["predicted"])
        if "low" in method:
            axes.vlines(loss, method["low"], method["high"], color=colour, lw=1, alpha=0.5)
        axes.plot(loss, predicted, mark, color=colour, ms=4, mec=drawing.INK, mew=0.4)
        _identity(axes, loss, every, loss, predicted)
    times = labels.short(validation["times"])
    return parts.Picture(
        "validation", "Held-out budgets",
        f"The laws fitted again without the {len(loss)} runs of the largest budgets, up to {times} "
        "times the compute of the others, and their predictions of those runs with 95% intervals. "
        "This is the figure to judge an extrapolation by.",
        figure,
    )  # fmt: skip


def _grid_of(found, **shared):
    """A figure with a titled cell for each method, and its axes' common labels."""
    across = len(found) if len(found) < 3 else 2 if len(found) == 4 else 3
    down = -(-len(found) // across)
    figure, cells = drawing.panels(down, across, height=0.7 + 2.7 * down, **shared)
    for at, (axes, name) in enumerate(zip(cells, found, strict=False)):
        axes.set_title(labels.method(name))
        axes.tick_params(labelbottom=at + across >= len(found))
    for axes in cells[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel(f"measured {parts.LOSS}", fontsize=9)
    figure.supylabel(f"predicted {parts.LOSS}", fontsize=9)
    return figure, cells


def _identity(axes, across, up, loss, predicted):
    """The line of exact predictions, axes that hold these losses, and the typical error."""
    ends = [np.min(across), np.max(across)]
    axes.plot(ends, ends, color=drawing.INK, lw=0.8)
    typical = 100 * np.sqrt(np.nanmean((predicted / loss - 1) ** 2))
    text = f"RMS error {typical:.2g}%"
    axes.text(0.97, 0.05, text, transform=axes.transAxes, ha="right")
    drawing.loss_axis(axes.xaxis, across)
    drawing.loss_axis(axes.yaxis, up)


def agreement(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Every method's estimate of each quantity with its interval."""
    wanted = {"n_exponent": "a"}
    targets = [m["optimum"]["c"] for m in result["methods"].values() if "optimum" in m]
    if targets:
        wanted |= {quantity: label for quantity, label in parts.COLUMNS.items() if quantity != "c"}
    rows = [k for k, m in result["methods"].items() if any(_of(m, q) for q in wanted)]
    wanted = {q: w for q, w in wanted.items() if any(_of(result["methods"][k], q) for k in rows)}
    if not rows or not wanted:
        return None
    across = min(3, len(wanted))
    down = -(-len(wanted) // across)
    figure, cells = drawing.panels(
        down, across, height=down * (1.2 + 0.24 * len(rows)), sharey=True
    )
    for axes, (quantity, label) in zip(cells, wanted.items(), strict=False):
        for y, name in enumerate(rows):
            found = _of(result["methods"][name], quantity)
            if not found:
                axes.text(0.5, y, "–", transform=axes.get_yaxis_transform(), va="center")
                continue
            colour, _, mark = parts.style(result, name)
            low, high = found.get("interval", (found["value"], found["value"]))
            axes.plot([low, high], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot(found["value"], y, mark, color=colour, ms=6, mec=drawing.INK, mew=0.5)
        axes.set_xlabel(label)
        at = "N_opt ∝ C^a" if quantity == "n_exponent" else f"at {labels.short(targets[0])} FLOPs"
        axes.set_title(drawing.maths(at))
        if quantity in ("n", "d", "tokens_per_parameter"):
            axes.set_xscale("log")
            drawing.log_ticks(axes.xaxis, most=3)
        axes.set_yticks(range(len(rows)), [labels.method(name) for name in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
    for axes in cells[len(wanted) :]:
        axes.set_visible(False)
    return parts.Picture(
        "agreement", "Do the methods agree?",
        "Each method's estimate with its 95% interval, where it has one. Intervals that don't "
        "overlap can't both be right: the difference between methods is then the larger doubt.",
        figure,
    )  # fmt: skip


def _of(method, quantity):
    return method.get(quantity) or method.get("optimum", {}).get(quantity)
