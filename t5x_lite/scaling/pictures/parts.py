"""What pictures of a fit share: names of axes, and how each method is drawn in all of them."""

import dataclasses
from typing import Any

import numpy as np

from t5x_lite.scaling import drawing, kaplan, labels, laws

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


def law_of(method: dict[str, Any]) -> Any:
    """The law of N and D that a method names, if it is one of ours."""
    known = {law.name: law for law in (laws.CHINCHILLA, laws.TIED, kaplan.BOTH)}
    return known.get(method.get("law", ""))


def powers_alone(result: dict[str, Any]) -> dict[str, list[str]]:
    """Methods that are powers of one column, by column."""
    names = {c: [k for k in (f"kaplan_{c}", f"kaplan_{c}_floor") if k in result["methods"]]
             for c in "ndc"}  # fmt: skip
    return {column: each for column, each in names.items() if each}


def frontiers(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the methods that have one."""
    return {k: m["frontier"] for k, m in result["methods"].items() if "frontier" in m}


def style(result: dict[str, Any], name: str) -> tuple[str, Any, str]:
    """A method's colour, dashes and mark, the same in all pictures."""
    at = list(result["methods"]).index(name)
    return tuple(each[at % len(each)] for each in (drawing.COLOURS, drawing.DASHES, drawing.MARKS))


def line(
    axes: Any, result: dict[str, Any], name: str, frontier: dict[str, Any], quantity: str
) -> None:
    """A quantity along a method's frontier, with its band."""
    if quantity not in frontier:
        return
    colour, dash, _ = style(result, name)
    c, along = frontier["c"], frontier[quantity]
    axes.plot(c, along["value"], color=colour, ls=dash, lw=1.7, label=labels.method(name))
    if "low" in along:
        axes.fill_between(c, along["low"], along["high"], color=colour, alpha=0.16, lw=0)


def mark_computes(axes: Any, result: dict[str, Any], top: bool = False) -> None:
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


def values_of(method: dict[str, Any]) -> dict[str, float]:
    """A method's parameters by name."""
    return {name: each["value"] for name, each in method["parameters"].items()}


def groups(values: np.ndarray, same: float = 0.02) -> np.ndarray:
    """A number for each row, rising with its value: one for all that differ by less than `same`."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(np.log(values[order])) > same
    found = np.empty(len(values), int)
    found[order] = np.append(0, np.cumsum(steps))
    return found
