"""Labels, numbers, spans and answers, trained end to end; new heads on pre-trained models."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from t5x_lite import losses, optim, schedules
from t5x_lite.data import objectives
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.task_metrics import F1, ExactMatch, Pearson, TokenF1
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.errors import UserError
from t5x_lite.evaluate.loss import evaluate
from t5x_lite.nn.heads import Pooler
from t5x_lite.nn.presets import fine_tuned
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.t5 import t5_1_1
from t5x_lite.partitioning import MeshConfig
from t5x_lite.serve.generate import generate
from t5x_lite.train import loop
from t5x_lite.train.restore import restore_params

SIZE = Bytes().size
SHAPE = {"width": 32, "layers": 1, "heads": 2, "vocab_size": SIZE, "dropout": 0.0}
WORDS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Records that every objective can learn something from."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    records = []
    for number in range(240):
        word = int(rng.integers(3))
        context = f"{'x' * int(rng.integers(6))} {WORDS[word]} {number}"
        asked = {"text": [WORDS[word]], "answer_start": [context.index(WORDS[word])]}
        # Numbered: copies of a chat would all fall on one side of the split.
        said = [("user", f"{number}?"), ("assistant", WORDS[word])]
        records.append(
            {
                "text": f"{WORDS[word]} {number}",
                "label": word,
                "question": "?",
                "context": context,
                "answers": asked,
            }
            | {"inputs": context, "targets": WORDS[word]}
            | {"messages": [{"role": role, "content": content} for role, content in said]}
        )
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = JsonLines(str(folder / "a.jsonl"))
    objective = objectives.Classification(3)
    return Task("colours", source, Bytes(), objective, str(folder / "data"), 0.2)


def given(task, objective):
    """The task under an objective, prepared."""
    task = dataclasses.replace(task, objective=objective, name=type(objective).__name__)
    prepare(task, Console(quiet=True))
    return task


def arguments(task, model, loss, folder, **more):
    optimizer = optim.AdamW(schedules.linear(peak=5e-3, steps=60, warmup_steps=6))
    return {
        **{"model": model, "task": task, "loss": loss, "optimizer": optimizer, "seed": 0},
        **{"model_dir": str(folder), "steps": 60, "batch_size": 16, "length": 32},
        **{"eval_period": 60, "log_period": 10, "mesh": MeshConfig(fsdp=8), "peak_flops": 1e9},
        **more,
    }


def held_out(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows[0], next(row for row in rows if "eval/loss" in row)


BERT = bert("tiny", **SHAPE)
CASES = {
    "labels": (
        objectives.Classification(3),
        fine_tuned.classifier(BERT, 3, dropout=0.0),
        losses.Classification(),
    ),
    "labels of a decoder": (
        objectives.Classification(3),
        fine_tuned.classifier(gpt2("tiny", **SHAPE), 3, dropout=0.0),
        losses.Classification(),
    ),
    "numbers": (objectives.Regression(), fine_tuned.classifier(BERT, 1), losses.Regression()),
    "spans": (
        objectives.ExtractiveQA(question_length=4),
        fine_tuned.answerer(BERT),
        losses.SpanExtraction(),
    ),
    "text": (
        objectives.TextToText(targets_length=16),
        t5_1_1("tiny", **SHAPE, head_dim=16, hidden=48),
        losses.CrossEntropy(),
    ),
    "text of a decoder": (
        objectives.TextToText(inputs_see="both_ways"),
        gpt2("tiny", **SHAPE),
        losses.CrossEntropy(),
    ),
    "chat": (objectives.Chat(), gpt2("tiny", **SHAPE), losses.CrossEntropy()),
}


QUICK = ("labels", "spans", "text")
METRICS = {
    objectives.Classification: [F1("micro"), F1()],
    objectives.Regression: [Pearson()],
    objectives.ExtractiveQA: [ExactMatch(), TokenF1()],
    objectives.TextToText: [ExactMatch(), TokenF1()],
    objectives.Chat: [],
}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.grid) for n in CASES]
)
def test_training_learns_and_evaluating_says_the_same(task, tmp_path, name, capsys):
    objective, model, loss = CASES[name]
    task = dataclasses.replace(given(task, objective), metrics=METRICS[type(objective)])
    run = arguments(task, model, loss, tmp_path)
    loop.train(**run)
    first, last = held_out(tmp_path)
    assert last["eval/loss"] < 0.9 * first["loss"]
    result = evaluate(
        **{k: run[k] for k in ("model", "task", "model_dir", "batch_size", "length", "loss")},
        mesh=run["mesh"],
    )
    assert result["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert result["step"] == 60
    metric = "absolute_error" if name == "numbers" else "accuracy"
    assert result[metric] == pytest.approx(last[f"eval/{metric}"], rel=1e-5)
    out = capsys.readouterr().out
    assert f"{result['loss']:.4f}" in out
    check_metrics(task, model, tmp_path, result, out)


def check_metrics(task, model, folder, result, out):
    """Metrics beside the loss's own, or beside answers of the verb `generate`."""
    if not task.metrics:
        return
    shown = next(line for line in out.splitlines() if line.startswith(f"{task.name}: "))
    scores = dict(pair.split() for pair in shown.removeprefix(f"{task.name}: ").split(", "))
    assert scores == {name: f"{result[name]:.4f}" for name in scores}
    if "f1_micro" in scores:  # that of all labels is their accuracy
        assert scores.keys() == {"f1_micro", "f1_macro"}
        assert result["f1_micro"] == pytest.approx(result["accuracy"])
    elif "pearson" in scores:
        assert 0 < result["pearson"] <= 1
    else:
        assert scores.keys() == {"exact_match", "token_f1"}
        assert result["token_f1"] >= result["exact_match"]
        if "Extractive" in task.name:  # both ends are right, and of one window
            assert result["exact_match"] >= result["accuracy"]
        else:
            answers = written(task, model, folder)
            assert len({*answers}) > 1
            right = [[record["targets"]] for record in task.records("validation")]
            assert result["token_f1"] == pytest.approx(TokenF1()(answers, right)["token_f1"])


def written(task, model, folder):
    """Greedy answers of `generate` to all inputs of the validation split."""
    inputs = [record["inputs"] for record in task.records("validation")]
    answers = generate(
        model=model, task=task, model_dir=str(folder), prompts=inputs, temperature=0, max_tokens=16
    )
    return ["".join(text for text, is_new in one.segments if is_new) for one in answers]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "labels",
            {"loss": losses.CrossEntropy()},
            "loss CrossEntropy is for a head that predicts",
        ),
        ("labels", {"model": BERT}, "the model's MaskedLMHead predicts masked"),
        ("labels", {"model": fine_tuned.classifier(BERT, 4)}, "3 labels and .* 4; bind"),
        ("numbers", {"model": fine_tuned.classifier(BERT, 2)}, "has 1 labels"),
        ("spans", {"model": fine_tuned.classifier(BERT, 2)}, "predicts labels"),
        ("text", {"length": 1}, "length=1"),
        ("chat", {"model": BERT}, "Chat is for decoder-only"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    task, tmp_path, case, change, message
):
    objective, model, loss = CASES[case]
    task = dataclasses.replace(task, objective=objective, name="never_prepared")
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=message) as caught:
        loop.train(**arguments(task, model, loss, folder) | change)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_a_loss_needs_what_its_task_gives(task, tmp_path):
    model = CASES["labels"][1]
    spans = dataclasses.replace(task, objective=CASES["spans"][0], name="never_prepared")
    with pytest.raises(UserError, match="loss Classification reads labels, which task never_prep"):
        loop.train(**arguments(spans, model, losses.Classification(), tmp_path / "run"))


def test_an_encoder_decoder_has_no_head_for_labels():
    with pytest.raises(UserError, match="let it write them"):
        fine_tuned.classifier(CASES["text"][1], 3)


@pytest.mark.parametrize("scan", [True, False])
def test_a_pre_trained_models_parameters_get_a_new_head(task, tmp_path, capsys, scan):
    masked = given(task, objectives.MaskedLM())
    before = dataclasses.replace(BERT, head=Pooler()) if not scan else BERT
    short = {"steps": 1, "eval_period": None}
    if scan:
        loop.train(**arguments(masked, before, losses.CrossEntropy(), tmp_path / "mlm", **short))
    else:  # a pooler has no loss: as of a converted model
        written = parameters_of(before, tmp_path / "mlm")
    model = dataclasses.replace(fine_tuned.classifier(BERT, 3), scan=scan)
    still = optim.AdamW(schedules.linear(peak=1e-30, steps=2, warmup_steps=1), weight_decay=0.0)
    labelled = given(task, objectives.Classification(3))
    run = arguments(labelled, model, losses.Classification(), tmp_path / "cls", **short)
    loop.train(**run | {"init_from": str(tmp_path / "mlm"), "optimizer": still})
    err = capsys.readouterr().err
    assert "another head than this model; drawn anew: head/classifier/" in err
    stored = dataclasses.replace(model, scan=True)
    now, _ = restore_params(stored, str(tmp_path / "cls"))
    old = restore_params(before, str(tmp_path / "mlm"))[0] if scan else written
    for part in set(now) - {"head"}:
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-29)  # one still step
        jax.tree.map(close, now[part], old[part])
    # A pooler has the same shape and meaning in both; everything else of the head is new.
    assert ("head/pooler/kernel" in err) == scan
    if not scan:
        close(now["head"]["pooler"]["kernel"], old["head"]["pooler"]["kernel"])
    assert now["head"]["classifier"]["kernel"].any()


def parameters_of(model, folder):
    """A checkpoint of parameters alone, as `convert` writes it."""
    from t5x_lite.checkpoint import Checkpointer
    from t5x_lite.nn import parameters
    from t5x_lite.train import identity
    from t5x_lite.train.restore import FOLDER

    params = jax.jit(lambda: parameters.init(model, jax.random.key(1)))()
    meta = {"model": identity.model_identity(model), "params_only": True}
    with Checkpointer(folder / FOLDER) as checkpoints:
        checkpoints.save(0, {"params": params}, meta)
    return params


def test_a_model_that_differs_elsewhere_is_refused(task, tmp_path):
    wider = bert("tiny", **SHAPE | {"width": 64})
    parameters_of(wider, tmp_path / "wider")
    objective, model, loss = CASES["labels"]
    run = arguments(given(task, objective), model, loss, tmp_path / "run")
    with pytest.raises(UserError, match="width: 64 → 32"):
        loop.train(**run | {"init_from": str(tmp_path / "wider")})
