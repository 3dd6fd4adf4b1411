"""Two processes of four devices each are one run: of jax.distributed, over gloo, on this machine.

They compute what one process of eight devices does, to 1e-5 (sums over devices are taken in another
order), read the same batches bit for bit, take over each other's checkpoints, stop together when
one is asked to, and end when one dies.
"""

import itertools
import json
import os
import pathlib
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time

import gin
import jax
import numpy as np
import pytest

from t5x_lite import cli, distributed
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train import loop
from t5x_lite.train.evaluation import rows_here

SCRIPT = pathlib.Path(__file__).with_name("hosts.py")
STEPS = 6  # compared; runs go on until they are stopped
TINY = [
    "--gin_file=runs/pretrain_llama.gin",
    "--gin.TEXT='text.txt'",
    "--gin.VOCABULARY=@vocabularies.Bytes()",
    "--gin.VOCAB_SIZE=363",
    *(
        f"--gin.llama.{name}"
        for name in ("width=16", "layers=1", "heads=2", "kv_heads=1", "hidden=16", "dropout=0.1")
    ),
    *("--gin.STEPS=10000", "--gin.BATCH_SIZE=16", "--gin.LENGTH=16", "--gin.WARMUP_STEPS=1"),
    *("--gin.EVAL_PERIOD=3", "--gin.EVAL_BATCHES=2", "--gin.CHECKPOINT_PERIOD=3"),
    *("--gin.LOG_PERIOD=1", "--gin.PEAK_FLOPS=1e9", "--gin.KEEP_EVERY=3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the data is."""
    folder = tmp_path_factory.mktemp("hosts")
    lines = (f"{a} and {b} are {a + b}.\n\n" for a in range(20) for b in range(20))
    (folder / "text.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
        assert cli.main(["data", "prepare", *TINY]) == 0
        yield folder
    gin.clear_config()


@pytest.fixture(scope="module")
def single(folder):
    """(model directory, batches) of one process with eight devices."""
    return folder / "single", train_here(folder / "single")


def train_here(model_dir):
    """Trains to step STEPS, as one process; gives the batches that it read."""
    seen, iterate = [], loop.iterate

    def stopping(batches, start=0, **rows):
        for number, batch in enumerate(iterate(batches, start, **rows), start + 1):
            seen.append(batch)
            if number == STEPS:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "iterate", stopping)
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *TINY, f"--model_dir={model_dir}"])
    assert stop.value.code == 128 + signal.SIGTERM
    return seen


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_two(model_dir, *options, more=((), ())):
    """Processes 0 and 1 of a run; `more` are options that they don't share."""
    port = free_port()
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }

    def command(i):
        return [sys.executable, str(SCRIPT), f"{model_dir}.pieces{i}", "train"]

    shared = [f"--model_dir={model_dir}", f"--coordinator=localhost:{port}", "--processes=2"]
    return [
        subprocess.Popen(
            [*command(i), *TINY, *shared, f"--process={i}", *options, *more[i]],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def finish(processes, seconds=200):
    """[(exit status, stdout, stderr)] of each, which must end by itself."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [p.communicate(timeout=deadline - time.monotonic()) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def rows(model_dir):
    path = model_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_step(processes, model_dir, step):
    deadline = time.monotonic() + 300  # of a busy machine
    while not any(row["step"] > step for row in rows(model_dir)):
        if any(p.poll() is not None for p in processes) or time.monotonic() > deadline:
            pytest.fail(str(finish(processes)))
        time.sleep(0.05)


def losses(model_dir):
    """{(name, step): loss} of the steps that are compared."""
    found = {
        (name, row["step"]): row[name]
        for row in rows(model_dir)
        for name in ("loss", "eval/loss")
        if name in row and row["step"] <= STEPS
    }
    assert [step for name, step in found if name == "loss"] == list(range(1, STEPS + 1))
    assert len(set(found.values())) == len(found)
    return found


def assert_same_losses(one, other):
    one, other = losses(one), losses(other)
    assert one == pytest.approx(other, rel=1e-5)


def copy_at_step_3(source, target):
    """The run as it was after three steps."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if path.name != "3":
            shutil.rmtree(path)


def assert_same_batches(model_dir, expected):
    """The pieces that the devices of both processes got are, put together, the whole batches."""
    hosts = [pickle.loads(pathlib.Path(f"{model_dir}.pieces{i}").read_bytes()) for i in range(2)]
    for batch, one, other in zip(expected[:3], *hosts, strict=True):
        assert one.keys() == other.keys() == batch.keys()
        for name, values in batch.items():
            whole = np.full_like(values, -1)
            for index, piece in [*one[name], *other[name]]:
                assert piece.dtype == values.dtype
                whole[index] = piece
            np.testing.assert_array_equal(whole, values)
            assert (one[name][0][1].size * 8) == values.size  # nobody got more than its part


def test_two_processes_train_as_one_and_stop_together(folder, single):
    processes = start_two(folder / "two")
    wait_for_step(processes, folder / "two", STEPS)
    processes[1].send_signal(signal.SIGTERM)
    (status, out, _), (other_status, other_out, _) = finish(processes)
    assert (status, other_status) == (143, 143)
    assert "2 processes" in out
    assert "stopped and saved at step" in out
    spoken = [line for line in other_out.splitlines() if not line.startswith("[Gloo]")]
    assert spoken == []  # process 0 alone prints
    last = rows(folder / "two")[-1]["step"]
    assert (folder / "two" / "checkpoints" / str(last) / "commit_success.txt").exists()
    assert_same_losses(folder / "two", single[0])
    assert_same_batches(folder / "two", single[1])
    # One process goes on with what two have saved.
    copy_at_step_3(folder / "two", folder / "two_then_one")
    train_here(folder / "two_then_one")
    assert_same_losses(folder / "two_then_one", single[0])


def test_two_processes_resume_what_one_saved_and_end_when_one_dies(folder, single):
    model_dir = folder / "one_then_two"
    copy_at_step_3(single[0], model_dir)
    # Rows over all of the devices before; now each process has a part of every row.
    across = ["--gin.MeshConfig.fsdp=1", "--gin.MeshConfig.sequence=8", "--gin.RULES='fsdp_sp'"]
    processes = start_two(model_dir, *across)
    wait_for_step(processes, model_dir, STEPS)
    processes[1].kill()
    (status, out, err), _ = finish(processes, seconds=30)
    assert status == 1
    assert "resuming at step 3" in out
    assert "error: process 1 on " in err
    assert "died; process 0 stops too" in err
    assert_same_losses(model_dir, single[0])
    assert_same_batches(model_dir, single[1][3:])


def test_different_gin_files_stop_both_with_the_difference(folder):
    more = ((), ("--gin.LEARNING_RATE=0.5",))
    for status, _, err in finish(start_two(folder / "differ", more=more)):
        assert status == 2
        assert "processes 0 and 1 differ in their configuration" in err
        assert "process 1 has 'LEARNING_RATE = 0.5'" in err
        assert err.count("\n") == 1
    assert not (folder / "differ").exists()


def test_a_coordinator_that_cannot_be_reached_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "PATIENCE", 0.5)
    address = f"localhost:{free_port()}"
    alone = [f"--coordinator={address}", "--processes=2", "--model_dir=never"]
    assert cli.main(["train", *TINY, *alone, "--process=1"]) == 2
    err = capsys.readouterr().err
    assert f"process 1 cannot reach the coordinator at {address}" in err
    assert err.count("\n") == 1
    assert cli.main(["train", *TINY, *alone, "--process=0"]) == 2
    assert f"of 2 processes, 1 didn't come to process 0 at {address}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "stride", "expected"),
    [
        ({"fsdp": 8}, 1, [range(8), range(8, 16)]),
        ({"fsdp": 8}, 2, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]),
        ({"fsdp": 2, "tensor": 4}, 1, [range(8), range(8, 16)]),
        ({"fsdp": 4, "tensor": 2}, 2, [range(16), range(16)]),  # tensor goes across hosts
    ],
)
def test_the_mesh_says_which_rows_a_host_needs(monkeypatch, sizes, stride, expected):
    devices = np.asarray(jax.devices()).reshape(stride, -1).T.ravel()
    mesh = MeshConfig(**sizes).build(list(devices))
    mesh = jax.sharding.Mesh(devices.reshape(mesh.devices.shape), mesh.axis_names)
    sharding = Sharding(mesh, "fsdp_tp")
    named = type(sharding.replicated())
    for host, rows in enumerate(expected):
        monkeypatch.setattr(
            named,
            "addressable_devices_indices_map",
            lambda self, shape, host=host: {
                device: index
                for device, index in self.devices_indices_map(shape).items()
                if device.id // 4 == host
            },
        )
        assert list(rows_here(sharding, 16)) == list(rows)
    assert set(itertools.chain(*expected)) == set(range(16))
