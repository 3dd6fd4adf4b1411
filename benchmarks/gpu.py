"""Time train steps on a GPU: t5x_lite beside the same models of `transformers` on torch.

    python benchmarks/gpu.py --setup          once: makes torch's environment, .venv-torch
    python benchmarks/gpu.py                  on one GPU
    python benchmarks/gpu.py --dry_run        tiny, on a CPU: does it work at all?
    python benchmarks/gpu.py --kernel_tests   the tests that only a GPU can run

Every contender is a process (contender.py). Two of them don't fit into one GPU's memory, so that a
turn is a whole life: compile, warm up, step, end. The turns go back and forth.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from contender import Job, t5x_lite_batch, t5x_lite_config
from rich import box
from rich.console import Console
from rich.table import Table
from turns import TORCH, FailedError, Process, among, disagreement, make_environment, positive

from t5x_lite.aot import chips

ROOT = Path(__file__).resolve().parents[1]
# Rows that fit 80 GB on both sides, torch's without rematerialisation.
LLAMA = Job("llama", 32_000, 2048, 24, 16, 128, 5504, batch=4, length=4096)
MODELS = {
    "llama": LLAMA,  # 1.3B: the shape of Sheared-LLaMA (Xia et al. 2024)
    "t5": Job("t5", 32_128, 1024, 24, 16, 64, 2816, batch=32, length=512, target_length=128),
    "bert": Job("bert", 30_522, 1024, 24, 16, 64, 4096, batch=32, length=512),
}
TINY = {"vocab": 512, "width": 64, "layers": 2, "heads": 4, "head_dim": 16, "hidden": 256,
        "batch": 4, "length": 64}  # fmt: skip
LITE = [f"t5x_lite-bf16{mode}" for mode in ("", "-unrolled", "-segments")]
COMPILED = "compiled-bf16"
CONTENDERS = [*LITE, COMPILED, "eager-bf16"]
REMATS = ("none", "minimal", "save_qkv_proj", "full")
ASK = """\
import jax, sys
try:
    print(jax.devices()[0].device_kind)
except RuntimeError as error:
    sys.exit(str(error).splitlines()[0])"""
DRY = "DRY RUN on a CPU with tiny models: no figure below says anything about speed."

NOT_IDENTICAL = """\
- Attention: t5x_lite takes cuDNN's where it applies (Llama, BERT), and XLA for T5's biases and for
  keys of fewer than 256 positions. torch takes flash attention and nothing else for Llama and BERT;
  T5's bias, which transformers gives its cross-attention too (zeros), leaves it another fused
  kernel. transformers' masks are left out, as no row has padding: torch.compile would store
  Llama's, and flash attention takes none.
- FLOPs: of every query with every key for all, though causal kernels skip half of the pairs; what
  is computed again to save memory isn't counted.
- Precision: parameters and AdamW's moments are float32 in both. t5x_lite computes in bfloat16 but
  for softmax, norms and loss; torch's autocast decides by operation.
- Compiling: t5x_lite's whole step is one program. 'compiled' compiles model and loss; clipping and
  AdamW (one fused kernel) are those of 'eager'.
- Memory: the allocators' high-water marks of bytes in use. t5x_lite takes the first policy of
  rematerialisation that fits, and never stores all logits; torch stores everything.
- Vocabulary: BERT's 30,522 words are 30,592 rows in t5x_lite, a multiple of 128.
- Metrics: t5x_lite's step also computes the accuracy. Both compute the gradients' norm, to clip.
- Both: uniform tokens, always the same batch; all tokens are targets, BERT's too; all parameters
  decay; no dropout; no padding. 't5x_lite-bf16-segments' has training's segments and positions.
- Parameters are drawn by different generators."""


class RefusedError(Exception):
    """What the user can mend, in one line."""


def gpu_environment() -> dict[str, str]:
    """One GPU, the first that may be seen, and nearly all of its memory."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {
        "JAX_PLATFORMS": "cuda",
        "CUDA_VISIBLE_DEVICES": first,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def gpu_kind() -> str:
    """JAX's name of the GPU.

    Raises:
      RefusedError: there is none that JAX can use.
    """
    found = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, **gpu_environment()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode == 0:
        return found.stdout.strip().splitlines()[-1]
    why = found.stderr.strip().splitlines()[-1]
    raise RefusedError(
        f"no GPU that JAX can use ({why}); pip install '.[cuda]' where there is one, or --dry_run "
        f"to run everything tiny on a CPU."
    )


def peak_of(kind: str) -> float:
    """Dense bfloat16 FLOP/s of a GPU.

    Raises:
      RefusedError: a GPU that isn't in the table.
    """
    chip = chips.of_device(kind)
    if chip is None:
        raise RefusedError(f"{kind}'s peak isn't known: give --peak, its dense bfloat16 FLOP/s.")
    return chip.peak["bfloat16"]


def step_flops(job: Job) -> int:
    """The model FLOPs of a step, as `t5x_lite train` counts them."""
    from t5x_lite.losses import CrossEntropy
    from t5x_lite.train.meter import model_flops

    shapes = {name: (x.shape, x.dtype) for name, x in t5x_lite_batch(job).items()}
    return model_flops(t5x_lite_config(job), CrossEntropy(), shapes)


def live(job: Job, options: argparse.Namespace, environment: dict[str, str]) -> dict:
    """One contender's life. Raises FailedError where it ends before its time."""
    python = sys.executable if job.contender in LITE else options.torch_python
    process = Process(job.contender, python, "contender.py", asdict(job), **environment)
    try:
        ready = process.answer()
        steps = process.ask(options.steps)
    finally:
        process.close()
    return {**ready, **steps, "losses": ready["losses"] + steps["losses"]}


def compete(job: Job, options: argparse.Namespace, environment, console: Console) -> dict:
    """Lets the contenders live in turns; returns their lives, without those that fail."""
    lives: dict[str, list[dict]] = {name: [] for name in options.contenders}
    with console.status("", refresh_per_second=1) as status:
        for turn in range(options.rounds):
            # Back and forth: a GPU that grows warm favours nobody.
            for name in list(lives)[:: -1 if turn % 2 else 1]:
                status.update(f"{job.family}, {name}: turn {turn + 1} of {options.rounds}")
                try:
                    lives[name].append(live(replace(job, contender=name), options, environment))
                except FailedError as error:
                    console.print(str(error), markup=False, highlight=False)
                    del lives[name]
    return lives


def summarise(job: Job, lives: dict[str, list[dict]], flops: int, peak: float) -> dict[str, dict]:
    """What each contender's lives say together."""
    seconds = {name: [life["step_seconds"] for life in turns] for name, turns in lives.items()}
    results = {}
    for name, turns in lives.items():
        step = statistics.median(seconds[name])
        results[name] = {
            **turns[0],  # of the first life: later ones find what it compiled in the cache
            "round_seconds": seconds[name],
            "step_seconds": step,
            "tokens_per_second": job.batch * (job.length + job.target_length) / step,
            "mfu": flops / step / peak,
            "peak_bytes": max(life["peak_bytes"] for life in turns),
            "matmul_rate": max(life["matmul_rate"] for life in turns),
            "losses": turns[0]["losses"],
        }
        if COMPILED in seconds:
            pairs = zip(seconds[COMPILED], seconds[name], strict=True)
            results[name]["ratio"] = statistics.median(theirs / own for theirs, own in pairs)
    return results


def table(job: Job, results: dict[str, dict], flops: int, label: str) -> Table:
    lengths = f"{job.length}+{job.target_length}" if job.target_length else job.length
    count = next(iter(results.values()))["parameters"]
    sizes = f"{job.batch}×{lengths} tokens, {count:,} parameters"
    title = f"{job.family}: {sizes}, {flops:.4g} model FLOPs a step{label}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE)
    columns = ["×\ncompiled", "MFU", "matmul\nTF/s", "peak\nGiB", "compile\ns", "remat", "loss"]
    for column in ("", "tokens/s", "step\nms", *columns):
        shown.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        shown.add_row(
            name,
            f"{result['tokens_per_second']:,.0f}",
            f"{1e3 * result['step_seconds']:,.1f}",
            f"{result['ratio']:.2f}" if "ratio" in result else "",
            f"{result['mfu']:.1%}",
            f"{result['matmul_rate'] / 1e12:,.1f}",
            f"{result['peak_bytes'] / 2**30:.2f}",
            f"{result['compile_seconds']:.0f}",
            result.get("remat", ""),
            f"{result['losses'][0]:.3f} → {result['losses'][-1]:.3f}",
        )
    return shown


def kernel_tests(dry_run: bool) -> int:
    """Runs the tests of GPU kernels; dry, XLA stands in for cuDNN on a CPU."""
    platform = "cpu" if dry_run else "cuda"
    environment = {**os.environ, **({} if dry_run else gpu_environment())}
    environment["T5X_LITE_TEST_PLATFORM"] = platform
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/nn/test_kernels.py"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, default = parser.add_argument, [LITE[0], COMPILED]
    add("--setup", action="store_true", help="make torch's environment and stop")
    add("--dry_run", action="store_true", help="tiny models on a CPU: does it work at all?")
    add("--kernel_tests", action="store_true", help="run the tests that only a GPU can, and stop")
    add("--torch_python", default=str(TORCH / "bin" / "python"), help="a python that has torch")
    add("--models", type=among(MODELS), default=list(MODELS), help=",".join(MODELS))
    add("--contenders", type=among(CONTENDERS), default=default, help=",".join(CONTENDERS))
    add("--rounds", type=positive, default=2, help="lives of each contender")
    add("--steps", type=positive, default=20, help="steps that are timed in each life")
    add("--batch", type=positive, help="rows, instead of each model's own")
    add("--remat", type=among(REMATS), default=list(REMATS), help="the first that fits is taken")
    add("--peak", type=float, help="dense bfloat16 FLOP/s of a GPU that isn't known")
    add("--json", type=Path, help="write everything to this file")
    return parser.parse_args()


def check_torch(options: argparse.Namespace, console: Console) -> None:
    """Leaves torch out of a dry run where it isn't there.

    Raises:
      RefusedError: it isn't there otherwise.
    """
    own = [name for name in options.contenders if name in LITE]
    if own == options.contenders or Path(options.torch_python).exists():
        return
    missing = f"no {options.torch_python}: --setup makes it"
    if not options.dry_run or not own:
        raise RefusedError(f"{missing}; or --contenders {LITE[0]}.")
    console.print(f"{missing}; t5x_lite alone", markup=False, highlight=False)
    options.contenders = own


def compare(options: argparse.Namespace, console: Console) -> int:
    """Runs everything; 0 where all contenders lived and agreed."""
    kind = chips.GPUS[-1].kinds[0] if options.dry_run else gpu_kind()
    peak = options.peak or peak_of(kind)
    check_torch(options, console)
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
        "gpu": None if options.dry_run else kind,
        "peak_flops": peak,
        "steps": options.steps,
        "not_identical": NOT_IDENTICAL,
        "models": {},
    }
    where = DRY if options.dry_run else f"{kind}, peak {peak / 1e12:,.0f} TFLOP/s (bfloat16, dense)"
    console.print(f"{report['date']}\n{where}", highlight=False)
    good, about = True, {}
    with tempfile.TemporaryDirectory() as cache:
        # Both sides' first lives compile anew, and their later ones don't.
        caches = {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax", "TORCHINDUCTOR_CACHE_DIR": cache}
        environment = {**caches, **({} if options.dry_run else gpu_environment())}
        for name in options.models:
            job = replace(MODELS[name], flash=True, warmup=3, remats=tuple(options.remat))
            job = replace(job, **TINY) if options.dry_run else replace(job, device="gpu")
            job = replace(job, batch=options.batch or job.batch)
            flops = step_flops(replace(job, contender=LITE[0]))
            lives = compete(job, options, environment, console)
            good &= len(lives) == len(options.contenders)
            if not lives:
                continue
            results = summarise(job, lives, flops, peak)
            wrong = disagreement(results)
            good &= not wrong
            label = " (dry run)" if options.dry_run else ""
            console.print(table(job, results, flops, label), wrong)
            about |= {k: v for result in results.values() for k, v in result["about"].items()}
            report["models"][name] = {"job": asdict(job), "flops": flops, "contenders": results}
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{about}", highlight=False)
    console.print(f"What is not identical work:\n{NOT_IDENTICAL}", highlight=False, soft_wrap=True)
    return 0 if good else 1


def main() -> int:
    options = arguments()
    if options.setup:
        make_environment(TORCH, "requirements-torch.txt")
        return 0
    try:
        if options.kernel_tests:
            options.dry_run or gpu_kind()
            return kernel_tests(options.dry_run)
        os.environ["JAX_PLATFORMS"] = "cpu"  # this process only counts
        return compare(options, Console(width=None if sys.stdout.isatty() else 110))
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
