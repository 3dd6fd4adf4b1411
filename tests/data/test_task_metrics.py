"""Metrics of tasks beside scikit-learn, SciPy, sacrebleu and rouge-score, and by hand."""

import dataclasses
import sys

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer

from t5x_lite.data import objectives
from t5x_lite.data.task_metrics import (
    F1,
    METRICS,
    Bleu,
    ExactMatch,
    Matthews,
    Pearson,
    Rouge,
    Spearman,
    TokenF1,
    check_metrics,
    judge,
)
from t5x_lite.errors import UserError

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 200).tolist()
GUESSED = [y if RNG.random() < 0.6 else int(RNG.integers(0, 4)) for y in LABELS]
WRITTEN = ["The cat sat on the mat.", "It is raining cats and dogs today", "", "yes"]
RIGHT = [["A cat sat on a mat"], ["It rains cats and dogs", "It is raining a lot"], ["no"], ["yes"]]


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_f1_is_scikit_learns(average):
    expected = sklearn.metrics.f1_score(LABELS, GUESSED, average=average)
    assert F1(average)(GUESSED, LABELS) == {f"f1_{average}": pytest.approx(expected)}


def test_f1_and_matthews_by_hand():
    # two hits of label 1, one false alarm, one miss, four hits of label 0
    guessed, right = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]
    assert F1("binary")(guessed, right)["f1_binary"] == pytest.approx(2 / 3)
    assert F1()(guessed, right)["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    correlation = (2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5)
    assert Matthews()(guessed, right)["matthews"] == pytest.approx(correlation)
    expected = sklearn.metrics.matthews_corrcoef(LABELS, GUESSED)
    assert Matthews()(GUESSED, LABELS)["matthews"] == pytest.approx(expected)


def test_a_label_that_is_never_guessed_counts_as_zero():
    assert F1()([0, 0, 0, 0], [0, 0, 1, 1])["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)


def test_correlations_are_scipys_and_nan_without_any_spread():
    x, y = RNG.normal(size=50), RNG.normal(size=50).round(1)  # rounded: ranks that are tied
    x, y = x.tolist(), (y + x.round(1)).tolist()
    assert Pearson()(x, y)["pearson"] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert Spearman()(x, y)["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert Spearman()([1.0, 2.0, 3.0], [1.0, 8.0, 27.0])["spearman"] == pytest.approx(1)
    found = Pearson()([1.0, 2.0, 3.0], [1.0, 8.0, 27.0])  # deviations -1 0 1 and -11 -4 15
    assert found["pearson"] == pytest.approx(26 / np.sqrt(2 * 362))
    for metric in (Pearson(), Spearman()):
        assert np.isnan([*metric([1.0, 1.0], [1.0, 2.0]).values()]).all()


@pytest.mark.parametrize(
    ("written", "right", "exact", "f1"),
    [
        ("The Broncos!", ["Denver Broncos", "broncos"], 1, 1),  # the best right answer counts
        ("the Denver Broncos", ["Broncos"], 0, 2 / 3),  # half precise, all recalled
        ("a an the", [""], 1, 1),  # articles alone are no answer, and none is right
        ("Broncos", [""], 0, 0),
        ("", ["Broncos"], 0, 0),
        ("to  be or\nnot to be", ["to be, to-be"], 0, 2 * 2 / (6 + 3)),  # "tobe" is one word
        ("1,000 km", ["1000 km."], 1, 1),
        ("theatre an", ["Theatre"], 1, 1),
        ("theatre", ["atre"], 0, 0),  # an article inside a word stays
        ("data", ["dat"], 0, 0),
    ],
)
def test_exact_match_and_token_f1_of_squad_by_hand(written, right, exact, f1):
    assert ExactMatch()([written], [right]) == {"exact_match": exact}
    assert TokenF1()([written], [right])["token_f1"] == pytest.approx(f1)


def test_text_metrics_are_means_over_examples():
    assert ExactMatch()(WRITTEN, RIGHT)["exact_match"] == 0.5
    # of the second, it cats and dogs are shared with five words; with the other four, it is raining
    second = max(2 * 4 / (7 + 5), 2 * 3 / (7 + 4))
    assert TokenF1()(WRITTEN, RIGHT)["token_f1"] == pytest.approx((1 + second + 0 + 1) / 4)


@pytest.mark.parametrize("tokenizer", ["13a", "char"])
def test_bleu_is_sacrebleus(tokenizer):
    rectangular = [right * 2 if len(right) == 1 else right for right in RIGHT]
    streams = [list(stream) for stream in zip(*rectangular, strict=True)]
    expected = sacrebleu.corpus_bleu(WRITTEN, streams, tokenize=tokenizer).score
    assert 0 < expected < 100
    assert Bleu(tokenizer)(WRITTEN, RIGHT)["bleu"] == pytest.approx(expected)


def test_rouge_is_rouge_scores():
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    found = Rouge(("rouge1", "rougeL"), stems=True)(WRITTEN, RIGHT)
    for name, value in found.items():
        best = [
            max(scorer.score(one, ours)[name].fmeasure for one in right)
            for ours, right in zip(WRITTEN, RIGHT, strict=True)
        ]
        assert value == pytest.approx(np.mean(best))
    assert found["rouge1"] != Rouge(("rouge1",))(WRITTEN, RIGHT)["rouge1"]  # rains, raining


def test_two_metrics_of_one_name_are_refused():
    assert set(judge((F1(), F1("micro")), LABELS, LABELS)) == {"f1_macro", "f1_micro"}
    with pytest.raises(UserError, match="named rouge1"):
        judge((Rouge(("rouge1",)), Rouge(("rouge1",), stems=True)), WRITTEN, RIGHT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: F1("mean"), "average='mean' must be one of macro"),
        (lambda: F1("binary")([0, 2], [0, 1]), "labels 0 and 1; use 'macro'"),
        (lambda: Bleu("words"), "tokenizer='words' must be one of 13a"),
        (lambda: Rouge(("rouge0",)), "rouge1 to rouge9"),
        (lambda: Rouge(()), "rouge1 to rouge9"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("metric", "package", "answers"),
    [
        (F1(), "sklearn", ([0, 1], [0, 1])),
        (Pearson(), "scipy", ([0.0, 1.0], [0.0, 1.0])),
        (Bleu(), "sacrebleu", (WRITTEN, RIGHT)),
        (Rouge(), "rouge_score", (WRITTEN, RIGHT)),
    ],
)
def test_a_missing_package_names_the_extra(metric, package, answers, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"needs {package}; install it: .*t5x_lite\[eval\]"):
        metric(*answers)


# --- of tasks ------------------------------------------------------------------------------------

SUITABLE = {
    objectives.Classification(): {F1, Matthews},
    objectives.Regression(): {Pearson, Spearman},
    objectives.TextToText(): {ExactMatch, TokenF1, Bleu, Rouge},
    objectives.ExtractiveQA(): {ExactMatch, TokenF1, Bleu, Rouge},
    objectives.CausalLM(): set(),
    objectives.MaskedLM(): set(),
}


@pytest.mark.parametrize("objective", SUITABLE, ids=lambda objective: type(objective).__name__)
def test_a_metric_that_does_not_suit_the_objective_is_refused(byte_task, objective):
    for metric in METRICS:
        changes = {"objective": objective, "metrics": [metric()]}
        if metric in SUITABLE[objective]:
            assert dataclasses.replace(byte_task, **changes).metrics == (metric(),)
            continue
        name = f"metric {metric.__name__} compares {metric.kind}, and {type(objective).__name__}"
        with pytest.raises(UserError, match=name) as caught:
            dataclasses.replace(byte_task, **changes)
        assert "\n" not in str(caught.value)


def test_what_is_no_metric_is_refused():
    with pytest.raises(UserError, match="'F1' of a task isn't a metric; choose of F1, Matthews"):
        check_metrics(["F1"], "labels", "a task")


def test_metrics_change_nothing_that_is_stored(byte_task):
    task = dataclasses.replace(byte_task, objective=objectives.Classification())
    judged = dataclasses.replace(task, metrics=[F1()])
    assert judged.text_config == task.text_config
