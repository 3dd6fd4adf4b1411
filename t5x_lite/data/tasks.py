"""What to learn from which text: a task, and what a task and a mixture of tasks have in common."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.data.converters import Shapes
from t5x_lite.data.objectives.base import Examples, Objective, Sides
from t5x_lite.data.pipeline import Batches, Origin
from t5x_lite.data.preprocessors import Preprocessor
from t5x_lite.data.rows import FORMAT, Rows
from t5x_lite.data.sources import Source
from t5x_lite.data.task_metrics import Metric, check_metrics
from t5x_lite.data.text_store import SPLITS, Fields, TextStore
from t5x_lite.data.token_store import TokenStore
from t5x_lite.data.vocabularies import Vocabulary, VocabularyConfig, load_vocabulary
from t5x_lite.errors import UserError

EVALUATION_SEED = 0  # the same noise in every evaluation, so that its losses compare


class Trainable:
    """What a run can be trained on: a `Task`, or a `mixtures.Mixture` of several."""

    name: str

    def tasks(self) -> "list[Task]":
        """The tasks, each once."""
        raise NotImplementedError

    def rates(self, counts: Mapping[str, int]) -> list[float]:
        """How often an example of each task comes, given how many each has."""
        raise NotImplementedError

    def for_family(self, kind: str) -> "Trainable":
        """The same for models of a kind. Raises UserError where they can't learn it."""
        raise NotImplementedError

    def load_vocabulary(self) -> Vocabulary:
        """The vocabulary that all tasks share.

        Raises:
          UserError: not trained, trained for another config, or several different ones.
        """
        tasks = self.tasks()
        vocabulary = tasks[0].own_vocabulary
        for task in tasks[1:]:
            if task.own_vocabulary.fingerprint != vocabulary.fingerprint:
                raise UserError(
                    f"tasks {tasks[0].name} and {task.name} have different vocabularies "
                    f"({vocabulary.size} and {task.own_vocabulary.size} ids); one model needs one: "
                    f"give them the same, by SentencePiece.path for a trained one."
                )
        return vocabulary

    def sides(self, length: int) -> Sides:
        """Positions of a row: on each side what the task with the longest needs."""
        all_sides = [task.objective.sides(length) for task in self.tasks()]
        names = {tuple(sides) for sides in all_sides}
        if len(names) > 1:
            kinds = ", ".join(f"{t.name}: {type(t.objective).__name__}" for t in self.tasks())
            raise UserError(f"the tasks of {self.name} are for different models ({kinds}).")
        return {name: max(sides[name] for sides in all_sides) for name in all_sides[0]}

    def shapes(self, sides: Sides) -> Shapes:
        """Every entry that a row of some task has; the others' rows have zeros there."""
        shapes: Shapes = {}
        for task in self.tasks():
            shapes |= task.objective.shapes(sides)
        return shapes

    def batches(
        self,
        split: str = "train",
        *,
        batch_size: int,
        length: int,
        seed: int,
        origin: Origin = Origin(),  # noqa: B008 - frozen
    ) -> Batches:
        """Endless batches; each task is shuffled anew in each of its epochs."""
        tasks, sides = self.tasks(), self.sides(length)
        shapes = self.shapes(sides)
        rows = [task.rows(split, sides, shapes, seed) for task in tasks]

        def counts() -> dict[str, int]:
            return {task.name: len(own.examples) for task, own in zip(tasks, rows, strict=True)}

        return Batches(
            rows,
            rates=lambda: self.rates(counts()),
            batch_size=batch_size,
            seed=seed,
            is_endless=True,
            describe=lambda: self.describe(split, sides, counts()),
            origin=origin,
        )

    def evaluations(
        self,
        *,
        batch_size: int,
        length: int,
        batches: int | None = None,
        split: str = "validation",
    ) -> dict[str, Batches]:
        """For each task one pass in store order with fixed noise, filled up with empty rows."""
        sides = self.sides(length)
        shapes = self.shapes(sides)
        return {
            task.name: Batches(
                [task.rows(split, sides, shapes, EVALUATION_SEED)],
                batch_size=batch_size,
                seed=EVALUATION_SEED,
                is_endless=False,
                limit=batches,
                describe=functools.partial(task.describe, split, sides, {}),
            )
            for task in self.tasks()
        }

    def describe(self, split: str, sides: Sides, counts: Mapping[str, int]) -> dict[str, Any]:
        """What rows depend on, json-able."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Task(Trainable):
    """What to learn from which text. Stored under `data_dir/name`.

    Attributes:
      name: names the folder and seeds the noise; None: after the source.
      source: where the records come from.
      vocabulary: trained on the training text unless it says otherwise.
      objective: how records become rows.
      data_dir: folder of all prepared data.
      validation_fraction: share of records held out, chosen by a hash of their text: copies of a
        record fall on the same side, and a grown corpus keeps its split.
      validation_source: where held-out records come from instead.
      preprocessors: what is done to each record before it is stored, in this order.
      vocabulary_dir: where the trained tokenizer lies; None: in the task's own folder.
      metrics: what `eval` computes besides the loss, on the validation split.
    """

    name: str | None
    source: Source
    vocabulary: VocabularyConfig
    objective: Objective
    data_dir: str = "data"
    validation_fraction: float | int = 0.05
    validation_source: Source | None = None
    preprocessors: Sequence[Preprocessor] = ()
    vocabulary_dir: str | None = None
    metrics: Sequence[Metric] = ()

    def __post_init__(self):
        if self.name is None:
            object.__setattr__(self, "name", self.source.name)
        object.__setattr__(self, "preprocessors", tuple(self.preprocessors))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        check_name("task", self.name)
        what = f"{type(self.objective).__name__} of task {self.name}"
        check_metrics(self.metrics, self.objective.answers, what)
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction={self.validation_fraction} must lie between 0 and 1; "
                f"try 0.05."
            )

    def tasks(self) -> "list[Task]":
        """As in `Trainable`."""
        return [self]

    def rates(self, counts: Mapping[str, int]) -> list[float]:
        """As in `Trainable`."""
        return [1.0]

    def for_family(self, kind: str) -> "Task":
        """As in `Trainable`."""
        return dataclasses.replace(self, objective=self.objective.for_family(kind))

    @property
    def folder(self) -> Path:
        """Where the task's text, tokenizer and tokens lie."""
        return Path(self.data_dir) / self.name

    @property
    def vocabulary_folder(self) -> Path:
        """Where the trained tokenizer lies."""
        return self.folder if self.vocabulary_dir is None else Path(self.vocabulary_dir)

    @functools.cached_property
    def own_vocabulary(self) -> Vocabulary:
        """Raises UserError where it hasn't been trained, or was trained for another config."""
        return load_vocabulary(self.vocabulary, self.vocabulary_folder)

    def evaluation(self, **options: Any) -> Batches:
        """The only one of `evaluations`."""
        return self.evaluations(**options)[self.name]

    def rows(self, split: str, sides: Sides, shapes: Shapes, seed: int) -> Rows:
        """The rows of a split; nothing is read yet."""
        if split not in SPLITS:
            raise UserError(f"split={split!r} is unknown; use 'train' or 'validation'.")
        return Rows(
            lambda: self.examples(split, sides),
            sides=sides,
            shapes=shapes,
            packing=self.objective.packing,
            name=self.name,
            seed=seed,
            folder=lambda: self.store(split).folder,
            key=lambda: {"split": split, "objective": described(self.objective)},
        )

    def examples(self, split: str, sides: Sides) -> Examples:
        """A split's examples before packing. Raises UserError as `store` does."""
        return self.objective.examples(self.store(split), self.own_vocabulary, sides)

    def store(self, split: str) -> TokenStore:
        """The split's tokenised records.

        Raises:
          UserError: not prepared yet, or prepared from another source or vocabulary.
        """
        return self._stores(split)

    def records(self, split: str) -> Iterator[Fields]:
        """The split's stored text, in the order of `store`. Raises UserError as that does."""
        text = TextStore.open(self.folder, self.text_config)
        return itertools.chain.from_iterable(text.chunks(split))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a task lives as long as its run
    def _stores(self, split: str) -> TokenStore:
        text = TextStore.open(self.folder, self.text_config)
        tokenizer = self.objective.tokenizer
        return TokenStore.open(self.folder, split, text.digest, self.own_vocabulary, tokenizer)

    @property
    def text_config(self) -> dict[str, Any]:
        """What the stored text depends on, json-able."""
        config = {
            "source": self.source.describe(),
            "validation_fraction": float(self.validation_fraction),
            "fields": list(self.objective.tokenizer.fields),
            "preprocessors": [described(step) for step in self.preprocessors],
        }
        if self.validation_source is not None:
            config["validation_source"] = self.validation_source.describe()
        return config

    def describe(self, split: str, sides: Sides, counts: Mapping[str, int]) -> dict[str, Any]:
        """As in `Trainable`."""
        store = self.store(split)
        return {
            "format": FORMAT,
            "task": self.name,
            "split": split,
            "data": store.digest,
            "records": len(store),
            "vocabulary": self.own_vocabulary.fingerprint,
            "vocabulary_size": self.own_vocabulary.size,
            "objective": described(self.objective),
            "sides": dict(sides),
        }


def described(config: Any) -> dict[str, Any]:
    """A frozen config as JSON, with its type's name."""
    return {"name": type(config).__name__} | json.loads(json.dumps(dataclasses.asdict(config)))


def check_name(what: str, name: str) -> None:
    """Raises UserError for a name that can't be a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"{what} name {name!r} must be letters, digits, '_', '-' and '.'.")
