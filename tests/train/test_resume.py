"""Run N steps = run k, kill -9, resume, run N - k: bitwise, for each family, dropout on."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tests import tiny_run

SCRIPT = pathlib.Path(__file__).with_name("resumable.py")
REPOSITORY = SCRIPT.parents[2]
FAMILIES = ["gpt2", "bert", "t5"]


def load():
    spec = importlib.util.spec_from_file_location("resumable", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(folder: pathlib.Path, *args) -> subprocess.Popen:
    # Compiled programs are shared, as a user's are: only the first run compiles its own.
    environment = os.environ | {
        "XLA_FLAGS": tiny_run.xla_flags(devices=1),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, args)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> None:
    try:
        out, error = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == code, f"{out}\n{error}"


def rows(model_dir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]


def computed(model_dir: pathlib.Path) -> list[dict]:
    """The log without what the clock says."""
    clock = {"tokens_per_second", "seconds", "data_wait", "mfu", "eval/seconds"}
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(model_dir)]


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_and_resumed_is_bitwise_uninterrupted(tmp_path, family):
    resumable = load()
    resumable.prepared_task(tmp_path)
    killed = start(tmp_path, tmp_path / "killed", family, "--kill_at", resumable.KILL_AT)
    finish(killed, code=-signal.SIGKILL)
    whole, killed = tmp_path / "whole" / family, tmp_path / "killed" / family
    steps = [row["step"] for row in rows(killed) if "loss" in row]
    assert steps[-1] >= resumable.KILL_AT - 2
    assert not (killed / "checkpoints" / str(resumable.STEPS)).exists()
    finish(start(tmp_path, tmp_path / "whole", family))
    finish(start(tmp_path, tmp_path / "killed", family))

    logged = {row["step"]: row["loss"] for row in rows(whole) if "loss" in row}
    assert list(logged) == list(range(1, resumable.STEPS + 1))
    assert len(set(logged.values())) == resumable.STEPS  # otherwise equal logs say nothing
    assert computed(killed) == computed(whole)

    records = [
        json.loads((folder / "checkpoints/8/meta/metadata").read_text())
        for folder in (whole, killed)
    ]
    assert records[0]["tensors"] == records[1]["tensors"]  # digests of every tensor's bits
    names = records[0]["tensors"]
    assert any(name.startswith("opt_state/") for name in names)
    assert any(name.startswith("ema/") for name in names) == (family == "gpt2")
