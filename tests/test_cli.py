import argparse
import subprocess
import sys
from pathlib import Path

import gin
import pytest

from t5x_lite import cli
from t5x_lite.arguments import build_parser
from t5x_lite.data.objectives import CausalLM, MaskedLM
from t5x_lite.data.sources import Text
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes

CAUSAL = "tasks/causal_lm.gin"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """gin's registry and the environment are global."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    yield
    gin.clear_config()


def task(*files, **overrides):
    """The Task that files and overrides describe."""
    given = [f"{name}={value}" for name, value in overrides.items()]
    args = argparse.Namespace(gin_file=list(files), overrides=given)
    return cli.configure(args, "t5x_lite.data.tasks.Task")()


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, **options)


# --- start-up ---


def test_nothing_heavy_is_imported_before_a_verb_runs():
    code = """
import sys
from t5x_lite.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
heavy = {"jax", "numpy", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "rich"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = python(code, capture_output=True)
    assert done.returncode == 0, f"imported: {done.stderr}"
    assert "--gin_file" in done.stdout


def test_the_package_itself_imports_nothing():
    code = (
        "import sys, t5x_lite; sys.exit(int(any(m.startswith('t5x_lite.') for m in sys.modules)))"
    )
    assert python(code).returncode == 0


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example_that_parses(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*verb.split(), "--help"])
    assert stopped.value.code == 0
    example = capsys.readouterr().out.split("example:\n")[1].strip().split()
    assert example[: 1 + len(verb.split())] == ["t5x_lite", *verb.split()]
    plain = [
        word for word in example[1:] if not word.startswith(("--gin.", "'")) and "?" not in word
    ]
    assert build_parser().parse_known_args(plain)[0].verb == verb


# --- errors: one line, exit status 2 ---

ERRORS = {
    "unknown verb": ("trian", "invalid choice: 'trian'"),
    "no verb": ("", "required: VERB"),
    "unknown option": ("train --modeldir x", "--modeldir"),
    "abbreviated option": ("train --dry", "--dry"),
    "wrong type": ("generate --model_dir x --top_k two", "invalid int value: 'two'"),
    "no model_dir": ("train --gin_file tasks/causal_lm.gin", "--model_dir"),
    "no gin file": ("data prepare", "--gin_file runs/quickstart.gin"),
    "no config.gin": ("eval --model_dir nowhere", "no nowhere/config.gin"),
    "missing file": ("data prepare --gin_file tasks/causal.gin", "mean tasks/causal_lm.gin?"),
    "macro that nothing reads": (
        f"data prepare --gin_file {CAUSAL} --gin.VOCAB_SZIE=40",
        "VOCAB_SZIE. Did you mean VOCAB_SIZE?",
    ),
    "macro without a value": (
        f"data prepare --gin_file {CAUSAL} --gin.TEXT=%gin.REQUIRED",
        "TEXT has no value; add --gin.TEXT=",
    ),
    "no task": ("data prepare --gin_file models/llama/tiny.gin", "add --gin_file tasks/"),
    "no run": ("train --gin_file models/llama/tiny.gin --model_dir x", "runs/quickstart.gin"),
    "unquoted string": (
        f"data prepare --gin_file {CAUSAL} --gin.DATA_DIR=data/here",
        "a string needs quotes: \"--gin.DATA_DIR='data/here'\"",
    ),
    "unquoted word": (f"data prepare --gin_file {CAUSAL} --gin.CORPUS=demo", "needs quotes"),
    "value in the next argument": (
        f"data prepare --gin_file {CAUSAL} --gin.SEED 4",
        "--gin.SEED: ",
    ),
    "unknown function": (
        f"data prepare --gin_file {CAUSAL} --gin.OBJECTIVE=@objectives.CausalM()",
        "t5x_lite.data.objectives has no CausalM. Did you mean CausalLM?",
    ),
    "unknown parameter": (
        f"data prepare --gin_file {CAUSAL} --gin.Task.datadir='x'",
        "Task has no parameter datadir. Did you mean data_dir?",
    ),
    "unknown owner": (f"data prepare --gin_file {CAUSAL} --gin.Tsk.name='x'", "Did you mean Task?"),
    "refused by a config": (
        f"data prepare --gin_file {CAUSAL} --gin.Task.validation_fraction=2",
        "validation_fraction=2 must lie between 0 and 1",
    ),
    "overrides without files": ("plot --model_dir x --gin.STEPS=4", "plot reads no gin files"),
    "prompts file": ("generate --model_dir x --prompts_file nope.txt", "nope.txt: No such file"),
}


@pytest.mark.parametrize(("command", "message"), ERRORS.values(), ids=ERRORS)
def test_what_the_user_can_mend_is_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("t5x_lite: error: ")
    assert err.count("\n") == 1
    assert message in err


BROKEN = {
    "not gin": ("X = demo", "can't read X = demo; strings need quotes"),
    "unclosed": ("X = [1,", "strings need quotes"),
    "not UTF-8": (b"X = '\xff'", "utf-8"),
    "missing include": ("include 'tasks/none.gin'", "includes tasks/none.gin"),
    "missing module": (f"{cli.DYNAMIC}\nimport nothing", "nothing"),
    "unknown name": (
        f"{cli.DYNAMIC}\nfrom t5x_lite.data import tasks\ntasks.Tak.x = 1",
        "t5x_lite.data.tasks has no Tak. Did you mean Task?",
    ),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(text, message, capsys, tmp_path):
    file = tmp_path / "broken.gin"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["data", "prepare", "--gin_file", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(file) in err
    assert message in err


def test_gin_looks_for_files_not_for_resources_of_packages(tmp_path):
    # From the repository's root `gin_configs` can be taken for a package.
    (tmp_path / "mine.gin").write_text("include 'gin_configs/tasks/none.gin'")
    command = ["-m", "t5x_lite", "data", "prepare", "--gin_file", tmp_path / "mine.gin"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2
    assert "it includes gin_configs/tasks/none.gin" in done.stderr
    assert done.stderr.count("\n") == 1


def stub(monkeypatch, error):
    def verb(args):
        raise error

    monkeypatch.setitem(cli.VERBS, "plot", verb)
    return cli.main(["plot", "--model_dir", "x"])


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    assert stub(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_is_not_swallowed(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        stub(monkeypatch, ZeroDivisionError())


def test_a_reader_that_stops_is_no_error():
    code = """
import sys
from t5x_lite import cli
cli.VERBS["plot"] = lambda args: [print("y" * 99) for _ in range(10_000)]
sys.exit(cli.main(["plot", "--model_dir", "x"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


# --- gin files ---


def test_a_later_file_wins_and_an_override_wins_over_all():
    assert task(CAUSAL).objective == CausalLM()
    assert task(CAUSAL, "tasks/masked_lm.gin").objective == MaskedLM()
    assert task(CAUSAL, TEXT="'a.txt'").source == Text("a.txt")
    assert task(CAUSAL, VOCAB_SIZE=512).vocabulary.vocab_size == 512
    assert task(CAUSAL, VOCABULARY="@vocabularies.Bytes()").vocabulary == Bytes()


@pytest.mark.parametrize("name", ["Task", "tasks.Task"])
def test_an_override_names_a_parameter_short_or_as_the_files_do(name):
    assert task(CAUSAL, **{f"{name}.validation_fraction": 0.25}).validation_fraction == 0.25


def test_an_override_gives_a_function_by_its_short_name():
    span = "tasks/span_corruption.gin"
    assert task(CAUSAL, span, OBJECTIVE="@CausalLM()").objective == CausalLM()
    assert task(CAUSAL, span, **{"SpanCorruption.mean_span": 5}).objective.mean_span == 5


def test_a_module_of_the_same_name_does_not_hide_a_function():
    # `llama` is the preset's module and its function
    args = argparse.Namespace(
        gin_file=["models/llama/tiny.gin"], overrides=["llama.dtype='bfloat16'", "VOCAB_SIZE=512"]
    )
    model = cli.configure(args, "t5x_lite.nn.presets.llama.llama")()
    assert (model.dtype, model.vocab_size) == ("bfloat16", 512)


@pytest.mark.parametrize(
    "name", [CAUSAL, f"gin_configs/{CAUSAL}", str(ROOT / "gin_configs" / CAUSAL)]
)
def test_files_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(task(name), Task)


def test_a_file_of_ones_own_includes_shipped_files_and_its_neighbours(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "size.gin").write_text("VOCAB_SIZE = 500\n")
    (tmp_path / "mine" / "run.gin").write_text(f"include '{CAUSAL}'\ninclude 'size.gin'\n")
    monkeypatch.chdir(tmp_path)
    assert task("mine/run.gin").vocabulary.vocab_size == 500


def test_only_what_the_verb_needs_must_have_a_value(tmp_path):
    (tmp_path / "more.gin").write_text(f"include '{CAUSAL}'\nA = %B\nB = %gin.REQUIRED\n")
    assert isinstance(task(str(tmp_path / "more.gin")), Task)


def test_the_config_that_is_stored_describes_the_same(tmp_path):
    before = task(CAUSAL, TEXT="'a.txt'", **{"Task.name": "'mine'"})
    (tmp_path / "config.gin").write_text(gin.config_str())
    assert task(str(tmp_path / "config.gin")) == before


# --- prompts ---


def prompts(monkeypatch, tmp_path, *options, piped=None):
    (tmp_path / "prompts.txt").write_text("from\na file\n\n")
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "stdin", "w+") as stdin:
        stdin.write(piped or "")
        stdin.seek(0)
        monkeypatch.setattr(sys, "stdin", stdin if piped is not None else None)
        return cli.read_prompts(build_parser().parse_args(["generate", "--model_dir=x", *options]))


def test_prompts_come_from_options_else_from_a_pipe(monkeypatch, tmp_path):
    both = ["--prompt", "one", "--prompts_file", "prompts.txt", "--prompt", "two"]
    assert prompts(monkeypatch, tmp_path, *both, piped="x") == ["one", "two", "from", "a file"]
    assert prompts(monkeypatch, tmp_path, piped="a\nb") == ["a", "b"]
    assert prompts(monkeypatch, tmp_path, piped="") == [""]
    assert prompts(monkeypatch, tmp_path) == [""]
