"""A task: a source of text, a vocabulary and an objective, under one name."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from t5x_lite.data.objectives import Examples, Objective
from t5x_lite.data.pipeline import Batches
from t5x_lite.data.sources import Source
from t5x_lite.data.store import SPLITS, TextStore, TokenStore
from t5x_lite.data.vocabularies import Vocabulary, VocabularyConfig, load_vocabulary
from t5x_lite.errors import UserError

EVALUATION_SEED = 0  # the same noise in every evaluation, so that its losses compare


@dataclasses.dataclass(frozen=True)
class Task:
    """What to learn from which text. Stored under `data_dir/name`.

    Attributes:
      name: names the folder and seeds the noise; None: after the source.
      source: where the documents come from.
      vocabulary: trained on the training documents unless it says otherwise.
      objective: how documents become rows.
      data_dir: folder of all prepared data.
      validation_fraction: share of documents held out, chosen by a hash of their text: copies of a
        document fall on the same side, and a grown corpus keeps its split.
    """

    name: str | None
    source: Source
    vocabulary: VocabularyConfig
    objective: Objective
    data_dir: str = "data"
    validation_fraction: float | int = 0.05

    def __post_init__(self):
        if self.name is None:
            object.__setattr__(self, "name", self.source.name)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise UserError(f"task name {self.name!r} must be letters, digits, '_', '-' and '.'.")
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction={self.validation_fraction} must lie between 0 and 1; "
                f"try 0.05."
            )

    @property
    def folder(self) -> Path:
        """Where the task's text, tokenizer and tokens lie."""
        return Path(self.data_dir) / self.name

    def load_vocabulary(self) -> Vocabulary:
        """Raises UserError where it hasn't been trained, or was trained for another config."""
        return self._vocabulary

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return load_vocabulary(self.vocabulary, self.folder)

    def batches(self, split: str = "train", *, batch_size: int, length: int, seed: int) -> Batches:
        """Endless batches, reshuffled every epoch."""
        return self._batches(split, batch_size, length, seed=seed, is_endless=True)

    def evaluation(
        self,
        *,
        batch_size: int,
        length: int,
        batches: int | None = None,
        split: str = "validation",
    ) -> Batches:
        """One pass in store order with fixed noise; the last batch is filled with empty rows."""
        return self._batches(
            split, batch_size, length, seed=EVALUATION_SEED, is_endless=False, limit=batches
        )

    def _batches(self, split: str, batch_size: int, length: int, **order: Any) -> Batches:
        if split not in SPLITS:
            raise UserError(f"split={split!r} is unknown; use 'train' or 'validation'.")
        return Batches(
            functools.partial(self._examples, split, length),
            row_shapes=self.objective.shapes(length),
            batch_size=batch_size,
            name=self.name,
            describe=functools.partial(self._describe, split, length),
            **order,
        )

    def _examples(self, split: str, length: int) -> Examples:
        return self.objective.examples(self.documents(split), self.load_vocabulary(), length)

    def documents(self, split: str) -> TokenStore:
        """The split's tokenised documents.

        Raises:
          UserError: not prepared yet, or prepared from another source or vocabulary.
        """
        text = TextStore.open(self.folder, self.text_config)
        return TokenStore.open(self.folder, split, text.digest, self.load_vocabulary())

    @property
    def text_config(self) -> dict[str, Any]:
        """What the stored text depends on, json-able."""
        return {
            "source": self.source.describe(),
            "validation_fraction": float(self.validation_fraction),
        }

    def _describe(self, split: str, length: int) -> dict[str, Any]:
        documents = self.documents(split)
        return {
            "task": self.name,
            "split": split,
            "data": documents.digest,
            "documents": len(documents.lengths),
            "tokens": int(documents.lengths.sum()),
            "vocabulary": self.load_vocabulary().fingerprint,
            "vocabulary_size": self.load_vocabulary().size,
            "objective": {"name": type(self.objective).__name__}
            | dataclasses.asdict(self.objective),
            "length": length,
        }
