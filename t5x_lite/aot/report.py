"""What `compile` found, as tables for a person; every time in them is modelled."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

RESOURCES = {"compute": "products", "hbm": "HBM", "ici": "ICI", "dcn": "DCN, between slices"}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints a report of `compile_step`."""
    mesh = " × ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    console.print(
        f"{report['verb']} on {report['topology']}: {report['chips']} {report['chip']} chips, mesh "
        f"{mesh or 'of one'}, rules {report['rules']}; "
        f"compiled in {report['compile_seconds']:.0f} s",
        highlight=False,
    )
    console.print(_memory(report["hbm"]), _sent(report), _times(report), highlight=False)
    if report["kernels"]:
        console.print(f"\nkernels: {', '.join(report['kernels'])}", highlight=False)
    console.print(*_summary(report), sep="\n", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _memory(hbm: Mapping[str, int]) -> Table:
    table = _table("\nHBM of a chip", "MiB")
    notes = {
        "alias": "  of the output, in the arguments' place",
        "activations": "  among temporaries, estimated",
    }
    parts = ("arguments", "temporaries", "activations", "output", "alias", "code", "total")
    for name in (name for name in (*parts, "capacity") if name in hbm):
        sign = "-" if name == "alias" else ""
        table.add_row(name + notes.get(name, ""), f"{sign}{hbm[name] / 2**20:,.1f}")
    return table


def _sent(report: Mapping[str, Any]) -> Table:
    table = _table("\nsent by a chip", "mesh axis", "network", "times", "MB", "waited for")
    for row in report["collectives"]:
        share = row["awaited_bytes"] / row["bytes"] if row["bytes"] else 0
        table.add_row(
            *(row["kind"], row["axis"], row["network"].upper(), f"{row['count']:,}"),
            *(f"{row['bytes'] / 1e6:,.2f}", f"{share:.0%}"),
        )
    return table


def _times(report: Mapping[str, Any]) -> Table:
    table = _table("\nmodelled, at published peaks", "a step", "ms")
    amounts = {
        "compute": f"{report['matmul_flops'] / report['chips'] / 1e12:,.3f} TFLOP",
        "hbm": f"{report['hbm_bytes'] / 1e9:,.3f} GB",
    }
    for network in ("ici", "dcn"):
        size = sum(row["bytes"] for row in report["collectives"] if row["network"] == network)
        amounts[network] = f"{size / 1e9:,.3f} GB"
    for name, what in RESOURCES.items():
        table.add_row(what, amounts[name], f"{1e3 * report['seconds'][name]:,.3f}")
    table.add_row("  of ICI and DCN: waited for", "", f"{1e3 * report['seconds']['awaited']:,.3f}")
    return table


def _summary(report: Mapping[str, Any]) -> Iterator[str]:
    step = report["step_seconds"]
    yield (
        f"\nmodelled step {1e3 * step:,.3f} ms, bound by {RESOURCES[report['bound']]}; "
        f"{report['tokens'] / step:,.0f} tokens/s, MFU {report['mfu']:.1%} at best"
    )
    yield "Not measured: real steps take longer. docs/compile.md says what is left out."
