"""Print which share of a row's positions each objective uses on the demo corpus.

    python benchmarks/data_positions.py                  a minute or two; the extra [demo]
    python benchmarks/data_positions.py --length 128

A position is used if it isn't padding. Rows are those of one epoch in `packing="best_fit"`; of the
plan that says which examples share them, the seconds are given too. Where lengths depend on the
noise each epoch has its own plan.
"""

import argparse
import tempfile
import time

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from t5x_lite.data import objectives as o
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import corpus
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import SentencePiece

BOTH, DECODER = "encoder-decoder", "decoder-only"
MODES = ("[NLU]", "[S2S]", "[NLG]")
OBJECTIVES = {
    "CausalLM": o.CausalLM(packing="best_fit"),
    "MaskedLM": o.MaskedLM(packing="best_fit"),
    "MaskedPairs, NextSentence": o.MaskedPairs(),
    "MaskedPairs, NextSentence, short=0": o.MaskedPairs(short=0),
    "MaskedPairs, SentenceOrder": o.MaskedPairs(pairs=o.SentenceOrder()),
    "FillInTheMiddle": o.FillInTheMiddle(),
    "PrefixLM, decoder": o.PrefixLM(),
    "PrefixLM": o.PrefixLM(family=BOTH),
    "SpanCorruption, decoder": o.SpanCorruption(packing="best_fit", family=DECODER),
    "SpanCorruption": o.SpanCorruption(packing="best_fit"),
    "IidDenoising, decoder": o.IidDenoising(family=DECODER),
    "IidDenoising": o.IidDenoising(),
    "IidDenoising, drop": o.IidDenoising(style="drop"),
    "IidDenoising, mask": o.IidDenoising(style="mask"),
    "UL2, decoder": o.UL2(family=DECODER),
    "UL2": o.UL2(),
    "UL2 with modes": o.UL2(modes=MODES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512, help="of a row")
    parser.add_argument("--folder", help="keep prepared data here; default: a temporary one")
    options = parser.parse_args()
    console = Console()
    table = Table("objective", box=box.SIMPLE)
    for name in ("encoder", "decoder", "rows", "examples", "plan, s"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        for name, objective in OBJECTIVES.items():
            status.update(name)
            vocabulary = SentencePiece(vocab_size=4096)
            folder = options.folder or temporary
            task = Task("chitchat", corpus("chitchat"), vocabulary, objective, data_dir=folder)
            prepare(task, Console(quiet=True))
            table.add_row(name, *measure(task, options.length))
    console.print(table)


def measure(task: Task, length: int) -> list[str]:
    """The cells of a line of the table."""
    sides = task.sides(length)
    rows = task.rows("train", sides, task.shapes(sides), seed=0)
    began = time.perf_counter()
    plan = rows.plan(0)
    seconds = time.perf_counter() - began
    used = {"encoder_segments": 0, "segments": 0}
    for number in range(len(plan)):
        row = rows.row(0, number)
        for name in used.keys() & row.keys():
            used[name] += np.count_nonzero(row[name])
    shares = [
        f"{used[name] / rows.shapes[name][0][0] / len(plan):.1%}" if name in rows.shapes else ""
        for name in used
    ]
    return [*shares, f"{len(plan):,}", f"{plan.examples:,}", f"{seconds:.1f}"]


if __name__ == "__main__":
    main()
