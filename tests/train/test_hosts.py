"""Two processes of four devices each are one run: of jax.distributed, over gloo, on this machine.

They compute what one process of eight devices does, to 1e-5 (sums over devices are taken in another
order), read the same batches bit for bit, take over each other's checkpoints, stop together when
one is asked to, and end when one dies.
"""

import itertools
import os
import pathlib
import pickle
import re
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

from t5x_lite import cli, distributed, folders
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train import loop
from t5x_lite.train.evaluation import rows_here
from tests import tiny_run
from tests.tiny_run import rows

SCRIPT = pathlib.Path(__file__).with_name("hosts.py")
STEPS = 6  # compared; runs go on until they are stopped
TINY = [
    *tiny_run.TINY,
    *("--gin.llama.dropout=0.1", "--gin.STEPS=10000", "--gin.BATCH_SIZE=16", "--gin.EVAL_PERIOD=3"),
    *("--gin.EVAL_BATCHES=2", "--gin.CHECKPOINT_PERIOD=3", "--gin.KEEP_EVERY=3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the data is."""
    folder = tmp_path_factory.mktemp("hosts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
        tiny_run.prepare(folder)
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


def start_two(model_dir, *options, more=((), ()), verb="train", inside=(None, None)):
    """Processes 0 and 1 of a run; not shared are the options `more` and the folders `inside`."""
    port = free_port()
    environment = os.environ | {
        "XLA_FLAGS": tiny_run.xla_flags(devices=4),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }

    def command(i):
        return [sys.executable, str(SCRIPT), f"{model_dir}.pieces{i}", verb]

    shared = [f"--model_dir={model_dir}", f"--coordinator=localhost:{port}", "--processes=2"]
    shared += TINY if verb == "train" else []
    return [
        subprocess.Popen(
            [*command(i), *shared, f"--process={i}", *options, *more[i]],
            cwd=inside[i],
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


# Gloo prints a line in pieces, which mix with those of other threads.
GLOO = (
    *("[Gloo] Rank", "is connected to", "peer ranks."),
    "Expected number of connected peer ranks is :",
)


def spoken(out):
    """What the command itself printed."""
    for piece in GLOO:
        out = out.replace(piece, "")
    return [line for line in out.splitlines() if line.strip(" 0123456789")]


@pytest.mark.parametrize(
    "text",
    [
        "[Gloo] Rank 1 is connected to 1 peer ranks. "
        "Expected number of connected peer ranks is : 1",
        "[Gloo] Rank [Gloo] Rank 01\n is connected to 1 peer ranks. 0 peer ranks. "
        "Expected number of connected peer ranks is : 0\n\nExpected number of connected peer ranks "
        "is : 1\n",
    ],
)
def test_what_gloo_says_is_not_the_command_s(text):
    assert spoken(text) == []
    assert spoken(f"{text}\nstep 3, loss 0.5\n{text}") == ["step 3, loss 0.5"]


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
    assert spoken(other_out) == []  # process 0 alone prints
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


def test_two_processes_evaluate_as_one(single, capsys):
    options = f"--model_dir={single[0]}", "--step=3"
    assert cli.main(["eval", *options]) == 0
    expected = figures(capsys.readouterr().out)
    (status, out, err), (other_status, other_out, _) = finish(
        start_two(single[0], "--step=3", verb="eval")
    )
    assert (status, other_status) == (0, 0), err
    assert len(expected) > 3
    assert figures("\n".join(spoken(out))) == pytest.approx(expected, rel=1e-4)
    assert spoken(other_out) == []


def figures(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_damage_that_one_process_alone_sees_stops_both(folder, single):
    """Process 1 reads a copy in which a file's bit is wrong, and of step 3 a whole file is gone."""
    places = [folder / "whole", folder / "damaged"]
    for place in places:
        place.mkdir()
        (place / "data").symlink_to(folder / "data")
        shutil.copytree(single[0], place / "model")
    third, sixth = (places[1] / "model" / "checkpoints" / name for name in "36")
    flipped, gone = (
        max((step / "state").rglob("*"), key=lambda path: path.stat().st_size)
        for step in (sixth, third)
    )
    data = flipped.read_bytes()
    flipped.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    gone.unlink()
    # Not listed, so that who reads its own part of the tensors is the first to find out.
    (third / folders.FILES).unlink()
    folders.list_files(third)
    for status, _, err in finish(start_two("model", verb="eval", inside=places), seconds=60):
        assert status == 2, err
        last = err.splitlines()[-1]
        assert f"step 6: {flipped.relative_to(sixth)} is not what was saved" in last
        assert re.search(r"step 3: params/[a-z/]+ cannot be read", last)


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


def test_a_signal_at_one_host_reaches_all_two_steps_later(monkeypatch):
    make, here = jax.make_array_from_callback, range(5, 8)  # the devices of this host

    def elsewhere_nothing(shape, sharding, values):
        return make(shape, sharding, lambda at: values(at) * np.int32(at[0].start in here))

    monkeypatch.setattr(jax, "make_array_from_callback", elsewhere_nothing)
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    agreement = distributed.StopAgreement(MeshConfig(fsdp=4, tensor=2).build())
    asked = [0, 0, signal.SIGTERM, signal.SIGTERM, 0, 0, 0]
    assert [agreement(int(number)) for number in asked] == [0, 0, 0, 0, 15, 15, 0]


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
    for host, numbers in enumerate(expected):
        monkeypatch.setattr(
            named,
            "addressable_devices_indices_map",
            lambda self, shape, host=host: {
                device: index
                for device, index in self.devices_indices_map(shape).items()
                if device.id // 4 == host
            },
        )
        assert list(rows_here(sharding, 16)) == list(numbers)
    assert set(itertools.chain(*expected)) == set(range(16))
