"""Heads that predict no words, in config.json and beside it."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from t5x_lite.decode.generate import Decoding, generate
from t5x_lite.errors import UserError
from t5x_lite.hub import sentence
from t5x_lite.hub.families import read_config, without_training, write_config
from t5x_lite.nn.heads import (
    Dense,
    QuestionAnswering,
    Reward,
    SentenceEmbedding,
    SequenceClassifier,
    TokenClassifier,
)
from t5x_lite.nn.presets.bert import bert, bert_encoder
from t5x_lite.nn.presets.distilbert import distilbert_encoder
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.roberta import roberta_encoder
from t5x_lite.nn.transformer import Transformer

FIRST = SequenceClassifier(3, dense=Dense("tanh"))
LAST = SequenceClassifier(3, "last", bias=False)
GOLDEN = pathlib.Path(__file__).parent / "golden"


def with_head(model, head):
    return dataclasses.replace(model, head=head)


@pytest.mark.parametrize(
    ("model", "head", "architecture", "labels"),
    [
        (bert("tiny"), FIRST, "BertForSequenceClassification", 3),
        (bert("tiny"), dataclasses.replace(FIRST, labels=1), "BertForSequenceClassification", 1),
        (bert_encoder("tiny"), TokenClassifier(9), "BertForTokenClassification", 9),
        (bert("tiny"), QuestionAnswering(), "BertForQuestionAnswering", 2),
        (roberta_encoder("tiny"), FIRST, "RobertaForSequenceClassification", 3),
        (distilbert_encoder("tiny"), SequenceClassifier(dense=Dense("relu")),
         "DistilBertForSequenceClassification", 2),
        (gpt2("tiny"), LAST, "GPT2ForSequenceClassification", 3),
        (gpt2("tiny"), Reward(), "GPT2ForSequenceClassification", 1),
        (llama("tiny"), LAST, "LlamaForSequenceClassification", 3),
        (llama("tiny"), Reward(), "LlamaForSequenceClassification", 1),
    ],
)  # fmt: skip
def test_a_trained_head_is_written_with_its_labels(model, head, architecture, labels):
    model = with_head(model, head)
    config = write_config(model)
    assert config["architectures"] == [architecture]
    assert list(config["id2label"]) == [str(n) for n in range(labels)]
    assert sorted(config["label2id"].values()) == list(range(labels))
    assert {config["id2label"][str(n)]: n for n in range(labels)} == config["label2id"]
    assert without_training(read_config(config)).head == without_training(model).head


def config_of(name: str, **changes) -> dict:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return {k: v for k, v in {**config, **changes}.items() if v is not None}


def test_labels_come_from_either_field_and_are_two_without():
    def labels(**fields):
        config = config_of("bert-classifier", id2label=None, label2id=None)
        return read_config({**config, **fields}).head.labels

    assert labels() == 2
    assert labels(num_labels=4) == 4
    assert labels(id2label={"0": "a", "1": "b", "2": "c"}) == 3
    with pytest.raises(UserError, match="num_labels=4, but 1 of id2label"):
        labels(num_labels=4, id2label={"0": "a"})


def test_an_answer_has_two_ends():
    three = {str(n): f"LABEL_{n}" for n in range(3)}
    with pytest.raises(UserError, match="3 labels; an answer has a start and an end"):
        read_config(config_of("bert-answers", id2label=three))


def test_heads_that_no_class_has_are_refused():
    for model, head in (
        (bert("tiny"), SequenceClassifier(dense=Dense("gelu"))),
        (gpt2("tiny"), SequenceClassifier(dense=Dense("tanh"))),
        (bert("tiny"), Reward()),
    ):
        with pytest.raises(UserError, match="has such a model"):
            write_config(with_head(model, head))


@pytest.mark.parametrize("name", ["gpt2-classifier", "llama-reward"])
def test_a_decoder_without_words_generates_nothing(ours, name):
    model, params, _ = ours.load(GOLDEN / name)
    prompt = {"tokens": np.ones((1, 3), np.int32), "segments": np.ones((1, 3), np.int32)}
    with pytest.raises(UserError, match="has no language-model head, so it can't generate"):
        generate(Transformer(model), params, prompt, jax.random.split(jax.random.key(0), 1),
                 Decoding(2))  # fmt: skip


@pytest.mark.parametrize(
    "head", [SentenceEmbedding(), SentenceEmbedding("first", True), SentenceEmbedding("last", True)]
)
@pytest.mark.parametrize("body", [bert_encoder("tiny"), distilbert_encoder("tiny"), llama("tiny")])
def test_a_sentence_embedding_is_written_beside_config_json(tmp_path, body, head):
    model = with_head(body, head)
    sentence.write(model, tmp_path)
    read = sentence.with_head(read_config(write_config(model)), tmp_path)
    assert without_training(read).head == head
    files = ["modules.json", "1_Pooling/config.json"]
    assert sentence.files(tmp_path) == files
    assert sentence.with_head(body, tmp_path / "1_Pooling") == body, "no modules.json, no change"
    assert sentence.files(tmp_path / "1_Pooling") == []


def steps(*names, paths=("", "1_Pooling", "2_Normalize", "3_More")):
    return [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.any.{name}"}
            for n, (name, path) in enumerate(zip(names, paths, strict=False))]  # fmt: skip


BOTH = ("Transformer", "Pooling")


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (steps(*BOTH, "Dense"), {}, "has the steps Transformer, Pooling, Dense; t5x_lite knows"),
        (steps("Transformer"), {}, "has the steps Transformer; t5x_lite knows"),
        (
            steps(*BOTH, paths=("0_Transformer", "1_Pooling")),
            {},
            "stands in 0_Transformer; move it",
        ),
        (steps(*BOTH, paths=("", "../1_Pooling")), {}, "a path that isn't a folder beside it"),
        (steps(*BOTH, paths=("", "..")), {}, "a path that isn't a folder beside it"),
        ({"0": "Transformer"}, {}, "isn't a list of steps with a type and a path"),
        (
            steps(*BOTH),
            {"pooling_mode": "max"},
            "pools by max; t5x_lite knows one of cls, mean, la",
        ),
        (steps(*BOTH), {"pooling_mode": ["cls", "mean"]}, "pools by cls and mean"),
        (steps(*BOTH), {"pooling_mode_weightedmean_tokens": True}, "pools by weightedmean"),
        (steps(*BOTH), {"word_embedding_dimension": 64}, "pools 64 numbers, but the model's width"),
        (steps(*BOTH), {"include_prompt": False}, "leaves a prompt's tokens out"),
        (steps(*BOTH), {"layers": 4}, "fields that t5x_lite doesn't know: layers"),
    ],
)
def test_other_sentence_models_are_refused(tmp_path, modules, pooling, message):
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(UserError, match=message):
        sentence.with_head(bert_encoder("tiny"), tmp_path)


def test_both_ways_to_name_a_pooling_are_read(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps(steps(*BOTH)))
    (tmp_path / "1_Pooling").mkdir()
    for pooling, expected in (
        ({}, "mean"),
        ({"pooling_mode": "cls", "embedding_dimension": 128}, "first"),
        ({"pooling_mode": ["lasttoken"], "include_prompt": True}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        given = sentence.with_head(bert_encoder("tiny"), tmp_path).head
        assert given == SentenceEmbedding(expected)
