"""Loss curves of the quickstart's first steps in bfloat16 and with products of int8.

    python benchmarks/quantized.py [--steps 300] [--folder DIR]

Trains the same model on the same batches, in bfloat16 and with quantised products; both once more
with gradients summed in another order, those of two microbatches. The second run in bfloat16 is the
control: how far rounding alone takes a run from the first. Prints each run's mean loss over blocks
of 50 steps, its loss on held-out text, for which nothing is quantised, and how far the means of any
50 steps and the held-out loss are from the first run's. Ends with an error where one of int8's is
more than 1% away.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = 50  # steps
LIMIT = 0.01
# The quickstart's own, however few of its steps are done: warmed up in 12 steps instead of 60, runs
# that differ in rounding alone are 4% apart.
SCHEDULE = 1500
BASE = f"""
from __gin__ import dynamic_registration

from t5x_lite import schedules
from t5x_lite.nn import quantized
from t5x_lite.nn.presets import llama

include 'gin_configs/runs/quickstart.gin'

mini/llama.llama.dtype = 'bfloat16'
schedules.cosine.steps = {SCHEDULE}
LOG_PERIOD = 1
CHECKPOINT_PERIOD = None
"""
INT8 = "QUANTIZED = @quantized.QuantizedTraining()\n"
OTHER_ORDER = "MICROBATCHES = 2\n"
CONTENDERS = {
    "bfloat16": "",
    "bfloat16 again": OTHER_ORDER,
    "int8": INT8,
    "int8 again": INT8 + OTHER_ORDER,
}


def call(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "t5x_lite", *map(str, arguments)], check=True)


def train(folder: Path, name: str, bindings: str, steps: int) -> tuple[list[float], float]:
    """Mean losses of every BLOCK steps on end, from each step on; and the held-out loss."""
    file, run = folder / f"{name}.gin", folder / name
    file.write_text(BASE + bindings)
    sizes = f"--gin.STEPS={steps}", f"--gin.EVAL_PERIOD={steps}", f"--gin.DATA_DIR='{folder}/data'"
    call("data", "prepare", "--gin_file", file, sizes[2])
    call("train", "--gin_file", file, "--model_dir", run, *sizes)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == steps, f"{run}: {len(losses)} losses of {steps} steps"
    means = [statistics.fmean(losses[start:][:BLOCK]) for start in range(steps - BLOCK + 1)]
    return means, next(row["eval/loss"] for row in rows if "eval/loss" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="keep runs here; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = {
            name: train(folder, name, bindings, arguments.steps)
            for name, bindings in CONTENDERS.items()
        }
    reference, held_out = runs["bfloat16"]
    print(f"\nmean loss of each {BLOCK} steps, then held-out; nats per token")
    worst = {}
    for name, (means, loss) in runs.items():
        pairs = zip([*means, loss], [*reference, held_out], strict=True)
        worst[name] = max(abs(a / b - 1) for a, b in pairs)
        shown = "  ".join(f"{mean:.4f}" for mean in means[::BLOCK])
        print(f"{name:20} {shown}  held-out {loss:.4f}  at most {worst[name]:.2%} away")
    found = max(worst["int8"], worst["int8 again"])
    if found > LIMIT:
        sys.exit(f"int8 is {found:.2%} away from bfloat16, more than {LIMIT:.0%}.")


if __name__ == "__main__":
    main()
