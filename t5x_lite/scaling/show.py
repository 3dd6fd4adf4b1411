"""A fit as a table: what each method says, side by side."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints the parameters of every method with their 95% intervals, and why others were not fit.

    Args:
      result: of `fit.fit`.
      console: where to; None for standard output.
    """
    console = console or Console(width=None if Console().is_terminal else 120)
    left_out = f", {result['unfinished']} unfinished and {result['dropped']} dropped"
    console.print(f"{result['points']} points{left_out}", highlight=False)
    table = Table("method", "quantity", box=None, pad_edge=False)
    table.add_column("value", justify="right")
    table.add_column("95% interval")
    for method, found in result["methods"].items():
        for first, (name, number) in enumerate(_quantities(found)):
            low, high = number.get("interval", (None, None))
            interval = "" if low is None else f"{low:.5g} … {high:.5g}"
            table.add_row("" if first else method, name, f"{number['value']:.5g}", interval)
    console.print(table)
    for method, found in result["methods"].items():
        for name, why in found.get("not_identified", {}).items():
            console.print(f"{method}: {name} is not identified: {why}.", highlight=False)
    for method, why in result["refused"].items():
        console.print(f"{method} was not fitted: {why}", highlight=False)


def _quantities(found: dict[str, Any]):
    yield from found.get("parameters", {}).items()
    if "n_exponent" in found:
        yield "a of N_opt ∝ C^a", found["n_exponent"]
    for name, number in found.get("optimum", {}).items():
        if name != "c":
            yield f"{name} at {found['optimum']['c']:.3g} FLOPs", number
