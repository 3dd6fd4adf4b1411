"""Time the data pipeline on a CPU: t5x_lite beside seqio, and beside sentencepiece alone.

    python benchmarks/data.py --setup     once: makes seqio's environment, .venv-seqio
    python benchmarks/data.py             about ten minutes on two cores
    python benchmarks/data.py --tiny      does it work at all?

Every contender is one process (data_contender.py). They take turns, so that the machine's noise
hits all alike; a ratio is the median over rounds of paired ratios.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from data_contender import EXTRA_IDS, Job
from rich import box
from rich.console import Console
from rich.table import Table
from turns import FailedError, Process, among, make_environment, positive

HERE = Path(__file__).resolve().parent
SEQIO = HERE.parent / ".venv-seqio"
SIZES = {  # T5's pre-training (Raffel et al. 2020, §3.1.4: 128 rows of 512), and a GPT's
    "span_corruption": {"batch": 128, "length": 512, "targets_length": 114},
    "causal_lm": {"batch": 32, "length": 1024},
}
TINY_SIZES = {
    "span_corruption": {"batch": 8, "length": 64, "targets_length": 14},
    "causal_lm": {"batch": 8, "length": 64},
}
LITE, REFERENCES = ["t5x_lite", "t5x_lite-best_fit"], ["seqio", "seqio-unpacked"]
CONTENDERS = [*LITE, *REFERENCES]
STEPS = (0, 100_000)
PARTS = (*SIZES, "start", "tokenise")
TOLERANCE = 0.02  # of the share of target tokens: the last rows of documents are cut otherwise

MEASURED = f"""\
- Corpus: the training documents of chitchat-dataset in one sentencepiece model's ids with
  {EXTRA_IDS} sentinels. seqio gets the very ids, and its own vocabulary is checked to give them.
- A token is a position of a ready batch that isn't padding, inputs and targets both; tokens/s are
  those of the batches that a turn gave, over its time. A batch is a dict of numpy arrays.
- Warm-up: more than one pass over the corpus. At the start of each turn batches are thrown away for
  half a second, since a contender reads ahead while the other one is at work.
- Threads: each side's own default in one process: t5x_lite one of Python's, seqio tf.data's.
- 't5x_lite': Task.batches and iterate, as `t5x_lite train` reads them, tokens from one mapped file.
  Rows are windows of the stream of documents. '-best_fit': rows of whole documents.
- 'seqio': a Task with tokens cached offline, in TFRecords of 64 shards as its own tool writes them,
  which it holds in memory after the first pass (as it does with less than 10,000 documents);
  get_dataset(use_cached, shuffle) with its buffer of 1,000 examples, a converter that packs, then
  batch and prefetch, as T5X does. Span corruption is t5's, which concatenates 128 documents at a
  time and cuts them in rows without padding; for causal LM a document and its end are an
  example, cut where it is longer than a row. Its packing in TensorFlow's own operations: the custom
  one isn't on PyPI.
- 'seqio-unpacked': seqio's fastest way to the same number of rows. Span corruption with pack=False;
  causal LM is t5's full_lm, 128 documents end to end. Its batches lack segments and positions.
- Order: t5x_lite shuffles all rows of an epoch and can begin at any step; seqio shuffles files and
  a buffer, and can't.
- start: from the start of the process to its first batch of numpy arrays, Python's own start and
  imports included; files are in the page cache, and what is made once for a corpus is made before.
- tokenise: one core. 'tokens': `data prepare` with one worker, text and tokenizer there and tokens
  not, less the same with the tokens there: so reading the text, encoding, checking, hashing and
  writing ids and index. 'sentencepiece': encode(texts, num_threads=1), 1,024 texts at a time from
  memory, and its lists of ids are dropped. MB are 10⁶ bytes of UTF-8."""


def once(job: Job, python: str = sys.executable) -> dict:
    """The answer of a contender that does one thing, and the seconds from start to answer."""
    began = time.perf_counter()
    process = Process(job.contender, python, "data_contender.py", asdict(job))
    try:
        return {**process.answer(), "seconds": time.perf_counter() - began}
    finally:
        process.close()


def compete(jobs: list[Job], options: argparse.Namespace, console: Console) -> dict[str, dict]:
    """Runs contenders in turns; returns their answers, without those that fail."""
    results, processes = {}, {}
    with contextlib.ExitStack() as stack, console.status("", refresh_per_second=1) as status:

        def ask(name: str, what: str, question) -> dict | None:
            status.update(f"{name}: {what}")
            try:
                return question()
            except FailedError as error:
                console.print(str(error), markup=False, highlight=False)
                processes.pop(name), results.pop(name, None)

        for job in jobs:
            name = job.contender
            python = options.seqio_python if name in REFERENCES else sys.executable
            processes[name] = Process(name, python, "data_contender.py", asdict(job))
            stack.callback(processes[name].close)
            if ready := ask(name, "warming up", processes[name].answer):
                results[name] = {**ready, "rounds": []}
        for turn in range(options.rounds):
            # Back and forth: a machine that slows down steadily favours nobody.
            for name in list(processes)[:: -1 if turn % 2 else 1]:
                what = f"round {turn + 1} of {options.rounds}"
                question = functools.partial(processes[name].ask, options.seconds)
                if answer := ask(name, what, question):
                    results[name]["rounds"].append(answer)
    return results


def summarise(results: dict[str, dict], amount, others: list[str]) -> None:
    """Adds rates, amount per second, and ratios; above 1 is a speed above the other's."""
    rates = {
        n: [amount(turn) / turn["seconds"] for turn in r["rounds"]] for n, r in results.items()
    }
    for name, result in results.items():
        mine = rates[name]
        result["rate"] = statistics.median(mine)
        result["spread"] = (max(mine) - min(mine)) / result["rate"]
        result["ratio"] = {
            other: statistics.median(a / b for a, b in zip(mine, rates[other], strict=True))
            for other in others if other in results
        }  # fmt: skip


def disagreement(results: dict[str, dict]) -> str:
    """Says where contenders can't be doing the same work, if so."""
    shapes = {name: result["shapes"] for name, result in results.items()}
    if any(shape != next(iter(shapes.values())) for shape in shapes.values()):
        return f"Not the same batches: shapes {shapes}"
    shares = {}
    for name, result in results.items():
        tokens = [turn["tokens"] for turn in result["rounds"]]
        targets = sum(turn["decoder"] for turn in tokens)
        shares[name] = targets / sum(sum(turn.values()) for turn in tokens)
    if max(shares.values()) - min(shares.values()) > TOLERANCE:
        return f"Not the same objective: targets' share of the tokens {shares}"
    return ""


def speed(objective: str, options: argparse.Namespace, console: Console) -> tuple[dict, bool]:
    """Tokens per second of ready batches."""
    job = replace(options.job, objective=objective, **options.sizes[objective])
    jobs = [replace(job, contender=name) for name in options.contenders]
    results = compete(jobs, options, console)
    if not results:
        return {}, False
    others = [name for name in REFERENCES if name in results]
    summarise(results, lambda turn: sum(turn["tokens"].values()), others)
    lengths = f"{job.length}+{job.targets_length}" if job.targets_length else job.length
    shown = new_table(f"{objective}, batches of {job.batch}×{lengths}")
    columns = ("tokens/s", "spread", *(f"×\n{name}" for name in others), "tokens per\nCPU s")
    add_columns(shown, *columns, "CPUs", "positions\nused")
    for name, result in results.items():
        turns = result["rounds"]
        tokens = sum(sum(turn["tokens"].values()) for turn in turns)
        processor = sum(turn["cpu_seconds"] for turn in turns)
        result["tokens_per_cpu_second"] = tokens / processor
        result["cpus"] = processor / sum(turn["seconds"] for turn in turns)
        result["positions_used"] = tokens / sum(turn["positions"] for turn in turns)
        shown.add_row(
            name,
            f"{result['rate']:,.0f}",
            f"{result['spread']:.0%}",
            *(f"{result['ratio'][other]:.2f}" for other in others),
            f"{result['tokens_per_cpu_second']:,.0f}",
            f"{result['cpus']:.2f}",
            f"{result['positions_used']:.1%}",
        )
    wrong = disagreement(results)
    console.print(shown, wrong)
    return {"job": asdict(job), "contenders": results}, not wrong and len(results) == len(jobs)


def starts(options: argparse.Namespace, console: Console) -> tuple[dict, bool]:
    """Seconds to the first batch of a run that begins, and of one that goes on."""
    found = {}
    shown = new_table(
        f"start of a t5x_lite run, seconds to the first batch ({options.rounds} each)"
    )
    add_columns(shown, *(f"step {step:,}" for step in STEPS), "difference", "of it imports")
    for objective in options.objectives:
        job = replace(options.job, contender="start", objective=objective)
        job = replace(job, **options.sizes[objective])
        once(job)  # what is made once for a corpus
        seconds, imports = {step: [] for step in STEPS}, []
        for turn in range(options.rounds):
            for step in STEPS[:: -1 if turn % 2 else 1]:
                answer = once(replace(job, start_step=step))
                seconds[step].append(answer["seconds"])
                imports.append(answer["import_seconds"])
        first, later = (statistics.median(seconds[step]) for step in STEPS)
        found[objective] = {"seconds": seconds, "difference": later - first}
        shares = f"{statistics.median(imports):.2f}"
        shown.add_row(objective, f"{first:.2f}", f"{later:.2f}", f"{later - first:+.2f}", shares)
    console.print(shown)
    return found, True


def tokenising(options: argparse.Namespace, console: Console) -> tuple[dict, bool]:
    """MB of text per second on one core."""
    names = ("tokens", "sentencepiece")
    jobs = [replace(options.job, contender=name, cores=1) for name in names]
    results = compete(jobs, options, console)
    if len(results) < len(names):
        return results, False
    summarise(results, lambda turn: turn["bytes"] / 1e6, ["sentencepiece"])
    shown = new_table("tokenise, one core")
    add_columns(shown, "MB/s", "spread", "of\nsentencepiece", "MB per\nCPU s")
    for name, result in results.items():
        turns = result["rounds"]
        per_cpu = sum(t["bytes"] for t in turns) / 1e6 / sum(t["cpu_seconds"] for t in turns)
        result["mb_per_cpu_second"] = per_cpu
        shown.add_row(
            name,
            f"{result['rate']:.2f}",
            f"{result['spread']:.0%}",
            f"{result['ratio']['sentencepiece']:.0%}",
            f"{per_cpu:.2f}",
        )
    console.print(shown)
    return results, True


def new_table(title: str) -> Table:
    return Table("", title=title, title_justify="left", box=box.SIMPLE)


def add_columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--setup", action="store_true", help="make seqio's environment and stop")
    add("--seqio_python", default=str(SEQIO / "bin" / "python"), help="a python that has seqio")
    add("--parts", type=among(PARTS), default=list(PARTS), help=",".join(PARTS))
    add("--contenders", type=among(CONTENDERS), default=CONTENDERS, help=",".join(CONTENDERS))
    add("--rounds", type=positive, default=5, help="turns of each contender")
    add("--seconds", type=float, default=5.0, help="of a turn")
    add("--vocab_size", type=positive, default=4096, help="ids, sentinels included")
    add("--cores", type=int, default=0, help="each contender's; default: all (Linux)")
    add("--folder", help="keep prepared data here; default: a temporary one")
    add("--tiny", action="store_true", help="short turns of small rows: does it work at all?")
    add("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    options.objectives = [part for part in options.parts if part in SIZES] or list(SIZES)
    options.sizes = TINY_SIZES if options.tiny else SIZES
    if options.tiny:
        options.rounds, options.seconds = 1, 0.2
    options.needs_seqio = set(options.parts) & set(SIZES) and set(options.contenders) - set(LITE)
    if options.needs_seqio and not (options.setup or Path(options.seqio_python).exists()):
        parser.error(f"no {options.seqio_python}: run --setup first, or --contenders t5x_lite")
    return options


def run(options: argparse.Namespace, console: Console, report: dict) -> bool:
    """Every part that was asked for; a failure leaves the others' figures."""
    report["corpus"] = once(replace(options.job, contender="prepare"))
    if options.needs_seqio:
        once(replace(options.job, contender="cache"), options.seqio_python)
    console.print(f"corpus: {report['corpus']}", highlight=False)
    good = True
    for part in options.parts:
        if part in SIZES:
            report[part], fine = speed(part, options, console)
        else:
            measure = {"start": starts, "tokenise": tokenising}[part]
            report[part], fine = measure(options, console)
        good &= fine
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return good


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    if options.setup:
        make_environment(SEQIO, "requirements-seqio.txt")
        return 0
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "seconds": options.seconds,
        "measured": MEASURED,
    }
    console.print(f"{report['date']}, {report['machine']}, load {report['load']:.2f}")
    if report["load"] > 0.5:
        console.print("The machine is busy: neither speeds nor ratios will hold.", style="bold")
    with tempfile.TemporaryDirectory() as temporary:
        warmup = 0.1 if options.tiny else Job.warmup_epochs
        shared = {"vocab_size": options.vocab_size, "cores": options.cores}
        folder = options.folder or temporary
        options.job = Job("", folder, **shared, warmup_epochs=warmup)
        try:
            good = run(options, console, report)
        except FailedError as error:
            console.print(str(error), markup=False, highlight=False)
            return 1
    console.print(f"What is measured:\n{MEASURED}", highlight=False, soft_wrap=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
