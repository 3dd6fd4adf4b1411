"""Several tasks in one run, each at its rate."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.data.mixing import Interleave, proportional
from t5x_lite.data.objectives.base import Sides
from t5x_lite.data.tasks import Task, Trainable, check_name, described
from t5x_lite.data.vocabularies import SentencePiece
from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class Proportional:
    """Rates by the number of examples, min(scale·n, cap)^(1/T) (Raffel et al. 2020, §3.5.2).

    Attributes:
      cap: the artificial limit K of a task's examples; None for none.
      temperature: T; 1 is proportional, large ones make all tasks alike.
      scale: of the counts, before the cap.
    """

    cap: int | None = 2**19
    temperature: float | int = 1
    scale: float | int = 1

    def __post_init__(self):
        self([1])  # refuses what isn't positive

    def __call__(self, counts: Sequence[int]) -> list[float]:
        """The rate of each count of examples."""
        return proportional(counts, self.cap, self.temperature, self.scale)


@dataclasses.dataclass(frozen=True)
class Mixture(Trainable):
    """Tasks and mixtures of them, by rate. A rate counts examples, before any packing into rows.

    Tasks with a tokenizer that is to be trained share one, trained on text of all of them; it lies
    in `data_dir/name`.

    Attributes:
      name: names the tokenizer's folder.
      parts: tasks, or mixtures whose own rates divide their share.
      rates_of: a number for each part, which needn't add up to 1, or `Proportional`.
      data_dir: folder of all prepared data.
    """

    name: str
    parts: Sequence[Trainable]
    rates_of: Sequence[float | int] | Proportional = Proportional()
    data_dir: str = "data"

    def __post_init__(self):
        check_name("mixture", self.name)
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise UserError(f"mixture {self.name} has no parts; give it tasks.")
        if not isinstance(self.rates_of, Proportional):
            object.__setattr__(self, "rates_of", tuple(self.rates_of))
            if len(self.rates_of) != len(self.parts):
                raise UserError(
                    f"mixture {self.name} has {len(self.parts)} parts and {len(self.rates_of)} "
                    f"rates; give one for each."
                )
            Interleave(self.rates_of)  # refuses what can't be rates
        self.tasks()  # refuses two tasks of one name

    def tasks(self) -> list[Task]:
        """As in `Trainable`; each with the vocabulary of the whole."""
        return self._tasks

    @functools.cached_property
    def _tasks(self) -> list[Task]:
        found: dict[str, Task] = {}
        for part in self.parts:
            for task in part.tasks():
                sharing = self._sharing(task)
                if found.setdefault(task.name, sharing) != sharing:
                    raise UserError(
                        f"mixture {self.name} has two tasks named {task.name!r}; bind Task.name "
                        f"of one of them."
                    )
        return list(found.values())

    def _sharing(self, task: Task) -> Task:
        """The task with the mixture's tokenizer, unless its own is given."""
        trained = isinstance(task.vocabulary, SentencePiece) and task.vocabulary.path is None
        return dataclasses.replace(task, vocabulary_dir=str(self.folder)) if trained else task

    @property
    def folder(self) -> Path:
        """Where the shared tokenizer lies."""
        return Path(self.data_dir) / self.name

    def for_family(self, kind: str) -> "Mixture":
        """As in `Trainable`."""
        return dataclasses.replace(self, parts=[part.for_family(kind) for part in self.parts])

    def rates(self, counts: Mapping[str, int]) -> list[float]:
        """As in `Trainable`; a task that several parts hold gets what each gives it."""
        totals = [sum(counts[task.name] for task in part.tasks()) for part in self.parts]
        own = self.rates_of(totals) if isinstance(self.rates_of, Proportional) else self.rates_of
        found = {task.name: 0.0 for task in self.tasks()}
        for part, rate in zip(self.parts, own, strict=True):
            within = part.rates(counts)
            for task, share in zip(part.tasks(), within, strict=True):
                found[task.name] += rate * share / sum(within)
        return list(found.values())

    def describe(self, split: str, sides: Sides, counts: Mapping[str, int]) -> dict[str, Any]:
        """As in `Trainable`."""
        rates = self.rates(counts)
        return {
            "mixture": self.name,
            "tasks": {
                task.name: task.describe(split, sides, counts) | {"rate": rate}
                for task, rate in zip(self.tasks(), rates, strict=True)
            },
            "rates": described(self.rates_of)
            if isinstance(self.rates_of, Proportional)
            else list(self.rates_of),
        }
