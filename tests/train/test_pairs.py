"""BERT's and ALBERT's pre-training: two losses of one step, end to end, and what follows."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from t5x_lite import losses, optim, schedules
from t5x_lite.data import objectives
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.errors import UserError
from t5x_lite.evaluate.loss import evaluate
from t5x_lite.nn import parameters
from t5x_lite.nn.heads import Pooler
from t5x_lite.nn.layers import Normal
from t5x_lite.nn.presets import fine_tuned
from t5x_lite.nn.presets.bert import bert, bert_pretraining
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.paired import paired
from t5x_lite.partitioning import MeshConfig
from t5x_lite.train import loop
from t5x_lite.train.restore import restore_params
from t5x_lite.train.state import TrainState
from t5x_lite.train.step import accumulate, model_apply

SHAPE = {"width": 32, "layers": 1, "heads": 2, "vocab_size": Bytes().size, "dropout": 0.0}
BERT = bert_pretraining("tiny", **SHAPE)
DEEP = SHAPE | {"layers": 2}
# What a pair's loss falls to: no model can tell half of the second texts that aren't first lines.
PAIRS = {
    "order": (objectives.SentenceOrder(), 0.1),
    "next": (objectives.NextSentence(), 0.6),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Documents of two lines, the first of letters before n: so a second text can be told."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    records = []
    for _ in range(300):
        first, second = rng.choice(list("abc"), 6), rng.choice(list("xyz"), 6)
        records.append({"text": f"{''.join(first)}\n{''.join(second)}"})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = JsonLines(str(folder / "a.jsonl"))
    return Task("letters", source, Bytes(), objectives.MaskedPairs(), str(folder / "data"), 0.2)


def given(task, **options):
    task = dataclasses.replace(task, objective=objectives.MaskedPairs(**options))
    prepare(task, Console(quiet=True))
    return task


def arguments(task, model, folder, **more):
    optimizer = optim.AdamW(schedules.linear(peak=5e-3, steps=80, warmup_steps=8))
    return {
        **{"model": model, "task": task, "loss": losses.MaskedAndPairs(), "optimizer": optimizer},
        **{"model_dir": str(folder), "steps": 80, "batch_size": 16, "length": 32, "seed": 0},
        **{"eval_period": 80, "log_period": 10, "mesh": MeshConfig(fsdp=8), "peak_flops": 1e9},
        **more,
    }


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows[0], next(row for row in rows if "eval/loss" in row)


@pytest.mark.parametrize("name", ["order", pytest.param("next", marks=pytest.mark.grid)])
def test_both_losses_fall_and_evaluating_says_the_same(task, tmp_path, name, capsys):
    pairs, least = PAIRS[name]
    # With small values a model so narrow waits for long before it begins to learn.
    model = dataclasses.replace(bert_pretraining("tiny", **DEEP), init=Normal(0.1))
    run = arguments(given(task, pairs=pairs), model, tmp_path, batch_size=32)
    loop.train(**run)
    first, last = rows_of(tmp_path)
    assert first["loss"] == pytest.approx(first["cross_entropy"] + first["pairs"], rel=1e-6)
    assert last["eval/loss"] < 0.7 * first["cross_entropy"]
    assert last["eval/pairs"] < least < first["pairs"]
    names = ("model", "task", "model_dir", "batch_size", "length", "loss", "mesh")
    result = evaluate(**{name: run[name] for name in names})
    for metric in ("loss", "pairs", "accuracy", "pairs_accuracy"):
        assert result[metric] == pytest.approx(last[f"eval/{metric}"], rel=1e-5)
    assert f"pairs_accuracy {result['pairs_accuracy']:.4f}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def batch(task):
    """Twelve rows with as many different numbers of targets, and four of padding."""
    batch = given(task).batches(batch_size=16, length=32, seed=0)[0]
    real = np.arange(16) % 4 < 3
    for name in ("weights", "segments", "label_weights"):
        batch[name] = batch[name] * real.reshape(-1, *[1] * (batch[name].ndim - 1))
    batch["weights"][0] = 0
    return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = parameters.abstract(BERT)[0]
    draw = lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


def gradients(params, batch, microbatches):
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, {}, None, None)
    loss, apply = losses.MaskedAndPairs(), model_apply(BERT)
    step = jax.jit(lambda s: accumulate(loss, apply, s, batch, None, microbatches)[:2])
    return step(state)


def test_microbatches_equal_one_batch(params, batch):
    """Of the four, one has nothing but padding: both denominators are the whole batch's."""
    one, metrics = gradients(params, batch, 1)
    four, again = gradients(params, batch, 4)
    assert metrics.keys() == again.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=2e-6, err_msg=name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-7)
    jax.tree.map(close, four, one)


def test_the_loss_is_what_numpy_computes(params, batch):
    output = jax.jit(model_apply(BERT))(params, batch)
    sums = losses.MaskedAndPairs()(lambda *_: output, params, None, batch, None)
    log_p = losses.token_logprobs(output, batch["targets"])
    words = -np.sum(np.asarray(log_p, np.float64) * np.asarray(batch["weights"]))
    assert float(sums.terms["cross_entropy"]) == pytest.approx(words, rel=1e-5)
    logits, labels = np.asarray(output.aux["pair_logits"], np.float64), np.asarray(batch["labels"])
    real = np.asarray(batch["label_weights"])
    assert 0 < (labels * real).sum() < real.sum() == 12
    other = logits[np.arange(16), 1 - labels] - logits[np.arange(16), labels]
    assert float(sums.terms["pairs"]) == pytest.approx((np.log1p(np.exp(other)) * real).sum())
    right, rows = sums.metrics["pairs_accuracy"]
    assert (float(right), float(rows)) == (((other < 0) * real).sum(), 12)
    weights = losses.MaskedAndPairs().weights(batch)
    assert {n: float(w) for n, w in weights.items()} == {
        "cross_entropy": float(batch["weights"].sum()),
        "pairs": 12.0,
    }


def test_the_head_is_bert_s(params, batch):
    """tanh of a linear map of the first token; the masked words are those of the head without."""
    output = jax.jit(model_apply(BERT))(params, batch)
    plain = bert("tiny", **SHAPE)
    words = jax.jit(model_apply(plain))(
        {**params, "head": {n: params["head"][n] for n in ("transform", "norm", "bias")}}, batch
    )
    np.testing.assert_array_equal(words.hidden_BTD, output.hidden_BTD)
    head = jax.tree.map(np.asarray, params["head"])
    bare = jax.jit(model_apply(bert_encoder_of(plain)))
    body = {n: p for n, p in params.items() if n != "head"}
    pooled = bare({**body, "head": {"pooler": params["head"]["pooler"]}}, batch).aux["pooled"]
    expected = np.asarray(pooled) @ head["pairs"]["kernel"] + head["pairs"]["bias"]
    np.testing.assert_allclose(output.aux["pair_logits"], expected, atol=1e-6)


def bert_encoder_of(model):
    return dataclasses.replace(model, head=Pooler())


def test_a_classifier_begins_with_the_pooler_of_its_pre_training(task, tmp_path, capsys):
    still = optim.AdamW(schedules.linear(peak=1e-30, steps=2, warmup_steps=1), weight_decay=0.0)
    run = arguments(given(task), BERT, tmp_path / "pairs", steps=1, optimizer=still)
    # Masked words alone can go on with the same head.
    loop.train(**run | {"loss": losses.CrossEntropy(), "eval_period": None})
    now, _ = restore_params(BERT, run["model_dir"])
    model = fine_tuned.classifier(BERT, 2)
    labelled = dataclasses.replace(
        task,
        objective=objectives.Classification(2, pair=False),
        preprocessors=(),
        name="labelled",
        source=JsonLines(str(_labelled(tmp_path))),
    )
    prepare(labelled, Console(quiet=True))
    new = arguments(labelled, model, tmp_path / "labels", steps=1, optimizer=still)
    capsys.readouterr()
    new |= {"loss": losses.Classification(), "eval_period": None}
    loop.train(**new, init_from=run["model_dir"])
    err = capsys.readouterr().err
    assert "drawn anew: head/classifier/" in err
    assert "head/pooler" not in err
    then, _ = restore_params(model, new["model_dir"])
    np.testing.assert_allclose(
        then["head"]["pooler"]["kernel"], now["head"]["pooler"]["kernel"], rtol=0, atol=1e-29
    )


def _labelled(folder):
    records = [{"text": f"text {n}", "label": n % 2} for n in range(40)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "labels.jsonl"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": bert("tiny", **SHAPE)}, "MaskedAndPairs is for a head that predicts pairs, and"),
        ({"loss": losses.Classification()}, "predicts labels, and the model's PairedLMHead"),
    ],
)
def test_what_does_not_go_together_is_refused(task, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        loop.train(**arguments(task, BERT, tmp_path / "run") | change)
    assert not (tmp_path / "run").exists()


def test_the_loss_of_pairs_needs_a_task_with_pairs(task, tmp_path):
    task = dataclasses.replace(task, objective=objectives.MaskedLM())
    with pytest.raises(UserError, match="reads labels, which task letters doesn't give"):
        loop.train(**arguments(task, BERT, tmp_path / "run"))


def test_only_encoders_with_bert_s_head_get_pairs():
    assert paired(BERT) == BERT
    for model in (gpt2("tiny"), fine_tuned.classifier(bert("tiny"), 2)):
        with pytest.raises(UserError, match="pairs of texts are learnt beside a MaskedLMHead"):
            paired(model)
