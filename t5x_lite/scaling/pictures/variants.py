"""Laws of one variable more: the loss against sparsity, and against repetitions of the tokens.

A panel holds runs that are alike in what it fixes, and lines of the law at their sizes, so that a
point off its line is what the law misses.
"""

from typing import Any

import numpy as np

from t5x_lite.scaling import constrained, drawing, labels, laws
from t5x_lite.scaling.pictures import parts
from t5x_lite.scaling.points import Points

_PANELS, _LINES = 3, 8  # at most


def sparse(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Loss against the share of weights that aren't zero, at fixed sizes and tokens."""
    method, columns = result["methods"].get("sparse"), points.columns
    if method is None or method.get("law") != laws.SPARSE.name:
        return None
    n, density = columns["n"], columns["density"]
    panels = _panels(columns["d"], density)
    if not panels:
        return None
    # Pruned models share how many weights are left, or how many there were: take what recurs.
    total = n / density
    counts_zeros = parts.groups(total).max() < parts.groups(n).max()
    size = total if counts_zeros else n
    fine = np.geomspace(density.min() / 1.2, 1, 100)

    def along(each, d):
        left = each * fine if counts_zeros else np.full_like(fine, each)
        columns = {"n": left, "density": fine, "d": np.full_like(fine, d)}
        return fine, laws.SPARSE.predict(parts.values_of(method), columns)

    figure, row, colour = _drawn(panels, density, columns["loss"], size, along)
    for axes, (d, _) in zip(row, panels, strict=True):
        axes.set(xlabel="1 − S, weights not zero")
        axes.set_title(f"D = {labels.short(d)}")
    row[0].invert_xaxis()  # sparser to the right, in all: they share it
    label = f"N (parameters, {'zeros too' if counts_zeros else 'zeros left out'})"
    drawing.colour_bar(figure, row, colour, label)
    kept = "weights in all" if counts_zeros else "weights that aren't zero"
    return parts.Picture(
        "sparse", "Loss against sparsity",
        f"A panel for each number of tokens, sparser models to the right. Points are runs; a line "
        f"is the law's loss of models with equally many {kept}, in their colour. Where it is flat, "
        f"sparsity costs nothing by itself.",
        figure,
    )  # fmt: skip


def repeated(result: dict[str, Any], points: Points) -> parts.Picture | None:
    """Loss against how often unique tokens are read, at fixed sizes and unique tokens."""
    known = {law.name: law for law in (constrained.CONSTRAINED, constrained.TIED)}
    methods = result["methods"].values()
    method = next((m for m in methods if m.get("law") in known and "parameters" in m), None)
    if method is None or "unique" not in points.columns:
        return None
    columns = points.columns
    reads = columns["d"] / columns["unique"]
    panels = _panels(columns["unique"], reads)
    if not panels:
        return None
    law, fine = known[method["law"]], np.geomspace(1, 2 * reads.max(), 100)

    def along(n, unique, fresh=False):
        d = unique * fine
        columns = {
            "n": np.full_like(d, n),
            "d": d,
            "unique": d if fresh else np.full_like(d, unique),
        }
        return fine, law.predict(parts.values_of(method), columns)

    figure, row, colour = _drawn(panels, reads, columns["loss"], columns["n"], along)
    for axes, (unique, rows) in zip(row, panels, strict=True):
        for n in _levels(columns["n"][rows]):
            axes.plot(*along(n, unique, fresh=True), color=colour(n), lw=1, ls=(0, (2, 2)))
        axes.set(xlabel="D / U, reads of each unique token")
        axes.set_title(f"U = {labels.short(unique)} unique tokens")
    drawing.colour_bar(figure, row, colour, parts.COLUMNS["n"])
    return parts.Picture(
        "repeated", "Loss against repetitions",
        "A panel for each number of unique tokens. Points are runs; a full line is the law's loss "
        "of models of one size as they read the same tokens again and again; the dashed line is "
        "what as many tokens would give if none were read twice. Where they part, repeating has "
        "stopped to help as new tokens would.",
        figure,
    )  # fmt: skip


def _panels(fixed, across):
    """Values that recur among runs that differ in `across`, with their rows: those with most."""
    number = parts.groups(fixed)
    found = []
    for each in range(number.max() + 1):
        rows = np.flatnonzero(number == each)
        if parts.groups(across[rows]).max() > 0:
            found.append((float(np.median(fixed[rows])), rows))
    most = sorted(found, key=lambda panel: -len(panel[1]))[:_PANELS]
    return sorted(most, key=lambda panel: panel[0])


def _levels(size):
    """Sizes that runs have, a few of them where there are many."""
    number = parts.groups(size)
    every = np.array([np.median(size[number == each]) for each in range(number.max() + 1)])
    at = np.unique(np.linspace(0, len(every) - 1, min(_LINES, len(every))).round().astype(int))
    return every[at]


def _drawn(panels, across, loss, size, along):
    """Runs and lines of each panel on one scale of losses."""
    figure, row = drawing.panels(1, len(panels), height=4.0, sharex=True, sharey=True)
    colour = drawing.colours(size)
    shown = [loss[rows] for _, rows in panels]
    for axes, (fixed, rows) in zip(row, panels, strict=True):
        for each in _levels(size[rows]):
            x, y = along(each, fixed)
            axes.plot(x, y, color=colour(each), lw=1.5)
            shown.append(y)
        look = {"s": 20, "linewidths": 0.5, "edgecolors": drawing.INK, "zorder": 3}
        axes.scatter(across[rows], loss[rows], c=colour(size[rows]), **look)
        axes.set(xscale="log")
        drawing.log_ticks(axes.xaxis, most=4)
        drawing.loss_axis(axes.yaxis, np.concatenate(shown))
    row[0].set_ylabel(parts.LOSS)
    return figure, row, colour
