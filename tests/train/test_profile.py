"""Traces of steps, and the line about the first one."""

import contextlib
import gzip
import json
import os
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest

from t5x_lite import distributed
from t5x_lite.errors import UserError
from t5x_lite.train import first_step, loop
from t5x_lite.train.profile import Profile, steps_of
from tests.train import resumable


@pytest.mark.parametrize("text", ["3", "5:3", "0:2", "a:b", "3:", "1:2:3", "-1:2"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(UserError, match=r"the first and the last step to trace, such as 10:12"):
        steps_of(text, 100)


def test_range_has_both_ends_and_stays_inside_the_run():
    assert list(steps_of("3:5", 5)) == [3, 4, 5]
    assert not steps_of(None, 5)
    with pytest.raises(UserError, match="the run ends at step 4"):
        steps_of("3:5", 4)


@pytest.fixture
def profiled(tmp_path):
    """`profiled(steps, those that the loop does)`: the lines said, and the traces' numbers."""
    said = []

    def run(steps, done):
        double = jax.jit(lambda x: x @ x)
        with Profile(steps_of(steps, 9), tmp_path, contextlib.nullcontext, said.append) as traces:
            for step in done:
                traces.run(step, double, jnp.ones((8, 8)))
        return said, [numbers(path) for path in tmp_path.rglob("*.xplane.pb")]

    return run


def numbers(path):
    """Numbers of the steps in a trace."""
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [e for plane in data.planes for line in plane.lines for e in line.events]
    return [dict(e.stats)["step_num"] for e in events if e.name == "train"]


def test_chosen_steps_are_traced_and_no_others(profiled):
    said, traces = profiled("3:4", range(1, 7))
    assert traces == [[3, 4]]
    assert re.match(r"steps 3 to 4 traced: .*/profile, for XProf", said[0])


def test_trace_that_is_cut_short_is_written(profiled):
    said, traces = profiled("3:7", range(1, 5))
    assert traces == [[3, 4]]
    assert said[0].startswith("steps from 3 on traced: ")


def test_run_that_resumes_among_the_steps_traces_the_rest(profiled):
    assert profiled("3:5", range(5, 8))[1] == [[5]]


def test_first_of_several_processes_traces(profiled, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    assert profiled("3:4", range(1, 7)) == ([], [])


def test_run_without_the_steps_says_so(profiled):
    said, traces = profiled("1:2", range(3, 5))
    assert traces == []
    assert said == ["--profile_steps 1:2: this run did none of these, none is traced"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps of which the second is traced: its folder and its output."""
    folder = tmp_path_factory.mktemp("run")
    arguments = resumable.arguments(folder, folder, "gpt2")
    arguments |= {"microbatches": 1, "steps": 3, "eval_period": None, "checkpoint_period": None}
    output = []
    with pytest.MonkeyPatch.context() as patch:
        log = loop.Progress.log
        patch.setattr(loop.Progress, "log", lambda self, t: output.append(t) or log(self, t))
        loop.train(**arguments | {"profile_steps": "2:2"})
    return pathlib.Path(arguments["model_dir"]), output


def test_trace_of_a_run_has_the_products_of_its_step(run):
    folder, output = run
    (path,) = (folder / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    names = [e.name for plane in data.planes for line in plane.lines for e in line.events]
    assert [name for name in names if re.match(r"(dot|.*_dot|ynn)", name)], set(names)
    assert f"steps 2 to 2 traced: {folder / 'profile'}" in output[1]
    (path,) = (folder / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    assert [e["args"]["step_num"] for e in events if e.get("name") == "train"] == ["2"]


def test_line_about_the_first_step_adds_up(run):
    pattern = (
        r"first step done (\S+) s after the process began: (\S+) to set up, (\S+) to compile "
        r"\((not in the cache|found in the cache)\), (\S+) for its batch and itself"
    )
    match = re.fullmatch(pattern, run[1][0])
    total, *parts = (float(match[n]) for n in (1, 2, 3, 5))
    assert sum(parts) == pytest.approx(total, abs=0.2)


def test_cache_says_whether_it_had_the_program(tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    kept = {name: getattr(jax.config, name) for name in names}

    def use(**options):
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(jax_compilation_cache_dir=str(tmp_path), jax_persistent_cache_min_compile_time_secs=0)
    try:
        found = []
        for _ in range(2):
            with first_step.counted_hits() as hits:
                jax.jit(lambda x: x + 3).lower(jax.ShapeDtypeStruct((3,), float)).compile()
            found.append(len(hits))
        assert found == [0, 1]
    finally:
        use(**kept)


def test_age_of_a_process_is_what_ps_says():
    command = ["ps", "-o", "etimes=", "-p", str(os.getpid())]
    if first_step.process_age() is None or shutil.which("ps") is None:
        pytest.skip("no ps, or a system that doesn't say when a process began")
    seconds = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert seconds - 1 <= first_step.process_age() < seconds + 2


def test_system_that_doesn_t_say_when_a_process_began(monkeypatch):
    monkeypatch.setattr(first_step, "Path", lambda _: pathlib.Path("/nowhere"))
    assert first_step.process_age() is None
    step = first_step.FirstStep()
    step._marks += [step._began] * 2
    assert "after train was called: " in step.done(())
