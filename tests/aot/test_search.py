"""The search for settings: its arithmetic, its pool of compilers, and one of TPU programs."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import gin
import pytest
from rich.console import Console

from t5x_lite import cli, losses, optim, schedules
from t5x_lite.aot import pool, search
from t5x_lite.aot import topology as topologies
from t5x_lite.aot.candidates import GIB, Arithmetic, Candidate, Trial, candidates, of_run
from t5x_lite.errors import UserError
from t5x_lite.nn.presets.llama import llama
from t5x_lite.partitioning import MeshConfig
from tests import tiny_run
from tests.train import resumable

WIDE = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "hidden": 28672}


def llama_of(**shape):
    return llama("tiny", **{"vocab_size": 512, "dtype": "bfloat16"} | shape)


@pytest.fixture
def run(tmp_path):
    """Arguments of `compile_step` for a tiny model; 16 rows of 128 tokens."""
    resumable.write_corpus(tmp_path)
    return {
        "model": llama_of(width=64, layers=2, heads=4, kv_heads=2, hidden=128),
        "task": resumable.tiny_task(tmp_path),
        "batch_size": 16,
        "length": 128,
        "optimizer": optim.AdamW(schedules.constant(1e-3)),
        "loss": losses.CrossEntropy(),
        "microbatches": 1,
        "mesh": MeshConfig(),
        "rules": "fsdp",
        "pipeline_microbatches": None,
        "ema_decay": None,
    }


def report(run, mfu=0.5, total=8 * GIB, products=4):
    """Of a compiled candidate: model FLOPs 3, products as given."""
    hbm = {"total": int(total), "capacity": int(15.75 * GIB)}
    figures = {"mfu": mfu, "model_flops": 3, "matmul_flops": products, "step_seconds": 0.1}
    return {**figures, "bound": "compute", "hbm": hbm, "fits": total <= hbm["capacity"]}


def compiled(candidate, *args, **figures):
    return Trial(candidate, report(*args, **figures), compiled=True)


# --- candidates and arithmetic -------------------------------------------------------------------


def test_candidates_are_the_product_and_begin_with_what_computes_least_twice(run):
    found = list(candidates(run, None, None, None, None))
    assert len(found) == len(set(found)) == 3 * 4 * 4 * 6  # batches, remats, tables, microbatches
    assert found[0].remat == "none"
    assert {each.batch_size for each in found} == {8, 16, 32}
    assert {str(each.mesh) for each in found} > {"fsdp=-1", "fsdp=-1 × tensor=4"}
    assert of_run(run) in found
    # Of a run with another mesh, that one too; what crosses slices stays.
    other = run | {"mesh": MeshConfig(dcn_replica=2, sequence=2), "rules": "fsdp_sp"}
    found = list(candidates(other, [16], ["full"], None, [1]))
    assert of_run(other) in [dataclasses.replace(each, remat="none") for each in found]
    assert {each.mesh.dcn_replica for each in found} == {2}


def test_overrides_name_what_differs_from_the_run(run):
    candidate = Candidate(32, "full", "fsdp_tp", MeshConfig(tensor=2), 4)
    assert candidate.overrides(run) == [
        *("BATCH_SIZE=32", "MICROBATCHES=4", "REMAT='full'", "RULES='fsdp_tp'"),
        "MeshConfig.tensor=2",
    ]
    assert of_run(run).overrides(run) == []


@pytest.mark.parametrize("table", ["fsdp_tp:tensor", "fsdp:rows=4", "zero:tensor=2", "fsdp:=2"])
def test_table_that_is_none_is_refused(run, table):
    with pytest.raises(UserError, match=r"write RULES:?|no rule table 'zero'"):
        list(candidates(run, None, None, [table], None))


@functools.cache
def arithmetic(key, topology):
    """Remembers what it has estimated, of a run that is always the same one."""
    return Arithmetic(RUNS[key], topologies.find(topology))


RUNS = {}


def why(run, topology="v5e-4", trials=(), **changes):
    key = str((run["model"], run["length"]))
    RUNS.setdefault(key, run)
    return arithmetic(key, topology)(dataclasses.replace(of_run(run), **changes), list(trials))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"batch_size": 18}, "batch_size=18 doesn't divide into 1 microbatches on 4"),
        ({"microbatches": 8}, "batch_size=16 doesn't divide into 8 microbatches"),
        ({"mesh": MeshConfig(tensor=8)}, "tensor=8 asks for 8 devices"),
        ({"mesh": MeshConfig(tensor=4), "rules": "fsdp_tp"}, "kv_heads=2 doesn't divide by tensor"),
        ({"mesh": MeshConfig(tensor=2)}, "add the part 'tp'"),
    ],
)
def test_sizes_that_don_t_divide(run, changes, told):
    found = why(run, **changes)
    assert found == "" if told is None else told in found


def test_state_that_is_larger_than_the_chips(run):
    # Parameters and two moments in float32 over 16 chips: 12 bytes × 68.5e9 / 16 = 47.8 GiB.
    big = run | {"model": llama_of(**WIDE)}
    assert "the state alone takes 47.8" in why(big, "v5e-16")
    # Over 256 chips 3 GiB; a row of 128 tokens is little.
    assert why(big, "v5e-256", batch_size=256) == ""


def test_activations_far_beyond_the_chips_but_not_a_little(run):
    model = llama_of(width=1024, layers=8, heads=8, kv_heads=8, hidden=4096)
    big = run | {"model": model, "length": 4096}
    assert "by estimate" in why(big, batch_size=512)
    assert why(big, batch_size=512, microbatches=16) == ""
    # Layers' inputs: 512 × 4096 × 1024 × 2 bytes × 8 layers over four chips are 8 GiB.
    assert why(big, batch_size=512, remat="full") == ""


def test_activations_grow_with_the_rows_of_a_microbatch(run):
    """What is estimated once a row is what the estimate of whole batches says."""
    from t5x_lite.partitioning import Sharding
    from t5x_lite.train.activations import stored_bytes

    ours = Arithmetic(run, topologies.find("v5e-4"))
    sharding = Sharding(MeshConfig().abstract(4))
    shapes = run["task"].batches("train", batch_size=32, length=128, seed=0).shapes
    for parts in (1, 4):
        whole = stored_bytes(run["model"], run["loss"], shapes, sharding, parts)
        assert 32 / parts * ours._stored("none", "fsdp", MeshConfig()) == whole


def test_what_others_have_shown(run):
    own = of_run(run)
    two = dataclasses.replace(own, microbatches=2)
    assert "MICROBATCHES=1 fits already" in why(run, trials=[compiled(own, run)], microbatches=2)
    refused = [compiled(own, run, total=20 * GIB)]
    assert why(run, trials=refused, microbatches=2) == ""
    assert "BATCH_SIZE=16 doesn't fit already" in why(run, trials=refused, batch_size=32)
    assert why(run, trials=[compiled(two, run)]) == ""


def test_no_step_is_faster_than_its_products(run):
    """Three FLOPs of four are the model's: 75% at most, whatever the mesh and the batch."""
    full = dataclasses.replace(of_run(run), remat="full", batch_size=8)
    known = compiled(full, run, mfu=0.5)
    best = compiled(dataclasses.replace(full, remat="none"), run, mfu=0.76, products=3)
    assert why(run, trials=[known], remat="full") == ""
    found = why(run, trials=[known, best], remat="full")
    assert found == "at most 75.0% MFU, for what it computes twice"


# --- the pool ------------------------------------------------------------------------------------

# Stands in for the compiler: as long, as large and as successful as its batch size says.
STAND_IN = textwrap.dedent("""
    import json, os, pathlib, sys, time
    size = next((int(w.split("=")[1]) for w in sys.argv if w.startswith("--gin.BATCH_SIZE")), 16)
    (pathlib.Path(sys.argv[1]) / str(os.getpid())).touch()
    if size == 99:
        sys.exit("Traceback:\\n  File x\\nt5x_lite: error: no such thing.\\n  In call to y")
    if size == 64:
        block = b"x" * 300 * 2**20
        time.sleep(60)
    if size == 48:
        time.sleep(60)
    hbm = {"total": size * 2**30, "capacity": 33 * 2**30}
    report = {"mfu": size / 100, "model_flops": 1, "matmul_flops": 1, "hbm": hbm,
              "fits": size <= 33, "bound": "hbm", "step_seconds": 0.25}
    pathlib.Path(sys.argv[-1]).write_text(json.dumps(report))
""")


@pytest.fixture
def command(tmp_path):
    """Words that start the stand-in; each start leaves the process's number in `started`."""
    (tmp_path / "started").mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return [sys.executable, "-S", str(tmp_path / "stand_in.py"), str(tmp_path / "started")]


def alive(folder):
    """Which of the processes that were started are still there."""
    numbers = [int(path.name) for path in folder.iterdir()]
    return [number for number in numbers if os.path.exists(f"/proc/{number}")]


def found(run, command, tmp_path, batches, **options):
    console = Console(record=True, width=160)
    only = {"remats": ["none"], "tables": ["fsdp"], "microbatches": [1]}
    file = str(tmp_path / "found.json")
    result = search.search(
        run, command, "v5e-4", batches=batches, json_file=file, console=console, **only | options
    )
    assert json.loads((tmp_path / "found.json").read_text()) == result
    return result, console.export_text()


def test_best_that_fits_is_printed_as_overrides_and_the_others_with_reasons(run, command, tmp_path):
    result, text = found(run, command, tmp_path, [8, 16, 32, 40, 99, 18], workers=2)
    assert result["best"]["overrides"] == ["BATCH_SIZE=32"]
    assert result["best"]["mfu"] == 0.32
    reasons = {tuple(row["overrides"]): row["why"] for row in result["others"]}
    assert reasons[("BATCH_SIZE=8",)] == "8.0% MFU"
    assert reasons[()] == "16.0% MFU"
    assert reasons[("BATCH_SIZE=40",)] == "needs 40.00 of 33.00 GiB"
    assert "doesn't divide" in reasons[("BATCH_SIZE=18",)]
    assert "5 candidates" not in text
    assert "modelled MFU 32.0%" in text
    assert "--gin.BATCH_SIZE=32" in text
    assert "needs 40.00 of 33.00 GiB" in text
    assert "250 ms a step" in text


def test_what_a_compiler_says_is_told(run, command, tmp_path):
    stand_in = command[2]
    with open(stand_in) as file:
        failing = file.read().replace("size == 99", "size == 32")
    with open(stand_in, "w") as file:
        file.write(failing)
    result, _ = found(run, command, tmp_path, [8, 32])
    assert result["others"] == [
        {"overrides": ["BATCH_SIZE=32"], "why": "no such thing.", "compiled": True}
    ]


def test_nothing_fits(run, command, tmp_path):
    with pytest.raises(UserError, match=r"none of 2 candidates fits v5e-4; the nearest needs 7.00"):
        found(run, command, tmp_path, [40, 80])


def test_compiler_that_takes_too_much_memory_is_ended(run, command, tmp_path):
    began = time.monotonic()
    result, _ = found(run, command, tmp_path, [16, 64], worker_memory=0.1)
    assert time.monotonic() - began < 50
    assert "took 0." in result["others"][0]["why"]
    assert "GiB of this host; fewer --workers" in result["others"][0]["why"]
    assert alive(tmp_path / "started") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing_behind(run, command, tmp_path, number):
    """Ends a whole search from outside while its compilers work, and looks what is left of it."""
    before = {path.name for path in (tmp_path).iterdir()}
    script = textwrap.dedent("""
        import signal, sys, types
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
        from t5x_lite.aot import candidates, pool
        from t5x_lite.partitioning import MeshConfig
        run = {"batch_size": 16, "model": types.SimpleNamespace(remat="none"), "rules": "fsdp",
               "mesh": MeshConfig(), "microbatches": 1}
        with pool.Pool(sys.argv[1:], run, 2, 2**40) as compilers:
            for number in range(2):
                one = candidates.Candidate(48, "none", "fsdp", MeshConfig(), 1)
                compilers.start(number, candidates.Trial(one))
            print("ready", flush=True)
            while True:
                compilers.look()
    """)
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    while len(list((tmp_path / "started").iterdir())) < 2:
        time.sleep(0.05)
    assert len(alive(tmp_path / "started")) == 2
    process.send_signal(number)
    try:
        status = process.wait(30)
    finally:
        process.kill()
        process.stdout.close()
    assert status != 0
    assert alive(tmp_path / "started") == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == before | {"tmp"}


@pytest.mark.parametrize(
    ("free", "given", "expected"),
    [
        (16, (None, None), (4, 3.6)),
        (7, (None, None), (2, 3.15)),
        (1, (None, None), (1, 0.9)),
        (16, (2, None), (2, 7.2)),
        (16, (None, 8), (2, 8)),
    ],
)
def test_compilers_share_what_memory_is_free(monkeypatch, free, given, expected):
    monkeypatch.setattr(pool, "free_bytes", lambda: free * GIB)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    workers, memory = pool.share(*given)
    assert workers == expected[0]
    assert memory == pytest.approx(expected[1] * GIB)


def test_sizes_are_what_the_system_says():
    assert 10 * 2**20 < pool.resident_bytes(os.getpid()) < 2**36
    assert pool.resident_bytes(2**30) == 0


# --- the TPU's compiler --------------------------------------------------------------------------


def test_command_compiles_what_arithmetic_leaves(tpu, tmp_path, capsys, monkeypatch):
    """Two of six candidates, each by a `compile` of its own; it needs no data."""
    monkeypatch.chdir(tmp_path)
    shape = ("width=256", "layers=1", "heads=4", "kv_heads=4", "hidden=512", "dtype='bfloat16'")
    options = [f"--gin.llama.{each}" for each in shape]
    options += ["--gin.LENGTH=64", "--gin.BATCH_SIZE=8", "--topology=v5e-4", "--json=found.json"]
    options += ["--search", "--batches=8", "--remats=full", "--microbatches=1,2"]
    tables = "--tables=fsdp,fsdp_tp:tensor=2+fsdp=2,fsdp_tp:tensor=8"
    try:
        assert cli.main(["compile", *tiny_run.TINY, *options, tables]) == 0
    finally:
        gin.clear_config()
    found = json.loads((tmp_path / "found.json").read_text())
    best, others = found["best"], found["others"]
    assert best["fits"]
    assert best["overrides"][0] == "REMAT='full'"
    compiled = [row for row in others if row["compiled"]]
    assert len(compiled) == 1
    assert compiled[0]["why"].endswith("% MFU")
    left_out = [row["why"] for row in others if not row["compiled"]]
    assert len(left_out) == 4
    assert sum("MICROBATCHES=1 fits already" in why for why in left_out) == 2
    assert sum("tensor=8" in why for why in left_out) == 2
    out = capsys.readouterr().out
    assert f"modelled MFU {best['mfu']:.1%}" in out
    assert "\"--gin.REMAT='full'\"" in out
