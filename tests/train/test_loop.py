"""What the loop writes, refuses and survives."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.checkpoint import Checkpointer
from t5x_lite.errors import UserError
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.partitioning import MeshConfig
from t5x_lite.train import loop, program
from t5x_lite.train.restore import restore_params

SCRIPT = pathlib.Path(__file__).with_name("resumable.py")
SPEC = importlib.util.spec_from_file_location("resumable", SCRIPT)
resumable = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(resumable)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    resumable.prepared_task(folder)
    return folder


@pytest.fixture
def arguments(data_dir, tmp_path):
    """A run on eight devices; tests change what they are about."""
    return resumable.arguments(data_dir, tmp_path, "gpt2") | {"microbatches": 1}


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A run that is done, with its directory."""
    arguments = resumable.arguments(data_dir, tmp_path_factory.mktemp("run"), "gpt2")
    arguments |= {"microbatches": 1, "steps": 4, "config_text": "STEPS = 4\n"}
    loop.train(**arguments)
    return arguments


def rows(arguments):
    path = pathlib.Path(arguments["model_dir"]) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_has_the_promised_keys(finished):
    train = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in train] == [1, 2, 3, 4]
    promised = {"step", "loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_second"}
    assert promised | {"mfu", "data_wait", "seconds"} <= set(train[0])
    held_out = [row for row in rows(finished) if "eval/loss" in row]
    assert [row["step"] for row in held_out] == [4]
    # Untrained, a model of 363 ids guesses: log 363 = 5.9 nats.
    assert train[0]["loss"] == pytest.approx(np.log(363), abs=0.1)


def test_record_beside_the_checkpoints(finished):
    directory = pathlib.Path(finished["model_dir"])
    assert (directory / "config.gin").read_text() == "STEPS = 4\n"
    table = (directory / "parameters.txt").read_text()
    assert "decoder/layers/attention/query/kernel" in table
    assert table.splitlines()[-1].startswith("total parameters: ")
    versions = json.loads((directory / "environment.json").read_text())
    assert versions["packages"]["jax"]
    assert versions["devices"] == 8


def test_run_that_is_done_says_so_and_changes_nothing(finished, capsys):
    before = rows(finished)
    loop.train(**finished)
    assert "done" in capsys.readouterr().out
    assert rows(finished) == before


def test_average_is_what_is_served(finished):
    served, step = restore_params(finished["model"], finished["model_dir"])
    assert step == 4
    directory = pathlib.Path(finished["model_dir"]) / "checkpoints"
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), served
    )
    with Checkpointer(directory, read_only=True) as checkpoints:
        stored = checkpoints.restore({"params": like, "ema": like}, partial=True).tree
    scale = ["decoder", "final_norm", "scale"]
    assert np.array_equal(leaf(served, scale), leaf(stored["ema"], scale))
    assert not np.array_equal(leaf(served, scale), leaf(stored["params"], scale))


def leaf(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, r"batch_size=12 doesn't divide .* 8 data-parallel devices"),
        ({"microbatches": 3}, r"batch_size=8 doesn't divide into 3 microbatches"),
        ({"steps": 0}, r"STEPS=0 must be at least 1"),
        ({"log_period": 0}, r"LOG_PERIOD=0"),
        ({"mesh": MeshConfig(tensor=3)}, r"mesh .*tensor=3 .* 8"),
        ({"rules": "zero"}, r"no rule table 'zero': .* parts dp, fsdp"),
        ({"length": 2000}, r"length=2000 exceeds the model's 1024 learned positions"),
        ({"model": resumable.tiny_model("bert")}, r"CausalLM is for decoder-only models"),
        ({"model": resumable.tiny_model("gpt2", vocab_size=300)}, r"vocabulary has 363 ids .* 300"),
    ],
)
def test_refuses_before_anything_is_written(arguments, change, message):
    with pytest.raises(UserError, match=message):
        loop.train(**arguments | change)
    assert not pathlib.Path(arguments["model_dir"]).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": gpt2("tiny", vocab_size=400)},
            r"holds another run \(model\.vocab_size: 363 → 400",
        ),
        ({"seed": 4}, r"seed: 3 → 4"),
        (
            {"length": 16},
            r"trained on other data \(data\.sides\.tokens: 32 → 16.*--allow_data_change",
        ),
        ({"ema_decay": None}, r"ema: True → False"),
    ],
)
def test_refuses_to_resume_another_run(finished, change, message):
    before = rows(finished)
    with pytest.raises(UserError, match=message):
        loop.train(**finished | {"steps": 8} | change)
    assert rows(finished) == before


def test_compilation_may_change_between_runs(finished, tmp_path, capsys):
    unrolled = dataclasses.replace(finished["model"], scan=False, remat="full")
    loop.train(**finished | {"model": unrolled})
    assert "done" in capsys.readouterr().out


@pytest.fixture
def idle_step(monkeypatch):
    """A step that only counts, and whose loss is the value that the test sets; compiles fast."""
    loss = {"value": 1.0}

    def make(*_, **__):
        def step(state, batch, rng):
            metrics = {"loss": jnp.float32(loss["value"]) + 0 * jnp.sum(batch["weights"])}
            return state.replace(step=state.step + 1), metrics

        return step

    monkeypatch.setattr(program, "make_train_step", make)
    return loss


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_loss_that_is_not_finite_stops_the_run(arguments, idle_step, value):
    idle_step["value"] = value
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d; lower LEARNING_RATE"):
        loop.train(**arguments | {"checkpoint_period": 1, "eval_period": None})
    # Nothing that came of it has been saved.
    assert not list((pathlib.Path(arguments["model_dir"]) / "checkpoints").glob("[0-9]*"))


def recorded(patch):
    """The rows that runs are given from now on."""
    seen, iterate = [], loop.iterate

    def recording(batches, start=0, **rows):
        for batch in iterate(batches, start, **rows):
            seen.extend(batch["tokens"])
            yield batch

    patch.setattr(loop, "iterate", recording)
    return seen


def test_a_changed_batch_goes_on_at_the_very_next_row(arguments, idle_step, monkeypatch, capsys):
    arguments |= {"checkpoint_period": 1, "eval_period": None}
    task = arguments["task"]
    steady = task.batches(batch_size=8, length=32, seed=3)
    expected = np.concatenate([steady[step]["tokens"] for step in range(14)])
    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", lambda x: x)  # a batch read ahead is a row too many
        seen = recorded(patch)
        loop.train(**arguments | {"steps": 3})
        assert len(seen) == 24
        changed = {"steps": 5, "batch_size": 16, "allow_data_change": True}
        loop.train(**arguments | changed)
        # From then on it is the same run: what was allowed once is remembered.
        loop.train(**arguments | changed | {"steps": 6, "allow_data_change": False})
    np.testing.assert_array_equal(seen, expected[: 3 * 8 + 3 * 16])
    assert "data.batch_size: 8 → 16" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"batch_size: 16 → 8"):
        loop.train(**arguments | {"steps": 7})


def test_a_changed_length_goes_on_as_far_into_the_epoch(arguments, idle_step, monkeypatch):
    arguments |= {"checkpoint_period": None, "eval_period": None}
    task = arguments["task"]
    before, after = (task.batches(batch_size=8, length=n, seed=3) for n in (32, 16))
    with monkeypatch.context() as patch:
        seen = recorded(patch)
        loop.train(**arguments | {"steps": 20})
        del seen[:]
        loop.train(**arguments | {"steps": 21, "length": 16, "allow_data_change": True})
    epoch, row = divmod(20 * 8, before.rows_per_epoch)
    share = row / before.rows_per_epoch
    start = (epoch + share) * after.rows_per_epoch
    np.testing.assert_array_equal(seen[0], after.row(math.ceil(start))["tokens"][:16])


def test_sigterm_saves_and_the_same_command_resumes(arguments, idle_step, monkeypatch):
    iterate = loop.iterate

    def signalled(batches, start=0, **rows):
        for number, batch in enumerate(iterate(batches, start, **rows), start + 1):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    arguments |= {"checkpoint_period": None, "eval_period": None}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "iterate", signalled)
        with pytest.raises(SystemExit) as stop:
            loop.train(**arguments)
    assert stop.value.code == 143
    assert rows(arguments)[-1]["step"] == 3
    loop.train(**arguments | {"steps": 5})
    assert [row["step"] for row in rows(arguments) if "loss" in row] == [1, 2, 3, 4, 5]
