"""What `counting` found, as tables."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_CONVENTIONS = {
    "exact": "exact: 3 × the forward pass",
    "6n": "6N",
    "6n_active": "6N, active",
    "kaplan": "Kaplan: 6N + 6 · layers · length · width",
    "by_side": "6 (D_enc · N_enc + D_dec · N_dec) / D",
}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints parameters, FLOPs, conventions, memory and what a training takes."""
    console.print(_parameters(report["parameters"]))
    console.print()
    console.print(_flops(report["flops"], report["tokens"]))
    for line in _programs(report["flops"], report["tokens"]["row"]):
        console.print(line, highlight=False)
    console.print()
    console.print(_conventions(report["conventions"]))
    console.print()
    console.print(_memory(report["memory"]))
    for line in _training(report.get("training", {})):
        console.print(line, highlight=False)


def _table(first: str, *numbers: str) -> Table:
    table = Table(first, box=None, pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _parameters(found: Mapping[str, Any]) -> Table:
    table = _table("parameters", "all", "active")
    rows = {**found["by_class"], "in all": found}
    for name, each in sorted(rows.items(), key=lambda row: (row[0] == "in all", -row[1]["total"])):
        table.add_row(name, f"{each['total']:,}", f"{each['active']:,}")
    table.add_row("without embeddings", f"{found['non_embedding']:,}", "")
    return table


def _flops(found: Mapping[str, Any], tokens: Mapping[str, int]) -> Table:
    sides = ", ".join(f"{name} {n:,} tokens" for name, n in tokens.items() if name != "row")
    table = _table(f"forward pass of a row ({sides})", "FLOPs", "a token", "share", "not products")
    for each in found["parts"]:
        share = f"{each['flops'] / found['forward']:.1%}"
        name = f"{each['stack']}: {each['part']}"
        numbers = f"{each['flops']:.4g}", f"{each['per_token']:.4g}", share
        table.add_row(name, *numbers, f"{each['elementwise']:.3g}")
    whole, others = found["forward"], f"{found['elementwise']:.3g}"
    table.add_row("in all", f"{whole:.4g}", f"{whole / tokens['row']:.4g}", "100.0%", others)
    return table


def _programs(found: Mapping[str, Any], row: int) -> Iterator[str]:
    yield f"without scores that masks hide: {found['visible']:.4g} a row"
    again = found["executed"] / found["training"] - 1
    yield (f"training: {found['training']:.4g} a row, {found['training'] / row:.4g} a token; as "
           f"the step computes it, {again:+.1%}")  # fmt: skip
    if "decoding" in found:
        yield f"decoding: {found['decoding']:.4g} for a token at the end of a row"


def _conventions(found: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("training FLOPs a token", "", "exact / this")
    for name, label in _CONVENTIONS.items():
        if name in found:
            each = found[name]
            table.add_row(label, f"{each['per_token']:.4g}", f"{each['exact_is']:.3f}")
    return table


def _memory(found: Mapping[str, Any]) -> Table:
    table = _table("memory, on all devices together", "GiB")
    for name, size in _sizes(found):
        table.add_row(name, f"{size / 2**30:,.2f}")
    return table


def _sizes(found: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    for name in ("parameters", "gradients"):
        yield from ((f"{name} in {dtype}", size) for dtype, size in found[name].items())
    yield from ((f"state of {name}", size) for name, size in found["optimizer_state"].items())
    if "cache_of_a_row" in found:
        yield "cache of a row", found["cache_of_a_row"]


def _training(found: Mapping[str, Any]) -> Iterator[str]:
    if not found:
        return
    yield ""
    if "flops" in found:
        yield f"{found['tokens']:.4g} tokens: {found['flops']:.4g} FLOPs"
    if "chip" in found:
        yield (f"{found['chips']} {found['chip']} at {found['mfu']:.0%} of their peak: "
               f"{found['tokens_per_day']:.4g} tokens a day")  # fmt: skip
    if "hours" in found:
        hours = found["hours"]
        yield f"{hours:.4g} hours, {hours / 24:.4g} days, {hours * found['chips']:.4g} chip-hours"
