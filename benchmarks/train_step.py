"""Time train steps on a CPU: t5x_lite beside the same models of `transformers` on torch.

    python benchmarks/train_step.py --setup     once: makes torch's environment, .venv-torch
    python benchmarks/train_step.py             about ten minutes on two cores
    python benchmarks/train_step.py --tiny      does it work at all?

Every contender is a process (contender.py), with a memory of its own. They take short turns, so
that the machine's noise hits all alike; a ratio is the median over rounds of paired ratios.
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
import time
from dataclasses import asdict, replace
from pathlib import Path

from contender import Job
from rich import box
from rich.console import Console
from rich.table import Table
from turns import TORCH, FailedError, Process, among, disagreement, make_environment, positive

MODELS = {
    "gpt": Job("gpt", 32_000, 512, 8, 8, 64, 2048, batch=8, length=512),
    "bert": Job("bert", 32_000, 512, 8, 8, 64, 2048, batch=8, length=512),
    "t5": Job("t5", 32_128, 512, 8, 6, 64, 1024, batch=8, length=512, target_length=128),
}
TINY = {"vocab": 512, "width": 64, "layers": 2, "heads": 4, "head_dim": 16, "hidden": 256,
        "batch": 4, "length": 64}  # fmt: skip
LITE = [f"t5x_lite{mode}" for mode in ("", "-unrolled", "-segments", "-bf16")]
REFERENCES = ["eager", "compiled"]
CONTENDERS = [*LITE, *REFERENCES, *(f"{name}-bf16" for name in REFERENCES)]

NOT_IDENTICAL = """\
- Attention: t5x_lite takes GPT's and T5's encoder's in slices of 128 queries, each with the keys
  that it may see, and computes their scores again for the gradient; it stores the weights of
  BERT's and of T5's decoder's. torch's fused kernel stores none and skips the blocks above GPT's
  diagonal (compiled, transformers 5.23 hands it a stored mask, and it skips none); it doesn't
  serve T5's self-attention, which has a bias, nor anything with dropout. FLOPs count every pair.
- Metrics: t5x_lite's step also computes the accuracy. Both compute the gradients' norm, to clip.
- Compiling: t5x_lite's whole step is one program. 'compiled' compiles model and loss; clipping and
  AdamW (one fused kernel) are those of 'eager'.
- Masks: a row is one document, and neither side gets a mask. Training's batches have segments and
  positions as well, as 't5x_lite-segments' has here.
- bf16: t5x_lite computes in bfloat16 but for softmax, norms and loss; torch's autocast decides by
  operation. Parameters are float32 in both.
- Parameters are drawn by different generators, t5x_lite's cut at two sigma. transformers ties T5's
  head; here it is untied, and drawn again.
- Both: uniform tokens, always the same batch; all tokens are targets, BERT's too; all parameters
  decay. Real text repeats tokens, which the embeddings' gradient may notice."""


def step_flops(job: Job) -> int:
    """Matrix products of a step, the backward pass counted as two forward passes.

    Attention counts every pair of query and key, whether a contender computes it or not.
    """
    inner, gated = job.heads * job.head_dim, job.family == "t5"

    def stack(length: int, memory: int = 0) -> int:
        ffn = (3 if gated else 2) * job.width * job.hidden
        own = length * (4 * job.width * inner + 2 * length * inner + ffn)
        cross = 2 * (length + memory) * job.width * inner + 2 * length * memory * inner
        return job.layers * (own + (cross if memory else 0))

    head = job.width * (job.vocab + (job.width if job.family == "bert" else 0))
    row = stack(job.length) + (job.target_length or job.length) * head
    row += stack(job.target_length, job.length) if job.target_length else 0
    return 3 * 2 * job.batch * row


def compete(job: Job, options: argparse.Namespace, console: Console) -> dict[str, dict]:
    """Runs the contenders on one model in turns; returns their answers, without those that fail."""
    results, processes = {}, {}
    with contextlib.ExitStack() as stack, console.status("", refresh_per_second=1) as status:

        def ask(name: str, what: str, question) -> dict | None:
            status.update(f"{job.family}, {name}: {what}")
            try:
                return question()
            except FailedError as error:
                console.print(str(error), markup=False, highlight=False)
                processes.pop(name), results.pop(name, None)

        for name in options.contenders:
            python = sys.executable if name in LITE else options.torch_python
            own = asdict(replace(job, contender=name))
            processes[name] = Process(name, python, "contender.py", own)
            stack.callback(processes[name].close)
            if ready := ask(name, "compiling and warming up", processes[name].answer):
                results[name] = {**ready, "rounds": []}
        for turn in range(options.rounds):
            # Back and forth: a machine that slows down steadily favours nobody.
            for name in list(processes)[:: -1 if turn % 2 else 1]:
                time.sleep(0.3)  # threads of the one before may still spin
                steps = functools.partial(processes[name].ask, options.steps_per_round)
                if answer := ask(name, f"round {turn + 1} of {options.rounds}", steps):
                    results[name]["losses"] += answer.pop("losses")
                    results[name]["rounds"].append(answer)
    return results


def summarise(job: Job, results: dict[str, dict]) -> None:
    """Adds what the rounds of each contender say; a ratio above 1 is a speed above the other's."""
    seconds = {n: [turn["step_seconds"] for turn in r["rounds"]] for n, r in results.items()}
    for name, result in results.items():
        mine, step = seconds[name], statistics.median(seconds[name])
        result["tokens_per_second"] = job.batch * (job.length + job.target_length) / step
        result["spread"] = (max(mine) - min(mine)) / step
        for key in ("matmul_rate", "peak_bytes"):
            result[key] = max(turn[key] for turn in result["rounds"])
        result["matmul_share"] = step_flops(job) / step / result["matmul_rate"]
        result["ratio"] = {
            other: statistics.median(b / a for a, b in zip(mine, seconds[other], strict=True))
            for other in REFERENCES if other in results
        }  # fmt: skip


def table(job: Job, results: dict[str, dict]) -> Table:
    lengths = f"{job.length}+{job.target_length}" if job.target_length else job.length
    count = next(iter(results.values()))["parameters"]
    sizes = f"{job.batch}×{lengths} tokens, {count:,} parameters"
    title = f"{job.family}: {sizes}, {step_flops(job) / 1e9:,.1f} GFLOP a step"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE)
    others = [name for name in REFERENCES if name in results]
    columns = ["peak\nGiB", "matmul\nGF/s", "share\nof it", "1st\nstep s", "loss"]
    for column in ("", "tokens/s", "spread", *(f"×\n{name}" for name in others), *columns):
        shown.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        shown.add_row(
            name,
            f"{result['tokens_per_second']:,.0f}",
            f"{result['spread']:.0%}",
            *(f"{result['ratio'][other]:.2f}" for other in others),
            f"{result['peak_bytes'] / 2**30:.2f}",
            f"{result['matmul_rate'] / 1e9:.0f}",
            f"{result['matmul_share']:.0%}",
            f"{result['first_step_seconds']:.0f}",
            f"{result['losses'][0]:.3f} → {result['losses'][-1]:.3f}",
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, default = parser.add_argument, ["t5x_lite", *REFERENCES]
    add("--setup", action="store_true", help="make torch's environment and stop")
    add("--torch_python", default=str(TORCH / "bin" / "python"), help="a python that has torch")
    add("--models", type=among(MODELS), default=list(MODELS), help=",".join(MODELS))
    add("--contenders", type=among(CONTENDERS), default=default, help=",".join(CONTENDERS))
    add("--rounds", type=positive, default=3, help="turns of each contender")
    add("--steps_per_round", type=positive, default=1, help="steps a turn")
    add("--dropout", type=float, default=0.0, help="on both sides; figures of record have none")
    add("--tiny", action="store_true", help="tiny models: does it work at all?")
    add("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    needed = not options.setup and not set(options.contenders) <= set(LITE)
    if needed and not Path(options.torch_python).exists():
        parser.error(f"no {options.torch_python}: run --setup first, or --contenders t5x_lite")
    return options


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    if options.setup:
        make_environment(TORCH, "requirements-torch.txt")
        return 0
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "steps_per_round": options.steps_per_round,
        "not_identical": NOT_IDENTICAL,
        "models": {},
    }
    console.print(f"{report['date']}, {report['machine']}, load {report['load']:.2f}")
    if report["load"] > 0.5:
        console.print("The machine is busy: neither speeds nor ratios will hold.", style="bold")
    good = True
    for name in options.models:
        job = replace(MODELS[name], dropout=options.dropout, **(TINY if options.tiny else {}))
        results = compete(job, options, console)
        good &= len(results) == len(options.contenders)
        if not results:
            continue
        summarise(job, results)
        wrong = disagreement(results)
        good &= not wrong
        console.print(table(job, results), wrong)
        report["models"][name] = {"job": asdict(job), "contenders": results}
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    about = {key: value for result in results.values() for key, value in result["about"].items()}
    console.print(f"{about}, dropout {options.dropout}", highlight=False)
    console.print(f"What is not identical work:\n{NOT_IDENTICAL}", highlight=False, soft_wrap=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
