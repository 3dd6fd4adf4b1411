"""Executables in files: a run that loads its step computes what a run that compiles it does."""

import json
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from t5x_lite import losses, optim, schedules
from t5x_lite.aot.compile import compile_step
from t5x_lite.errors import UserError
from t5x_lite.partitioning import MESH_AXES, MeshConfig, Sharding
from t5x_lite.train import executable, loop
from t5x_lite.train.program import Program, train_program
from tests.train import resumable

RATE = schedules.constant(1e-2)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A run of three steps on eight devices."""
    folder = tmp_path_factory.mktemp("run")
    arguments = resumable.arguments(folder, folder, "gpt2")
    changes = {"microbatches": 1, "steps": 3, "eval_period": None, "checkpoint_period": None}
    return arguments | changes


def program_of(arguments, **changes):
    arguments = arguments | changes
    shapes = arguments["task"].batches("train", batch_size=8, length=32, seed=3).shapes
    return train_program(
        *(arguments["model"], arguments["optimizer"], losses.CrossEntropy()),
        *(Sharding(MeshConfig().build()), shapes),
        **{name: arguments[name] for name in ("microbatches", "ema_decay")},
    )


@pytest.fixture(scope="module")
def lowered(arguments):
    """Its program, as `load` wants it."""
    program = program_of(arguments)
    return program, program.lower()


@pytest.fixture(scope="module")
def file(arguments, tmp_path_factory):
    """The executable of its step, as `compile` stores it."""
    path = tmp_path_factory.mktemp("executable") / "step.bin"
    names = ("model", "task", "batch_size", "length", "optimizer", "microbatches", "ema_decay")
    run = {name: arguments[name] for name in names}
    compile_step(**run, topology="here", save=str(path))
    assert [each.name for each in path.parent.iterdir()] == ["step.bin"]
    return path


def trained(arguments, model_dir, **options):
    """The losses and gradient norms of the run, and the programs that it compiled."""
    compiled = []

    def listen(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loop.train(**arguments | {"model_dir": str(model_dir)} | options)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    rows = map(json.loads, (pathlib.Path(model_dir) / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows], compiled


STEP = "jit(train_step)"


def test_loaded_step_gives_the_same_bits_and_isn_t_compiled(arguments, file, tmp_path, capsys):
    plain, compiled = trained(arguments, tmp_path / "plain")
    assert compiled.count(STEP) == 1
    assert "to compile (" in capsys.readouterr().out
    loaded, compiled = trained(arguments, tmp_path / "loaded", executable=str(file))
    assert STEP not in compiled
    out = capsys.readouterr().out
    assert f"running {file}, compiled by jax {jax.__version__}" in out
    assert "to load the executable" in out
    assert len(set(plain)) == 3
    assert loaded == plain


def test_step_of_another_run_is_compiled_and_the_difference_told(arguments, file, tmp_path, capsys):
    _, compiled = trained(
        arguments | {"ema_decay": 0.5, "steps": 1}, tmp_path, executable=str(file)
    )
    assert STEP in compiled
    out = capsys.readouterr().out
    assert f"{file} is of another program (ema_decay: 0.9 → 0.5): compiling instead" in out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": resumable.tiny_model("gpt2", width=32)}, "model.width: 16 → 32"),
        ({"optimizer": optim.AdamW(RATE, b1=0.5)}, "optimizer.b1: 0.9 → 0.5"),
        # Schedules are functions, alike to whoever only looks at their names.
        ({"optimizer": optim.AdamW(schedules.cosine(2e-2, 8, 2))}, "such as a schedule's"),
    ],
)
def test_whatever_shapes_the_program_is_told(arguments, file, change, told):
    program = program_of(arguments, **change)
    compiled, line = executable.load(executable.read(file), program, program.lower())
    assert compiled is None
    assert told in line
    assert line.count("\n") == 0


def rewritten(file, path, **changes):
    """The file with another fingerprint."""
    magic, header, payload = file.read_bytes().split(b"\n", 2)
    header = json.loads(header)
    header["fingerprint"] |= changes
    path.write_bytes(b"\n".join([magic, json.dumps(header).encode(), payload]))
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"jax": "0.9.0"}, f"jax: 0.9.0 → {jax.__version__}"),
        ({"devices": "4 × TPU v5 lite"}, "devices: 4 × TPU v5 lite → 8 × cpu"),
        ({"backend": "x86_64 abc"}, "backend: x86_64 abc → "),
        ({"flags": {"XLA_FLAGS": ["--xla_foo=1"]}}, "XLA_FLAGS: ['--xla_foo=1'] → ["),
    ],
)
def test_another_jax_backend_or_flag_is_told(lowered, file, tmp_path, change, told):
    other = rewritten(file, tmp_path / "other", **change)
    compiled, line = executable.load(executable.read(other), *lowered)
    assert compiled is None
    assert told in line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"topology": "here"}, "--topology here needs --save FILE"),
        ({"topology": "here", "verb": "eval", "save": "x"}, "--save stores training steps, not"),
    ],
)
def test_what_compile_stores_nothing_of_is_refused(arguments, options, told):
    names = ("model", "task", "batch_size", "length", "optimizer")
    with pytest.raises(UserError, match=told):
        compile_step(**{name: arguments[name] for name in names} | options)


@pytest.fixture
def damaged(file, tmp_path):
    """One bit of the code is another."""
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    return tmp_path / "damaged"


def test_damaged_file_is_refused_before_anything_is_written(arguments, damaged, tmp_path):
    with pytest.raises(UserError, match=r"damaged \(its checksum differs\): write it again"):
        trained(arguments, tmp_path / "model", executable=str(damaged))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("content", [b"", b"junk", executable.MAGIC + b"[]\n", None])
def test_what_is_no_executable_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    match = "No such file" if content is None else "no file that `t5x_lite compile --save`"
    with pytest.raises(UserError, match=f"--executable .*{match}"):
        executable.read(tmp_path / "file")


def test_devices_in_another_order(tmp_path):
    """Four of eight devices, backwards: each part of an array must reach the device meant."""
    axes = (AxisType.Auto,) * len(MESH_AXES)
    grid = np.asarray(jax.devices()[5:1:-1]).reshape(1, 4, 1, 1, 1, 1)
    sharding = Sharding(Mesh(grid, MESH_AXES, axis_types=axes))
    where = sharding.batch((4, 8))

    shape = jax.ShapeDtypeStruct((4, 8), np.float32, sharding=where)
    program = Program(jax.jit(lambda x: x * x[::-1]), (shape,))
    lowered = program.lower()
    executable.save(tmp_path / "square", program, lowered, lowered.compile())
    loaded, _ = executable.load(executable.read(tmp_path / "square"), program, lowered)
    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    np.testing.assert_array_equal(loaded(jax.device_put(x, where)), x * x[::-1])
