"""What tells how good a task's answers are, besides the loss: pure functions as frozen configs.

A metric compares one `kind` of answer, which the objective names (`Objective.answers`):

    labels   numbers of classes; int [n] with int [n]
    values   real numbers; float [n] with float [n]
    text     n texts with, for each, the texts that are right

Packages that compute it come with the extra [eval].
"""

import collections
import dataclasses
import importlib
import itertools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_lite.errors import UserError

LABELS, VALUES, TEXT = "labels", "values", "text"
AVERAGES = ("macro", "micro", "weighted", "binary")
BLEU_TOKENIZERS = ("13a", "intl", "zh", "char", "none")
ROUGE_TYPES = re.compile(r"rouge([1-9]|L|Lsum)")


@dataclasses.dataclass(frozen=True)
class Metric:
    """Base of the metrics: `metric(predictions, references)` gives named numbers."""

    kind: ClassVar[str]

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """The metric over all examples; the two have one entry for each of them.

        Raises:
          UserError: a package of the extra [eval] is missing.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class F1(Metric):
    """Harmonic mean of precision and recall, 0 to 1, as `f1_AVERAGE`.

    Attributes:
      average: scikit-learn's: "macro" is the plain mean over the labels that occur, "weighted" by
        how often they do; "micro" counts all together; "binary" is that of label 1 out of two.
    """

    kind: ClassVar[str] = LABELS
    average: str = "macro"

    def __post_init__(self):
        if self.average not in AVERAGES:
            raise UserError(f"F1.average={self.average!r} must be one of {', '.join(AVERAGES)}.")

    def __call__(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        """As in `Metric`. Raises UserError for "binary" and other labels than 0 and 1."""
        if self.average == "binary" and not {*predictions, *references} <= {0, 1}:
            raise UserError("F1.average='binary' is for labels 0 and 1; use 'macro' for more.")
        score = _imported("sklearn.metrics").f1_score(
            references, predictions, average=self.average, zero_division=0.0
        )
        return {f"f1_{self.average}": float(score)}


@dataclasses.dataclass(frozen=True)
class Matthews(Metric):
    """Matthews' correlation of labels, -1 to 1, of CoLA for one (Matthews 1975)."""

    kind: ClassVar[str] = LABELS

    def __call__(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        """As in `Metric`."""
        score = _imported("sklearn.metrics").matthews_corrcoef(references, predictions)
        return {"matthews": float(score)}


@dataclasses.dataclass(frozen=True)
class Pearson(Metric):
    """Linear correlation, -1 to 1; NaN where all predictions or all references are alike."""

    kind: ClassVar[str] = VALUES

    def __call__(
        self, predictions: Sequence[float], references: Sequence[float]
    ) -> dict[str, float]:
        """As in `Metric`."""
        return {"pearson": _correlation("pearsonr", predictions, references)}


@dataclasses.dataclass(frozen=True)
class Spearman(Metric):
    """Correlation of the ranks, -1 to 1; NaN as for `Pearson`."""

    kind: ClassVar[str] = VALUES

    def __call__(
        self, predictions: Sequence[float], references: Sequence[float]
    ) -> dict[str, float]:
        """As in `Metric`."""
        return {"spearman": _correlation("spearmanr", predictions, references)}


def _correlation(name: str, predictions: Sequence[float], references: Sequence[float]) -> float:
    function = getattr(_imported("scipy.stats"), name)
    if not (np.ptp(predictions) and np.ptp(references)):
        return math.nan  # scipy says so too, with a warning
    # In double precision: the sums of many float32 would lose digits.
    given = (np.asarray(values, np.float64) for values in (predictions, references))
    return float(function(*given).statistic)


@dataclasses.dataclass(frozen=True)
class ExactMatch(Metric):
    """Share of the answers that are a right one, both normalised (Rajpurkar et al. 2016, §6.1)."""

    kind: ClassVar[str] = TEXT

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """As in `Metric`."""

        def is_same(prediction: str, reference: str) -> float:
            return float(normalised(prediction) == normalised(reference))

        return {"exact_match": _mean_of_best(is_same, predictions, references)}


@dataclasses.dataclass(frozen=True)
class TokenF1(Metric):
    """Mean F1 of the words that an answer and a right one share, 0 to 1, both normalised.

    The best right answer counts (Rajpurkar et al. 2016, §6.1). Where either has no words, as an
    unanswerable question's, it is 1 if both have none (Rajpurkar et al. 2018).
    """

    kind: ClassVar[str] = TEXT

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """As in `Metric`."""
        return {"token_f1": _mean_of_best(_token_f1, predictions, references)}


def _token_f1(prediction: str, reference: str) -> float:
    ours, right = normalised(prediction).split(), normalised(reference).split()
    if not ours or not right:
        return float(ours == right)
    shared = sum((collections.Counter(ours) & collections.Counter(right)).values())
    return 2 * shared / (len(ours) + len(right))


def _mean_of_best(
    score: Callable[[str, str], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> float:
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([max(score(ours, one) for one in right) for ours, right in pairs]))


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, without English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


@dataclasses.dataclass(frozen=True)
class Bleu(Metric):
    """BLEU of the whole split by sacrebleu, 0 to 100 (Papineni et al. 2002; Post 2018).

    Attributes:
      tokenizer: sacrebleu's: "13a" is WMT's, "intl" goes by Unicode, "zh" is for Chinese, "char"
        takes characters, "none" what spaces part.
    """

    kind: ClassVar[str] = TEXT
    tokenizer: str = "13a"

    def __post_init__(self):
        if self.tokenizer not in BLEU_TOKENIZERS:
            known = ", ".join(BLEU_TOKENIZERS)
            raise UserError(f"Bleu.tokenizer={self.tokenizer!r} must be one of {known}.")

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """As in `Metric`."""
        bleu = _imported("sacrebleu.metrics").BLEU(tokenize=self.tokenizer)
        streams = [list(stream) for stream in itertools.zip_longest(*references)]
        return {"bleu": float(bleu.corpus_score(list(predictions), streams).score)}


@dataclasses.dataclass(frozen=True)
class Rouge(Metric):
    """Mean F-measure of shared n-grams or of the longest common part, 0 to 1 (Lin 2004).

    Attributes:
      types: of rouge-score: "rouge1", "rouge2", …, "rougeL" of the text, "rougeLsum" by its lines.
      stems: whether English words are stemmed first.
    """

    kind: ClassVar[str] = TEXT
    types: Sequence[str] = ("rouge1", "rouge2", "rougeLsum")
    stems: bool = False

    def __post_init__(self):
        object.__setattr__(self, "types", tuple(self.types))
        if not self.types or not all(ROUGE_TYPES.fullmatch(name) for name in self.types):
            raise UserError(
                f"Rouge.types={self.types!r} must be of rouge1 to rouge9, rougeL and rougeLsum."
            )

    def __call__(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """As in `Metric`; the best right text of each counts."""
        scorer = _imported("rouge_score.rouge_scorer").RougeScorer(list(self.types), self.stems)
        scores = [
            scorer.score_multi(right, ours)
            for ours, right in zip(predictions, references, strict=True)
        ]
        return {name: float(np.mean([of[name].fmeasure for of in scores])) for name in self.types}


METRICS = (F1, Matthews, Pearson, Spearman, ExactMatch, TokenF1, Bleu, Rouge)


def check_metrics(metrics: Sequence[Any], answers: str | None, whose: str) -> None:
    """Raises UserError for a metric that doesn't compare what an objective answers."""
    suitable = [metric.__name__ for metric in METRICS if metric.kind == answers]
    remedy = f"choose of {', '.join(suitable)}" if suitable else "leave METRICS empty"
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise UserError(f"{metric!r} of {whose} isn't a metric; {remedy}.")
        if metric.kind != answers:
            raise UserError(
                f"metric {type(metric).__name__} compares {metric.kind}, and {whose} gives "
                f"{answers or 'nothing to compare'}; {remedy}."
            )


def judge(
    metrics: Sequence[Metric], predictions: Sequence[Any], references: Sequence[Any]
) -> dict[str, float]:
    """All metrics of the same answers. Raises UserError where two give one name."""
    found: dict[str, float] = {}
    for metric in metrics:
        scores = metric(predictions, references)
        if twice := found.keys() & scores.keys():
            raise UserError(f"two metrics of a task are named {min(twice)}; leave one out.")
        found |= scores
    return found


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"a metric needs {module.split('.')[0]}; install it: pip install 't5x_lite[eval]'."
        ) from error
