"""Sweeps: what a grid expands to, what a pool does with its runs, and one sweep from end to end."""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import gin
import pytest
from rich.console import Console

from t5x_lite import cli
from t5x_lite.errors import UserError
from t5x_lite.scaling import execute, points, pool, prediction, records, run, sweep, trunk
from t5x_lite.scaling.pool import DONE, FAILED, STOPPED, Job
from t5x_lite.scaling.sweep import Run, Sweep
from tests import tiny_run

FACTS = {"family": "decoder-only", "n_total": 12, "n_non_embedding": 8, "n_active": 12,
         "batch_size": 2, "batch_tokens": 8, "length": 4, "steps": 10, "step_flops": 480,
         "d": 80, "c": 4800, "n": 10.0, "learning_rate": 0.1, "optimizer": "AdamW",
         "schedule": "cosine", "seed": 0}  # fmt: skip


def a_run(name="a", held_out=False, config="STEPS = 10\n", **facts):
    return Run(name, {"STEPS": 10}, held_out, config, FACTS | facts, kin="k")


# --- grids ---


def test_every_point_meets_every_combination_of_the_axes():
    points = [{"WIDTH": 16, "name": "small"}, {"WIDTH": 32, "name": "large"}]
    grid = Sweep("s", points, {"SEED": [0, 1], "AdamW.b2": [0.9]}, held_out=[{"WIDTH": 64}])
    assert [(name, values) for name, values, held_out in grid.runs() if not held_out] == [
        (f"{name}-seed{seed}-b20.9", {"WIDTH": width, "SEED": seed, "AdamW.b2": 0.9})
        for name, width in (("small", 16), ("large", 32))
        for seed in (0, 1)
    ]
    assert list(grid.runs())[-1] == ("width64", {"WIDTH": 64}, True)


def test_values_are_written_as_gin_reads_them():
    values = {"A": "x", "B": "@optim.AdamW()", "C": None, "D": [1, 2.5], "E": "%F"}
    assert sweep.overrides(values) == ["A='x'", "B=@optim.AdamW()", "C=None", "D=[1, 2.5]", "E=%F"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"points": []}, "no points"),
        ({"axes": {"SEED": []}}, "axis SEED"),
        ({"axes": {"SEED": 3}}, "axis SEED"),
        ({"points": [{"SEED": 1}], "axes": {"SEED": [1]}}, "an axis of sweep s and in its points"),
        ({"points": [{"A": 1}, {"A": 1}]}, r"twice \(A=1\): .* SEED"),
        ({"points": [{"A": 1}], "held_out": [{"A": 1}]}, "twice"),
        ({"points": [{"A": 1, "name": "x"}, {"A": 2, "name": "x"}]}, "two runs named x"),
        ({"points": [{"A": 1, "name": "a/b"}]}, "can't be named"),
    ],
)
def test_grids_that_make_no_sense_are_refused(options, why):
    with pytest.raises(UserError, match=why):
        Sweep("s", **options)


def test_runs_that_come_out_the_same_are_refused():
    with pytest.raises(UserError, match="runs a1 and a2 of sweep s come out the same"):
        sweep.plan(
            Sweep("s", [{"A": 1}, {"A": 2}]), lambda lines: ("text", {}), lambda *_: (FACTS, "k")
        )


# --- the folder ---


def test_a_folder_knows_its_sweep_and_shows_what_differs(tmp_path):
    grid = Sweep("s")
    sweep.write(grid, [a_run("a"), a_run("b", config="STEPS = 20\n")], tmp_path / "s")
    name, runs = sweep.read(tmp_path / "s")
    assert (name, runs[1]) == ("s", a_run("b", config="STEPS = 20\n"))
    # it may grow
    more = [a_run("a"), a_run("b", config="STEPS = 20\n"), a_run("c", config="C = 1\n")]
    sweep.write(grid, more, tmp_path / "s")
    with pytest.raises(UserError, match="run b had STEPS = 20, and now has STEPS = 30"):
        sweep.write(grid, [a_run("a"), a_run("b", config="STEPS = 30\n"), more[2]], tmp_path / "s")
    with pytest.raises(UserError, match=r"another sweep \(s\): 1 of its 3 runs .* b for one"):
        sweep.write(grid, [more[0], more[2]], tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        sweep.write(grid, more, tmp_path / "other")
    with pytest.raises(UserError, match="holds no sweep"):
        sweep.read(tmp_path / "none")


def log(out, run, *rows):
    folder = out / sweep.RUNS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_have_sizes_by_every_convention_and_the_time_of_all_starts(tmp_path):
    run, other = a_run(), a_run("b", held_out=True)
    log(tmp_path, run, {"step": 1, "loss": 5.0, "seconds": 3.0}, {"step": 5, "eval/loss": 4.0},
        {"step": 6, "loss": 3.5, "seconds": 2.0}, {"step": 10, "loss": 3.2, "seconds": 9.0},
        {"step": 10, "eval/loss": 3.0})  # fmt: skip
    log(tmp_path, other, {"step": 10, "eval/loss": 2.5})
    assert records.collect(tmp_path, [run, other]) == {"runs.jsonl": 2, "held_out.jsonl": 1}
    early, last = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert (early["final"], early["d"], early["c"], early["loss"]) == (False, 40, 2400, 4.0)
    assert (last["final"], last["d"], last["c"], last["loss"]) == (True, 80, 4800, 3.0)
    assert last["c"] == 6 * last["n"] * last["d"]
    assert (early["seconds"], last["seconds"]) == (3.0, 12.0)
    assert last["gin_hash"] == run.gin_hash
    assert records.is_finished(tmp_path, run)
    assert not records.is_finished(tmp_path, a_run("b", steps=20))


# --- trunks ---


def flat(steps, decay):
    """A constant rate, then none: a schedule of steps."""
    import numpy as np

    return lambda step: np.where(np.asarray(step) < steps - decay, 1.0, 0.0)


def trunk_run(name, steps, period, decay):
    optimizer = type("Optimizer", (), {"schedule": staticmethod(flat(steps, decay))})
    arguments = {"steps": steps, "checkpoint_period": period, "optimizer": optimizer}
    return name, {"STEPS": steps, "CHECKPOINT_PERIOD": period, "WIDTH": 8}, arguments


def test_a_longer_run_begins_where_the_shorter_one_cools_down():
    runs = [trunk_run("b", 20, 16, 4), trunk_run("a", 10, 8, 2), trunk_run("c", 40, 32, 8)]
    assert trunk.starts(runs) == {"b": ("a", 8), "c": ("b", 16)}
    with pytest.raises(UserError, match="at step 8 their rates are 0 and 1"):
        trunk.starts([trunk_run("a", 10, 9, 2), trunk_run("b", 20, 16, 4)])
    with pytest.raises(UserError, match="saves nothing before its end"):
        trunk.starts([trunk_run("a", 10, 10, 2), trunk_run("b", 20, 16, 4)])


# --- the pool ---


def job(tmp_path, name, code="", **options):
    return Job(name, [sys.executable, "-c", code], tmp_path / f"{name}.log", **options)


def go(jobs, **options):
    return pool.run(jobs, environment=os.environ, **{"workers": 2} | options)


def test_a_failure_is_tried_again_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_PAUSE", 0.01)
    flaky = f"import pathlib; p = pathlib.Path({str(tmp_path / 'x')!r}); " \
            "e = p.exists(); p.touch(); raise SystemExit(0 if e else 'once')"  # fmt: skip
    jobs = [
        job(tmp_path, "flaky", flaky),
        job(tmp_path, "never", "raise SystemExit('out of luck')"),
        job(tmp_path, "refused", "import sys; print('error: mend it'); sys.exit(2)"),
        job(tmp_path, "after", after="never"),
        job(tmp_path, "fine", after="flaky"),
        job(tmp_path, "old", "raise SystemExit('was done')", state=DONE),
    ]
    assert go(jobs, retries=1) == 0
    assert {j.name: (j.state, j.tries) for j in jobs} == {
        "flaky": (DONE, 2), "never": (FAILED, 2), "refused": (FAILED, 1), "after": (FAILED, 0),
        "fine": (DONE, 1), "old": (DONE, 0),
    }  # fmt: skip
    assert (jobs[1].why, jobs[2].why) == ("out of luck", "error: mend it")


def test_the_first_of_a_kin_compiles_alone_and_the_longest_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_PAUSE", 0.01)
    compiled, order = [], []
    jobs = [
        job(tmp_path, name, cost=cost, kin=kin, has_compiled=lambda: bool(compiled),
            prepare=lambda name=name: order.append(name))
        for name, cost, kin in (("a", 1, "k"), ("b", 3, "k"), ("c", 2, "other"))
    ]  # fmt: skip
    running = []

    def watch():
        running.append({j.name for j in jobs if j.state == pool.RUNNING})
        if len(running) > 2:
            compiled.append(True)

    go(jobs, watch=watch, workers=3)
    assert running[0] == {"b", "c"}, "not the kin of one that compiles"
    assert order == ["b", "c", "a"], "the longest first"


def test_a_signal_stops_the_jobs_and_waits_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_PAUSE", 0.01)
    code = "import signal, sys, time; signal.signal(15, lambda *_: (print('saved', flush=True), " \
           "sys.exit(143))); print('ready', flush=True); time.sleep(60)"  # fmt: skip
    jobs = [job(tmp_path, "long", code), job(tmp_path, "next", cost=-1.0)]

    def watch():
        if "ready" in (tmp_path / "long.log").read_text() and jobs[0].state == pool.RUNNING:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert go(jobs, watch=watch, workers=1) == signal.SIGINT
    assert [j.state for j in jobs] == [STOPPED, pool.WAITING]
    assert (tmp_path / "long.log").read_text().split() == ["ready", "saved"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_stops_everything_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "LEAST_FREE", 2**63)
    with pytest.raises(UserError, match=r"is full .* bad stopped: free some space"):
        go([job(tmp_path, "bad", "raise SystemExit('no space')", cost=1.0), job(tmp_path, "b")],
           workers=1)  # fmt: skip


def test_a_folder_is_locked_while_a_child_of_its_pool_lives(tmp_path):
    with pool.locked(tmp_path):
        words = [sys.executable, "-c", "print(flush=True); input()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        child = subprocess.Popen(words, **pipes, close_fds=False)
        child.stdout.readline()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), pool.locked(tmp_path):
        pass
    child.communicate(b"\n")
    with pool.locked(tmp_path):
        pass


def test_another_launcher_gets_what_train_gets(tmp_path):
    words = execute.command(a_run(), tmp_path, "bash launch/gke_xpk.sh --workload w-{name} --")
    assert words[:5] == ["bash", "launch/gke_xpk.sh", "--workload", "w-a", "--"]
    options = ["--gin_file", f"{tmp_path}/configs/a.gin", "--model_dir", f"{tmp_path}/runs/a"]
    assert words[5:] == options


def test_a_slurm_array_runs_what_is_not_finished(tmp_path):
    runs = [a_run(name, config=f"A = '{name}'\n") for name in ("a", "b", "c")]
    log(tmp_path / "out", runs[1], {"step": 10, "eval/loss": 3.0})
    said = io.StringIO()
    with pytest.raises(UserError, match="not empty and holds no sweep"):
        run.run(Sweep("s"), runs, str(tmp_path / "out"), slurm=True, console=Console(file=said))
    (tmp_path / "out/sweep.json").write_text('{"name": "s", "runs": []}')
    console = Console(file=said, width=300)
    assert run.run(Sweep("s"), runs, str(tmp_path / "out"), slurm=True, console=console) == 0
    command = shlex.split(said.getvalue().splitlines()[0])
    assert command[:3] == ["sbatch", "--array=0-1", "launch/sweep.sbatch"]
    script = cli.CONFIGS.parent / "launch" / "sweep.sbatch"
    done = subprocess.run(
        ["bash", script, "--dry_run", *command[3:]], capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "1"},
    )  # fmt: skip
    words = shlex.split(done.stdout)
    assert words[-4:] == ["--gin_file", f"{tmp_path}/out/configs/c.gin",
                          "--model_dir", f"{tmp_path}/out/runs/c"]  # fmt: skip
    shared = dataclasses.replace(runs[2], after=("a", 8))
    with pytest.raises(UserError, match="runs of a trunk follow each other"):
        run.run(Sweep("s"), [*runs[:2], shared], str(tmp_path / "out"), slurm=True, console=console)


# --- held-out runs ---


def test_what_is_held_out_is_predicted_before_it_is_run(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    law = lambda n, d: 1.8 + 480 / n**0.35 + 2100 / d**0.37  # noqa: E731
    runs = []
    for k, (n, d) in enumerate((n, n * r) for n in (1e6, 4e6, 2e7, 8e7) for r in (3, 10, 30, 100)):
        run = a_run(f"r{k}", config=f"K = {k}\n", n=n, batch_tokens=d / 10, step_flops=0.6 * n * d)
        log(tmp_path, run, {"step": 10, "eval/loss": law(n, d) * np.exp(3e-3 * rng.normal())})
        runs.append(run)
    held_out = a_run("big", True, n=2e8, d=2e10)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(UserError, match="1 of the 17 runs"):
        prediction.write_down(tmp_path, [*runs, a_run("late"), held_out], console)
    prediction.write_down(tmp_path, [*runs, held_out], console)
    (one,) = prediction.read(tmp_path).values()
    low, high = one["interval"]
    assert one["loss"] == pytest.approx(law(2e8, 2e10), rel=0.02)
    assert low < law(2e8, 2e10) < high
    assert one["times"] == pytest.approx(2e8 * 2e10 / (8e7 * 8e9))
    log(tmp_path, held_out, {"step": 10, "eval/loss": 2.1})
    prediction.write_down(tmp_path, [*runs, held_out], console)  # kept as it was
    assert list(prediction.read(tmp_path).values()) == [one]
    begun = dataclasses.replace(held_out, name="begun")
    log(tmp_path, begun, {"step": 10, "eval/loss": 2.1})
    with pytest.raises(UserError, match="run begun has begun already"):
        prediction.write_down(tmp_path, [*runs, held_out, begun], console)


# --- from end to end ---

BASE = """
from __gin__ import dynamic_registration
from t5x_lite import optim
from t5x_lite import schedules
from t5x_lite.data import vocabularies
from t5x_lite.scaling import sweep
include 'gin_configs/runs/pretrain_llama.gin'
include 'gin_configs/sweeps/shapes/decoder.gin'
VOCABULARY = @vocabularies.Bytes()
VOCAB_SIZE = 363
TEXT = 'text.txt'
HEADS = 2
WIDTH = 16
LAYERS = 1
HIDDEN = 16
BATCH_SIZE = 8
LENGTH = 16
WARMUP_STEPS = 2
LOG_PERIOD = 1
EVAL_PERIOD = 4
EVAL_BATCHES = 1
PEAK_FLOPS = 1e9
optim.AdamW.schedule = @schedules.warmup_stable_decay()
schedules.warmup_stable_decay.peak = %LEARNING_RATE
schedules.warmup_stable_decay.steps = %STEPS
schedules.warmup_stable_decay.warmup_steps = %WARMUP_STEPS
schedules.warmup_stable_decay.decay_steps = 0.25
sweep.Sweep.name = 'tiny'
sweep.Sweep.points = [
    {'name': 'short', 'STEPS': 8, 'CHECKPOINT_PERIOD': 6},
    {'name': 'long', 'STEPS': 400, 'CHECKPOINT_PERIOD': 300},
    {'name': 'alone', 'STEPS': 400, 'CHECKPOINT_PERIOD': 300, 'KEEP_LAST': 2},
]
sweep.Sweep.trunk = True
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    lines = (f"{a} and {b} are {a + b}.\n\n" for a in range(20) for b in range(20))
    (folder / "text.txt").write_text("".join(lines))
    (folder / "tiny.gin").write_text(BASE)
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    # One device: eight of them take their time.
    monkeypatch.setenv("XLA_FLAGS", tiny_run.xla_flags(devices=1))
    yield folder
    gin.clear_config()


def rows(name, *, key="loss"):
    """Steps and losses that a run has logged."""
    path = pathlib.Path("out", sweep.RUNS, name, "metrics.jsonl")
    text = path.read_text() if path.exists() else ""
    return [(r["step"], r[key]) for r in map(json.loads, text.splitlines()) if key in r]


def test_a_sweep_is_stopped_goes_on_and_its_trunk_is_what_runs_are_alone(inside, capsys):
    assert cli.main(["data", "prepare", "--gin_file", "tiny.gin"]) == 0
    command = ["sweep", "run", "--gin_file", "tiny.gin", "--out", "out", "--workers", "2"]
    words = [sys.executable, "-m", "t5x_lite", *command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and len(rows("long")) < 40:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130, said
    assert "short: done, held-out loss" in said
    assert "long: stopped" in said
    assert "runs are done; the same command goes on" in said
    assert 40 <= rows("long")[-1][0] < 400
    table = list(map(json.loads, pathlib.Path("out/runs.jsonl").read_text().splitlines()))
    assert [(r["run"], r["final"], r["d"]) for r in table[:2]] == [
        ("short", False, 4 * 8 * 16), ("short", True, 8 * 8 * 16),
    ]  # fmt: skip
    assert table[0]["schedule"] == "warmup_stable_decay"
    counted = pathlib.Path("out/runs/short/parameters.txt").read_text().splitlines()[-1]
    assert counted == f"total parameters: {table[0]['n_total']:,}"
    assert "resuming at step 6, 400 steps" in pathlib.Path("out/logs/long.log").read_text()
    assert "long" not in {r["run"] for r in table if r["final"]}
    assert rows("long")[:6] == rows("short")[:6]
    held_out = ("long", "short", "alone")
    at_8 = {name: dict(rows(name, key="eval/loss"))[8] for name in held_out}
    assert at_8["short"] != at_8["long"] == at_8["alone"]

    capsys.readouterr()
    assert cli.main([*command, "--gin.LENGTH=8"]) == 2
    assert "LENGTH = 16, and now has LENGTH = 8" in capsys.readouterr().err
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "short" not in done.stdout, "what is finished is left alone"
    assert rows("long") == rows("alone")
    assert rows("long", key="eval/loss") == rows("alone", key="eval/loss")
    assert [step for step, _ in rows("long")] == list(range(1, 401))
    assert cli.main(["sweep", "status", "--out", "out"]) == 0
    assert "3 of 3 done" in capsys.readouterr().out
    columns = records.columns("out/runs.jsonl")
    with pytest.raises(UserError, match="the same sizes and the same loss"):  # long and alone
        points.read("out/runs.jsonl", **columns)
    found = points.read("out/runs.jsonl", **columns, where="steps == 8")
    assert (len(found), found.unfinished) == (1, 0)
    assert records.columns("text.txt") == records.columns("none.jsonl") == {}


def test_a_plan_needs_no_run_and_refuses_what_nothing_reads(inside, capsys):
    command = ["sweep", "run", "--gin_file", "tiny.gin", "--out", "new", "--dry_run"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "3 runs," in out
    assert "--gin_file new/configs/short.gin" in out
    assert not pathlib.Path("new").exists()
    for point, why in (
        ("{'STPES': 3}", "Did you mean STEPS"),
        ("{'llama.width': 3}", "nothing that this run uses reads llama.width"),
        ("{'STEPS': 'many'}", "must be of type int"),
        ("{'EVAL_PERIOD': None}", "compares held-out losses"),
    ):
        assert cli.main([*command, f"--gin.Sweep.points=[{point}]"]) == 2
        assert why in capsys.readouterr().err
    assert cli.main([*command, "--only", "width*"]) == 2
    assert "no such run" in capsys.readouterr().err
    assert cli.main([*command, "--held_out"]) == 2
    assert "holds no run out" in capsys.readouterr().err


# --- what is shipped ---

SHIPPED = sorted(path.name for path in (cli.CONFIGS / "sweeps").glob("*.gin"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_says_what_was_run_and_its_runs_can_be_configured(name):
    text = (cli.CONFIGS / "sweeps" / name).read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert "ot run" in head or "easured" in head
    args = argparse.Namespace(gin_file=[f"sweeps/{name}"], overrides=[], model_dir=None)
    grid = cli.configure(args, "t5x_lite.scaling.sweep.Sweep")()
    assert grid.name == name.removesuffix(".gin")
    runs = list(grid.runs())
    for _, values, _ in (runs[0], runs[-1]):
        config, arguments = cli.configure_runs(args)(sweep.overrides(values))
        assert "Sweep" not in config
        assert arguments["eval_period"]
        steps = arguments["steps"]
        assert 0 < float(arguments["optimizer"].schedule(steps // 2)) < 0.1
    gin.clear_config()
