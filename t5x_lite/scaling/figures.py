"""A fit's pictures: the budgets' minima, the fitted surface, the frontier, predictions, agreement.

Reads of `fit.fit`'s result "largest_c", "flops_per_token_and_parameter", "methods", "validation"
and "downstream"; of a method "law", "parameters", "predicted", "rows", "n_exponent", "budgets",
"envelope", "frontier" and "optimum". A picture whose numbers are absent is left out.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_lite.scaling import downstream, drawing, isoflop, kaplan, labels, laws
from t5x_lite.scaling.points import FLOPS, Points

LOSS = "loss (nats per token)"
COLUMNS = {
    "c": "C (training FLOPs)",
    "n": "N (parameters)",
    "d": "D (training tokens)",
    "tokens_per_parameter": "D / N (tokens per parameter)",
    "loss": LOSS,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
      name: of its files.
      title: a line.
      caption: what it shows and how to read it.
      figure: of matplotlib.
    """

    name: str
    title: str
    caption: str
    figure: Any


def draw(result: dict[str, Any], points: Points) -> Iterator[Picture]:
    """Every picture that the result allows; needs matplotlib, in `rc_context(drawing.LOOK)`."""
    result = _with_nan(result)
    for picture in PICTURES.values():
        drawn = picture(result, points)
        if drawn is not None:
            drawn.figure.draw_without_rendering()
            drawn.figure.set_layout_engine("none")  # laid out once, whatever it is saved as
            yield drawn


def _with_nan(part: Any) -> Any:
    """NaN in place of the None that JSON has for it; a budget without a minimum keeps its None."""
    if isinstance(part, dict):
        return {
            key: np.nan if key == "value" and each is None else _with_nan(each)
            for key, each in part.items()
        }
    if isinstance(part, list):
        return [np.nan if each is None else _with_nan(each) for each in part]
    return part


def _law(method: dict[str, Any]) -> Any:
    """The law of N and D that a method names, if it is one of ours."""
    known = {law.name: law for law in (laws.CHINCHILLA, laws.TIED, kaplan.BOTH)}
    return known.get(method.get("law", ""))


# --- pictures ------------------------------------------------------------------------------------


def _isoflop(result, points):
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
                axes.plot(*_curve(name, minimum, n, loss), color=shade, lw=1.2)
                axes.plot(
                    minimum["n"], minimum["loss"], "*", ms=11, mfc=shade, mec=drawing.INK, mew=0.8
                )
        exponent = labels.number(method["n_exponent"]["value"], 3)
        title = f"{labels.method(name)}, {drawing.maths('N_opt ∝ C^a')} with a = {exponent}"
        axes.set(xscale="log", xlabel=COLUMNS["n"], title=title)
        drawing.log_ticks(axes.xaxis)
        drawing.loss_axis(axes.yaxis, columns["loss"])
    row[0].set_ylabel(LOSS)
    drawing.colour_bar(figure, row, colour, COLUMNS["c"])
    return Picture(
        "isoflop", "IsoFLOP curves",
        "Runs of one compute budget share a colour. Filled points belong to budgets with a curve "
        "through them; a star marks the curve's minimum, the best size of that budget. Open points "
        "belong to budgets that were refused: too few sizes, or no minimum between them.",
        figure,
    )  # fmt: skip


def _curve(name, minimum, n, loss):
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


def _compute(result, points):
    columns = points.columns
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
    curves = {name: f for name, f in _frontiers(result).items() if "loss" in f}
    for name, frontier in curves.items():
        _line(axes, result, name, frontier, "loss")
    along = np.concatenate([columns["loss"], *(f["loss"]["value"] for f in curves.values())])
    axes.set(xscale="log", xlabel=COLUMNS["c"], ylabel=LOSS)
    drawing.loss_axis(axes.yaxis, along)
    _mark_computes(axes, result, top=True)
    drawing.log_ticks(axes.xaxis)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawing.colour_bar(figure, [axes], colour, COLUMNS["n"])
    says = "Every run, coloured by its size"
    says += ", with its training curve. " if points.curves is not None else ". "
    if curves:
        says += (
            "Lines are the lowest loss that each law expects of a compute budget, with 95% bands: "
            "runs above them were too large or too small for their compute. "
        )
    return Picture(
        "compute", "Loss against compute",
        f"{says}The shaded part lies beyond every run.",
        figure,
    )  # fmt: skip


def _surface(result, points):
    name = next((k for k, m in result["methods"].items() if "predicted" in m and _law(m)), None)
    if name is None:
        return None
    from matplotlib import ticker
    from matplotlib.gridspec import GridSpec

    method = result["methods"][name]
    rows = method.get("rows", slice(None))
    columns = {key: values[rows] for key, values in points.columns.items()}
    parameters = {key: each["value"] for key, each in method["parameters"].items()}
    residual = 100 * (columns["loss"] / np.array(method["predicted"])[rows] - 1)
    figure = drawing.new_figure(5.0)
    grid = GridSpec(2, 2, figure=figure, width_ratios=(1.7, 1))
    axes, *sides = (figure.add_subplot(cell) for cell in (grid[:, 0], grid[0, 1], grid[1, 1]))

    spread = [np.geomspace(v.min() / 1.5, v.max() * 1.5, 120) for v in (columns["n"], columns["d"])]
    n, d = np.meshgrid(*spread)
    loss = _law(method).predict(parameters, {"n": n, "d": d})
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
    axes.set(xscale="log", yscale="log", xlabel=COLUMNS["n"], ylabel=COLUMNS["d"])
    axes.set(
        xlim=spread[0][[0, -1]],
        ylim=spread[1][[0, -1]],
        title=f"loss by {drawing.maths(method['law'])}",
    )
    for side, column in zip(sides, "nd", strict=True):
        side.axhline(0, color=drawing.INK, lw=0.8)
        side.scatter(columns[column], residual, **look)
        side.set(xscale="log", xlabel=COLUMNS[column])
        drawing.log_ticks(side.xaxis)
    sides[0].set_title("residual: measured / fitted − 1 (%)")
    drawing.log_ticks(axes.xaxis)
    drawing.log_ticks(axes.yaxis)
    bar = figure.colorbar(dots, ax=axes, label="residual (%)", extend="both", aspect=35, pad=0.02)
    bar.outline.set_visible(False)
    return Picture(
        "surface", f"Fitted surface of {labels.method(name)}, with residuals",
        "Contours of equal loss by the fitted law; each point is a run, coloured by how far its "
        "loss lies above (purple) or below (orange) the surface. Residuals that drift with N or D "
        "mean that the law has the wrong form or range there.",
        figure,
    )  # fmt: skip


def _residuals(result, points):
    """Of the first law, where `_surface` doesn't show them: what it says has no two dimensions."""
    methods = result["methods"]
    alone = [name for names in _powers_alone(result).values() for name in names]
    name = next((k for k, m in methods.items() if "predicted" in m and k not in alone), None)
    if name is None or _law(methods[name]):
        return None
    columns = points.columns
    across = {COLUMNS["n"]: columns["n"], COLUMNS["d"]: columns["d"]}
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
    drawing.colour_bar(figure, row, colour, COLUMNS["c"])
    return Picture(
        "residuals", f"Residuals of {labels.method(name)}",
        "How far each run's loss lies above or below what the law says. A drift along an axis "
        "means that the law has the wrong form or range there.",
        figure,
    )  # fmt: skip


def _frontier(result, points):
    curves = _frontiers(result)
    found = {name: _marks(method, result) for name, method in result["methods"].items()}
    marks = {name: each for name, each in found.items() if len(each[0])}
    if not curves and not marks:
        return None
    figure, row = drawing.panels(1, 3, height=4.0)
    for axes, quantity in zip(row, ("n", "d", "tokens_per_parameter"), strict=True):
        for name, frontier in curves.items():
            _line(axes, result, name, frontier, quantity)
        for name, (c, n, d) in marks.items():
            colour, _, mark = _style(result, name)
            y = {"n": n, "d": d, "tokens_per_parameter": d / n}[quantity]
            look = {"ms": 5, "mec": drawing.INK, "mew": 0.5} if len(c) < 30 else {"ms": 3, "mew": 0}
            axes.plot(c, y, mark, color=colour, alpha=0.8, zorder=2.5, **look)
        axes.set(xscale="log", yscale="log", xlabel=COLUMNS["c"], title=COLUMNS[quantity])
        drawing.keep_to(axes, [line.get_ydata() for line in axes.lines])
        _mark_computes(axes, result)
        drawing.log_ticks(axes.xaxis)
        drawing.log_ticks(axes.yaxis)
    figure.legend(
        handles=[_handle(result, name, name in curves, name in marks)
                 for name in result["methods"] if name in curves or name in marks],
        loc="outside lower center", ncols=4,
    )  # fmt: skip
    return Picture(
        "frontier", "Best size and tokens of a compute budget",
        "Lines are each method's optimum with its 95% band; marks are what a line goes through: "
        "minima of budgets, or the lowest losses so far. The shaded part lies beyond every run: "
        "there the methods part.",
        figure,
    )  # fmt: skip


def _predicted(result, points):
    alone = [name for names in _powers_alone(result).values() for name in names]
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
    drawing.colour_bar(figure, cells, colour, COLUMNS["c"])
    return Picture(
        "predicted", "Predicted against measured",
        "A run on the line is predicted exactly; only the runs that a method was fitted to are "
        "shown, so this tells how well the law describes them, not how it will do on others.",
        figure,
    )  # fmt: skip


def _validation(result, points):
    validation = result.get("validation") or {}
    found = validation.get("methods", {})
    if not found:
        return None
    loss = points.columns["loss"][validation["rows"]]
    figure, cells = _grid_of(found, sharex=True, sharey=True)
    every = np.concatenate([loss, *(method["predicted"] for method in found.values())])
    for axes, (name, method) in zip(cells, found.items(), strict=False):
        colour, _, mark = _style(result, name)
        predicted = np.array(method["predicted"])
        if "low" in method:
            axes.vlines(loss, method["low"], method["high"], color=colour, lw=1, alpha=0.5)
        axes.plot(loss, predicted, mark, color=colour, ms=4, mec=drawing.INK, mew=0.4)
        _identity(axes, loss, every, loss, predicted)
    times = labels.short(validation["times"])
    return Picture(
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
    figure.supxlabel(f"measured {LOSS}", fontsize=9)
    figure.supylabel(f"predicted {LOSS}", fontsize=9)
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


def _powers_alone(result):
    """Methods that are powers of one column, by column."""
    names = {c: [k for k in (f"kaplan_{c}", f"kaplan_{c}_floor") if k in result["methods"]]
             for c in "ndc"}  # fmt: skip
    return {column: each for column, each in names.items() if each}


def _kaplan(result, points):
    names = _powers_alone(result)
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
        axes.set(xscale="log", xlabel=COLUMNS[column])
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
        drawing.loss_axis(axes.yaxis, loss, always_log=True)
        drawing.log_ticks(axes.xaxis)
    row[0].set_ylabel(LOSS)
    return Picture(
        "kaplan", "Power laws of size, tokens and compute alone",
        "Blue runs are the best of their size, of their number of tokens, or so far as compute "
        "rises; the lines are fitted to them. They mean what Kaplan et al. 2020 say only where the "
        "other quantity doesn't hold these runs back.",
        figure,
    )  # fmt: skip


def _downstream(result, points):
    found = result.get("downstream")
    if not found or "accuracy" not in points.columns:
        return None
    columns = points.columns
    parameters = {name: each["value"] for name, each in found["parameters"].items()}
    figure, row = drawing.panels(1, 2 if "frontier" in found else 1, height=3.9, sharey=True)
    colour = drawing.colours(columns["c"])
    loss = np.sort(columns["loss"])
    fine = np.linspace(loss[0] * 0.97, loss[-1] * 1.01, 200)
    look = {"c": colour(columns["c"]), "s": 16, "linewidths": 0}
    row[0].plot(fine, downstream.accuracy(parameters, fine), color=drawing.COLOURS[0], lw=1.7)
    row[0].scatter(columns["loss"], columns["accuracy"], **look)
    row[0].set(xlabel=LOSS, ylabel="accuracy", title="loss to accuracy")
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
        row[1].set(xscale="log", xlabel=COLUMNS["c"], title=title)
        _mark_computes(row[1], result)
        drawing.log_ticks(row[1].xaxis)
    drawing.colour_bar(figure, row, colour, COLUMNS["c"])
    return Picture(
        "downstream", "Capability against scale",
        "Left, a sigmoid from the loss to the accuracy on the task, better to the right; right, "
        "the accuracy that the best use of a compute budget reaches, with a 95% band. Runs lie "
        "below the line where their size wasn't the best for their compute.",
        figure,
    )  # fmt: skip


def _agreement(result, points):
    wanted = {"n_exponent": "a"}
    targets = [m["optimum"]["c"] for m in result["methods"].values() if "optimum" in m]
    if targets:
        wanted |= {quantity: label for quantity, label in COLUMNS.items() if quantity != "c"}
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
            colour, _, mark = _style(result, name)
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
    return Picture(
        "agreement", "Do the methods agree?",
        "Each method's estimate with its 95% interval, where it has one. Intervals that don't "
        "overlap can't both be right: the difference between methods is then the larger doubt.",
        figure,
    )  # fmt: skip


PICTURES = {
    "isoflop": _isoflop,
    "compute": _compute,
    "surface": _surface,
    "residuals": _residuals,
    "frontier": _frontier,
    "agreement": _agreement,
    "validation": _validation,
    "predicted": _predicted,
    "kaplan": _kaplan,
    "downstream": _downstream,
}

# --- parts ---------------------------------------------------------------------------------------


def _of(method, quantity):
    return method.get(quantity) or method.get("optimum", {}).get(quantity)


def _marks(method, result):
    """C, N and D of what a method's line goes through."""
    if "envelope" in method:
        return tuple(np.array(method["envelope"][name]) for name in ("c", "n", "d"))
    found = [(b["c"], b["n"]) for b in method.get("budgets", []) if b["n"] is not None]
    c, n = np.reshape(found, (-1, 2)).T
    return c, n, c / (result.get("flops_per_token_and_parameter", FLOPS) * n)


def _frontiers(result):
    return {k: m["frontier"] for k, m in result["methods"].items() if "frontier" in m}


def _line(axes, result, name, frontier, quantity):
    if quantity not in frontier:
        return
    colour, dash, _ = _style(result, name)
    c, along = frontier["c"], frontier[quantity]
    axes.plot(c, along["value"], color=colour, ls=dash, lw=1.7, label=labels.method(name))
    if "low" in along:
        axes.fill_between(c, along["low"], along["high"], color=colour, alpha=0.16, lw=0)


def _style(result, name):
    at = list(result["methods"]).index(name)
    return tuple(each[at % len(each)] for each in (drawing.COLOURS, drawing.DASHES, drawing.MARKS))


def _handle(result, name, line, mark):
    """Of a legend: a method's line, mark or both."""
    from matplotlib.lines import Line2D

    colour, dash, shape = _style(result, name)
    dash, shape = dash if line else "none", shape if mark else "none"
    look = {"color": colour, "ls": dash, "marker": shape, "lw": 1.7, "ms": 5, "mec": drawing.INK}
    return Line2D([], [], mew=0.5, label=labels.method(name), **look)


def _mark_computes(axes, result, top=False):
    """Where the runs end, and the target."""
    low, high = axes.get_xlim()
    largest = result["largest_c"]
    y, side = (0.98, "top") if top else (0.02, "bottom")
    look = {"transform": axes.get_xaxis_transform(), "rotation": 90, "fontsize": 7.5, "va": side}
    axes.axvspan(largest, max(high, largest), color=drawing.INK, alpha=0.06, lw=0)
    axes.text(largest, y, "largest run", ha="right", **look)
    target = next((m["optimum"]["c"] for m in result["methods"].values() if "optimum" in m), None)
    if target is not None and target != largest:
        axes.axvline(target, color=drawing.INK, lw=0.8, ls=(0, (2, 2)))
        axes.text(target, y, "target", ha="right", **look)
    axes.set_xlim(low, high)
