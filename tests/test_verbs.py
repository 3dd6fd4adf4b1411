"""The life of a tiny model through the command line: every verb on a run of four steps."""

import gin
import pytest

from t5x_lite import cli
from tests import tiny_run
from tests.tiny_run import rows

TINY = [
    *tiny_run.TINY,
    *("--gin.STEPS=4", "--gin.BATCH_SIZE=8", "--gin.EVAL_PERIOD=2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the model was trained, with the text and its tokens."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
        tiny_run.prepare(folder)
        assert cli.main(["train", *TINY, "--model_dir=model"]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    yield
    gin.clear_config()


def test_train_leaves_its_log_and_both_configurations(folder):
    assert [row["step"] for row in rows(folder / "model") if "loss" in row] == [1, 2, 3, 4]
    given, used = ((folder / "model" / f"{n}config.gin").read_text() for n in ("", "operative_"))
    for text in (given, used):
        assert "STEPS = 4\n" in text
    assert "SentencePiece.vocab_size" in given
    assert "SentencePiece" not in used, "nothing read it"


def test_the_same_command_again_says_that_it_is_done(folder, capsys):
    before = rows(folder / "model")
    assert cli.main(["train", *TINY, "--model_dir=model"]) == 0
    assert "done" in capsys.readouterr().out
    assert rows(folder / "model") == before


def test_another_configuration_leaves_the_record_of_the_run_alone(folder, capsys):
    record = {path.name: path.read_bytes() for path in (folder / "model").glob("*.*")}
    assert cli.main(["train", *TINY, "--model_dir=model", "--gin.llama.hidden=32"]) == 2
    assert "16 → 32" in capsys.readouterr().err
    assert cli.main(["train", *TINY, "--model_dir=model", "--gin.STEPS=3"]) == 0  # done already
    assert {path.name: path.read_bytes() for path in (folder / "model").glob("*.*")} == record


def test_eval_needs_no_more_than_the_model_dir(folder, capsys):
    assert cli.main(["eval", "--model_dir=model", "--baselines"]) == 0
    out = capsys.readouterr().out
    assert [word for word in ("unigram", "bigram", "model, step 4") if word in out] != []
    last = [row["eval/loss"] for row in rows(folder / "model") if "eval/loss" in row][-1]
    assert f"{last:.4f}" in out


def test_generate_takes_its_options_from_the_command_line(capsys):
    command = ["generate", "--model_dir=model", "--prompt=1 and", "--max_tokens=3", "--seed=1"]
    assert cli.main([*command, "--temperature=0", "--num_samples=2"]) == 0
    assert capsys.readouterr().out.count("1 and") == 2


def test_plot_draws_the_run(folder, capsys):
    assert cli.main(["plot", "--model_dir=model"]) == 0
    assert capsys.readouterr().out.strip().endswith("model/loss.png")
    assert (folder / "model" / "loss.png").stat().st_size > 1000


def test_a_dry_run_needs_no_more_than_a_model_file(capsys):
    assert cli.main(["train", "--dry_run", "--gin_file=gin_configs/models/t5_1_1/small.gin"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "total parameters: 76,961,152"
    assert cli.main(["train", "--dry_run", *TINY]) == 0
    assert "total parameters: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("STEPS='many'", "steps = %STEPS is 'many', but must be of type int"),
        ("STEPS=4.5", "steps = %STEPS is 4.5, but must be of type int"),
        ("AdamW.foo=1", "AdamW has no parameter foo"),
        ("STPES=40", "STPES. Did you mean STEPS?"),
        ("BATCH_SIZE=9", "batch_size=9"),
    ],
)
def test_what_a_run_refuses_is_one_line(override, message, capsys):
    assert cli.main(["train", *TINY, "--model_dir=other", f"--gin.{override}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
