"""The benchmark of GPUs works where there is none, and without what reads data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
# One device, not the suite's eight, and a compiler in a hurry.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def call(*options, **environment):
    environment = {**os.environ, "XLA_FLAGS": FLAGS, **environment}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_dry_run_trains_without_what_reads_data(tmp_path):
    for package in ("grain", "tensorflow_datasets", "array_record"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('{package} is imported')\n")
    told = (
        "--dry_run --models llama --contenders t5x_lite-bf16 --rounds 1 --steps 2 --remat minimal"
    )
    path = tmp_path / "gpu.json"
    done = call(*told.split(), "--json", str(path), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no figure below says anything about speed" in done.stdout
    report = json.loads(path.read_text())
    assert report["dry_run"]
    assert report["gpu"] is None
    # Two layers of width 64, a head of 512 words: products, then norms and embeddings.
    products = 2 * (4 * 64**2 + 3 * 64 * 256) + 512 * 64
    attention = 2 * 4 * 2 * 64**2 * 64  # 2 layers, 4 rows, 2 products of 64 × 64 pairs
    flops = 3 * 2 * (4 * 64 * products + attention)
    assert report["models"]["llama"]["flops"] == flops
    run = report["models"]["llama"]["contenders"]["t5x_lite-bf16"]
    assert run["parameters"] == products + 5 * 64 + 512 * 64
    assert run["remat"] == "minimal"
    assert len(run["losses"]) == 3 + 2
    assert run["losses"][-1] < run["losses"][0]
    assert run["mfu"] == pytest.approx(flops / run["step_seconds"] / report["peak_flops"])
    assert run["tokens_per_second"] == pytest.approx(4 * 64 / run["step_seconds"])


@pytest.mark.parametrize("option", [[], ["--kernel_tests"]], ids=["benchmark", "tests"])
def test_without_a_gpu_one_line_says_how_to_run_dry(option):
    done = call(*option, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no GPU that JAX can use (")
    assert done.stderr.count("\n") == 1
    assert "--dry_run" in done.stderr
