"""A fit as tables: what each method says, side by side, and how far to trust it."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from t5x_lite.scaling import labels


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints every method's parameters and optimum with 95% intervals, and where methods part.

    Args:
      result: of `fit.fit`.
      console: where to; None for standard output.
    """
    console = console or Console(width=None if Console().is_terminal else 120)
    left_out = f", {result['unfinished']} unfinished and {result['dropped']} dropped"
    console.print(f"{result['points']} points{left_out}", highlight=False)
    parts = dict(result["methods"])
    if "downstream" in result:
        parts["downstream"] = result["downstream"]
    console.print(_parameters(parts))
    if result["comparison"]:
        console.print(_comparison(result["comparison"]))
    if "validation" in result:
        console.print(_validation(result["validation"]))
    for line in _remarks(result, parts):
        console.print(labels.raised(line), highlight=False)


def _parameters(parts):
    table = Table("method", "quantity", box=None, pad_edge=False)
    table.add_column("value", justify="right")
    table.add_column("95% interval")
    for method, found in parts.items():
        for first, (name, number) in enumerate(_quantities(found)):
            cell = labels.number(number["value"], 5), labels.interval(number.get("interval"), 5)
            table.add_row("" if first else method, name, *cell)
    return table


def _quantities(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from found.get("parameters", {}).items()
    for key, name in (("n_exponent", "a of N_opt ∝ C^a"), ("d_exponent", "b of D_opt ∝ C^b")):
        if key in found:
            yield name, found[key]
    if "accuracy" in found.get("optimum", {}):
        c = labels.short(found["optimum"]["c"])
        yield f"accuracy at {c} FLOPs", found["optimum"]["accuracy"]


def _comparison(comparison):
    """A row for each method, and how many times as large the largest value is as the smallest."""
    table = Table(
        f"at {labels.short(comparison['c'])} FLOPs", "N_opt", "D_opt", "D / N", "loss",
        box=None, pad_edge=False,
    )  # fmt: skip
    names = ("n", "d", "tokens_per_parameter", "loss")
    for method, best in comparison["methods"].items():
        cells = [
            labels.beside(best[name], 4 if name == "loss" else 3) if name in best else "–"
            for name in names
        ]
        table.add_row(method, *cells)
    if spread := comparison["spread"]:
        table.add_row(
            "largest / smallest", *(f"{spread[n]:.3g}" if n in spread else "–" for n in names)
        )
    return table


def _validation(validation):
    title = f"{len(validation['rows'])} runs predicted from smaller ones"
    table = Table(title, "RMS error", "mean error", "inside 95%", box=None, pad_edge=False)
    for method, found in validation["methods"].items():
        inside = f"{found['inside']:.0%}" if "inside" in found else "–"
        table.add_row(method, f"{found['rms_error']:.2%}", f"{found['mean_error']:+.2%}", inside)
    return table


def _remarks(result, parts) -> Iterator[str]:
    if result["comparison"]:
        yield from result["comparison"]["remarks"]
    for method, budgets in result.get("validation", {}).get("minima", {}).items():
        for each in budgets:
            said, true = labels.beside(each["predicted_n"], 3), labels.number(each["n"], 3)
            where = f"held-out {labels.short(each['c'])} FLOPs"
            yield f"{method} predicts N {said} for {where}; their own curve has {true}."
    for method, found in parts.items():
        for name, why in found.get("not_identified", {}).items():
            yield f"{method}: {name} is not identified: {why}."
        if "caveat" in found:
            yield f"{method}: {found['caveat']}."
    for why, methods in labels.by_reason(result["refused"]).items():
        yield f"{', '.join(methods)} {'was' if len(methods) == 1 else 'were'} not fitted: {why}"
