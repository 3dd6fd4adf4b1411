"""What a model answers: beside a forward pass over whole rows, and with scores set by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from t5x_lite import losses
from t5x_lite.data import objectives
from t5x_lite.data.mixtures import Mixture
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.task_metrics import F1, ExactMatch, TokenF1
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes, ByteVocabulary
from t5x_lite.errors import UserError
from t5x_lite.evaluate import predictions
from t5x_lite.evaluate.predictions import best_span, measure
from t5x_lite.nn import parameters
from t5x_lite.nn.presets import fine_tuned
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.t5 import t5_1_1
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import MeshConfig, Sharding

VOCABULARY = ByteVocabulary(100)
SHAPE = {"width": 32, "layers": 1, "heads": 2, "vocab_size": VOCABULARY.size, "dropout": 0.0}
NUMBERS = ("one", "two", "three")
BATCH = 8


def prepared(folder, records, objective, metrics, name="task"):
    """A task whose validation split is `records`, in their order."""
    for split, given in {"train": records[:1], "validation": records}.items():
        (folder / f"{name}.{split}").write_text("\n".join(map(json.dumps, given)))
    train, held_out = (JsonLines(str(folder / f"{name}.{s}")) for s in ("train", "validation"))
    task = Task(
        *(name, train, Bytes(), objective, str(folder / "data")),
        validation_source=held_out,
        metrics=metrics,
    )
    prepare(task, Console(quiet=True), workers=1)
    return task


def sharding():
    return Sharding(MeshConfig(fsdp=BATCH).build(), "fsdp")


def drawn(model):
    """Parameters large enough that answers differ from prompt to prompt."""
    rng, shapes = np.random.default_rng(0), parameters.abstract(model)[0]
    return jax.tree.map(lambda x: np.float32(0.5) * rng.standard_normal(x.shape, x.dtype), shapes)


def answers(model, params, task, length, batches=None, max_tokens=None):
    """Predictions and references of the only task."""
    task = task.for_family(model.kind)
    held_out = task.evaluations(batch_size=BATCH, length=length, batches=batches)[task.name]
    answering = predictions._Answering(model, params, sharding(), batches, max_tokens)
    return answering.answers(task, held_out, task.sides(length))


# --- text ----------------------------------------------------------------------------------------


def translations(count=19):
    given = [f"{'x' * (n % 7)} {NUMBERS[n % 3]}" for n in range(count)]
    return [{"inputs": text, "targets": f"{text} {n}"} for n, text in enumerate(given)]


MODELS = {
    "causal": (gpt2("tiny", **SHAPE), objectives.TextToText()),
    # The prefix shows from the second layer on.
    "prefix": (
        gpt2("tiny", **SHAPE | {"layers": 2}),
        objectives.TextToText(inputs_see="both_ways"),
    ),
    "T5": (t5_1_1("tiny", **SHAPE, head_dim=16, hidden=48), objectives.TextToText()),
}


@pytest.mark.parametrize("name", MODELS)
def test_text_is_what_each_forward_pass_finds_likeliest(name, tmp_path, monkeypatch):
    model, objective = MODELS[name]
    records = translations()
    # Random models write no UTF-8: ids as text lose nothing.
    monkeypatch.setattr(ByteVocabulary, "decode", lambda _, ids: " ".join(map(str, ids)))
    task = prepared(tmp_path, records, objective, [ExactMatch()])
    params = drawn(model)
    found, right = answers(model, params, task, 32, max_tokens=6)
    assert right == [[record["targets"]] for record in records]
    written = [[int(token) for token in text.split()] for text in found]
    assert len({*found}) > 3  # prompts matter
    rows = [forward_row(name, r["inputs"], ids) for r, ids in zip(records, written, strict=True)]
    batch = {key: jnp.asarray(np.stack([row[key] for row, _ in rows])) for key in rows[0][0]}
    logits = losses.logits(jax.jit(Transformer(model).apply)({"params": params}, batch))
    banned = np.setdiff1d(VOCABULARY.special_ids, VOCABULARY.stop_ids)
    likeliest = np.argmax(np.asarray(logits.at[:, :, banned].set(-np.inf)), axis=-1)
    for place, ((_, prompt), ids) in enumerate(zip(rows, written, strict=True)):
        expected = likeliest[place, prompt - 1 : prompt - 1 + 6].tolist()
        assert ids == expected[: len(ids)]
        assert len(ids) == 6 or ids[-1] == VOCABULARY.eos_id


def forward_row(name, inputs, written):
    """A whole row, prompt and answer, built by hand; and how long the prompt is."""
    inputs = VOCABULARY.encode(inputs)
    if name == "T5":
        tokens, prompt = [VOCABULARY.pad_id, *written], 1
    else:
        tokens, prompt = [VOCABULARY.bos_id, *inputs, *written], len(inputs) + 1
    row = padded(tokens, "")
    if name == "prefix":
        row["prefix"] = (np.arange(32) < prompt).astype(np.int32)
    if name == "T5":
        row |= padded([*inputs, VOCABULARY.eos_id], "encoder_")
    return row, prompt


def padded(ids, side):
    row = np.zeros(32, np.int32)
    row[: len(ids)] = ids
    return {f"{side}tokens": row, f"{side}segments": (np.arange(32) < len(ids)).astype(np.int32)}


def test_batches_limit_what_is_written_and_targets_its_length(tmp_path, monkeypatch):
    model, objective = MODELS["T5"]
    objective = dataclasses.replace(objective, targets_length=3)
    monkeypatch.setattr(ByteVocabulary, "decode", lambda _, ids: " ".join(map(str, ids)))
    task = prepared(tmp_path, translations(), objective, [ExactMatch()])
    found, right = answers(model, drawn(model), task, 32, batches=2)
    # Targets are longer than three tokens: models are judged by all of them.
    assert right == [[record["targets"]] for record in translations()[: 2 * BATCH]]
    assert len(found) == len(right)
    assert max(len(text.split()) for text in found) == 3


def test_too_many_tokens_for_the_models_positions_are_refused(tmp_path):
    model = gpt2("tiny", **SHAPE, positions=32)
    task = prepared(tmp_path, translations(), objectives.TextToText(), [ExactMatch()])
    with pytest.raises(UserError, match="set max_tokens to"):
        answers(model, drawn(model), task, 32, max_tokens=31)
    with pytest.raises(UserError, match="max_tokens=0 must be at least 1"):
        answers(model, {}, task, 32, max_tokens=0)


# --- answers in a context ------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [None, 1, 3])
def test_the_best_span_is_that_of_all_pairs(longest):
    rng = np.random.default_rng(0)
    for size in (1, 2, 9):
        start, end = rng.normal(size=(2, size)).astype(np.float32)
        pairs = [(a, b) for a in range(size) for b in range(a, min(size, a + (longest or size)))]
        best = max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])
        score, *span = best_span(start, end, longest)
        assert tuple(span) == best
        assert score == pytest.approx(start[best[0]] + end[best[1]])
    assert best_span(start[:0], end[:0])[0] == -np.inf


def questions(unanswerable=()):
    """Contexts of one window and of many; the answers' places differ."""
    records = []
    for n in range(9):
        before = "é" * (7 * n)
        context = f"{before} {NUMBERS[n % 3]} {'y' * (5 * n)}"
        at = {"text": [NUMBERS[n % 3]], "answer_start": [len(before) + 1]}
        if n % 2:
            at = {"text": [*at["text"], "both"], "answer_start": [*at["answer_start"], 0]}
        if n in unanswerable:
            at = {"text": [], "answer_start": []}
        records.append({"question": "?" * (1 + n % 3), "context": context, "answers": at})
    return records


def scores_of(held_out, decoy=None, doubt=0.0):
    """A head that finds what is right, 5 for each end, and cls where there is nothing, 7.

    `decoy`: in windows without the answer it also sees one at the context's first token.
    `doubt`: more for cls, everywhere.
    """
    for batch in held_out:
        score = np.zeros((2, *batch["tokens"].shape), np.float32)
        for row, span in enumerate(batch["spans"]):
            score[0, row, span[0]] = score[1, row, span[1]] = 5 if span.any() else 7
            if decoy and not span.any():
                first = int(np.argmax(batch["token_types"][row]))
                score[:, row, first] = decoy
        score[:, :, 0] += doubt
        yield batch, {"start_logits": score[0], "end_logits": score[1]}


@pytest.fixture
def found_by(monkeypatch, tmp_path):
    model = fine_tuned.answerer(bert("tiny", **SHAPE))
    objective = objectives.ExtractiveQA(stride=11, question_length=3)

    def found_by(records, decoy=None, doubt=0.0, name="task", **options):
        def outputs(_, held_out):
            return scores_of(held_out, decoy, doubt)

        monkeypatch.setattr(predictions._Answering, "_outputs", outputs)
        task = prepared(tmp_path, records, objective, [ExactMatch(), TokenF1()], name)
        return answers(model, {}, task, 32, **options)

    return found_by


def test_an_answer_is_the_contexts_text_at_its_best_window(found_by):
    records = questions()
    expected = [NUMBERS[n % 3] for n in range(9)]
    texts, right = found_by(records, decoy=4.0)
    assert texts == expected
    assert right == [record["answers"]["text"] for record in records]
    assert ["two", "both"] in right


def test_a_better_span_in_another_window_wins(found_by):
    texts, _ = found_by(questions(), decoy=6.0)
    assert texts[0] == "one"  # its only window
    assert texts[8] == "é"  # the first token alone is half of the letter


def test_no_answer_is_one_only_where_questions_without_one_are(found_by):
    records, named = questions(unanswerable=(2, 5)), [NUMBERS[n % 3] for n in range(9)]
    texts, right = found_by(records, decoy=4.0)
    # All windows of theirs prefer cls. Those of a long context that don't have its answer do too.
    assert texts == [name if n not in (2, 5) else "" for n, name in enumerate(named)]
    assert right[2] == right[5] == [""]
    assert found_by(records, doubt=20.0)[0] == [""] * 9
    assert found_by(questions(), doubt=20.0, name="answerable")[0] == named


def test_answers_are_no_longer_than_asked(found_by):
    texts, _ = found_by(questions(), max_tokens=2)
    assert all(0 < len(text) <= 2 for text in texts)


def test_questions_without_all_their_windows_do_not_count(found_by):
    everything, _ = found_by(questions())
    some, right = found_by(questions(), batches=1)
    assert 0 < len(some) < 9
    assert some == everything[: len(right)]
    with pytest.raises(UserError, match="batches=1 hold no question of long"):
        found_by(questions()[8:], batches=1, name="long")


# --- tasks together ------------------------------------------------------------------------------


def test_each_task_of_a_mixture_is_measured_by_itself(tmp_path):
    model = fine_tuned.classifier(gpt2("tiny", **SHAPE), 3)
    params, rng = drawn(model), np.random.default_rng(0)
    parts = {}
    for name, count in (("first", 13), ("second", 21)):
        records = [
            {"text": f"{NUMBERS[rng.integers(3)]} {n}", "label": int(rng.integers(3))}
            for n in range(count)
        ]
        metrics = [F1("micro"), F1()] if name == "first" else [F1("micro")]
        objective = objectives.Classification(3)
        parts[name] = prepared(tmp_path, records, objective, metrics, name)
    alone = {name: answers(model, params, part, 32) for name, part in parts.items()}
    assert {name: len(right) for name, (_, right) in alone.items()} == {"first": 13, "second": 21}
    assert len({*alone["second"][0]}) > 1
    plain = dataclasses.replace(parts["second"], metrics=())
    for second, expected in ((parts["second"], {"first", "second"}), (plain, {"first"})):
        mixture = Mixture("both", [parts["first"], second], data_dir=str(tmp_path / "data"))
        mixture = mixture.for_family(model.kind)
        held_out = mixture.evaluations(batch_size=BATCH, length=32)
        found = measure(model, params, mixture, held_out, sharding(), length=32)
        assert found.keys() == expected
        assert found["first"].keys() == {"f1_micro", "f1_macro"}
        for name, scores in found.items():
            guessed, right = alone[name]
            assert scores["f1_micro"] == pytest.approx(np.mean(np.equal(guessed, right)))
