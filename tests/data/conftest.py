import dataclasses

import numpy as np
import pytest
from rich.console import Console

from t5x_lite.data.objectives import CausalLM
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import Text
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes


@dataclasses.dataclass
class InMemory:
    """Documents without a disk, for the parts that only read."""

    rows: list

    @property
    def offsets(self):
        return np.cumsum([0, *(len(row) for row in self.rows)]).astype(np.uint64)

    def slice(self, start, stop):
        return np.concatenate([np.zeros(0), *self.rows]).astype(np.int32)[start:stop]

    def column(self, name):
        assert name == "text"
        return self


def paragraphs(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["over", "the", "hills", "and", "far", "away", "tom", "piper", "played", "é", "🙂"]
    lines = [" ".join(rng.choice(words, rng.integers(3, 30))) for _ in range(count)]
    return [f"{number}: {line}" for number, line in enumerate(lines)]


@pytest.fixture
def in_memory():
    return InMemory


@pytest.fixture
def quiet():
    return Console(quiet=True)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("\n\n".join(paragraphs(60)))
    return file


@pytest.fixture
def byte_task(tmp_path, corpus):
    """Not prepared."""
    return Task("hills", Text(str(corpus)), Bytes(), CausalLM(), str(tmp_path / "data"), 0.2)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared task; replace its objective to get others on the same store."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "corpus.txt").write_text("\n\n".join(paragraphs(60)))
    source = Text(str(folder / "corpus.txt"))
    task = Task("hills", source, Bytes(), CausalLM(), str(folder / "data"), 0.2)
    prepare(task, Console(quiet=True))
    return task
