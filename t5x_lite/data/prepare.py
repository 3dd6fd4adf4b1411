"""From a source to stored tokens: text, tokenizer, tokens. Each stage runs once, all or nothing.

Every stage streams: memory is bounded by the longest document, the tokenizer's sample and four
bytes per document.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from t5x_lite.data.files import difference, lock, read_json, write_file, write_json
from t5x_lite.data.store import SPLITS, TextStore, tokens_name, write_text, write_tokens
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import SentencePiece, Vocabulary, load_vocabulary
from t5x_lite.errors import UserError

SAMPLE_SEED = 0  # which documents train the tokenizer
PLAIN_PERIOD = 10.0  # seconds between lines of progress where there is no terminal


def prepare(task: Task, console: Console | None = None) -> None:
    """Makes what is missing of a task's text, tokenizer and tokens, and says what was there.

    Raises:
      UserError: the source, the disk or the vocabulary's size won't do; nothing is left half-made.
    """
    report = _Report(task.name, console or Console())
    with lock(task.folder):
        text = _ensure_text(task, report)
        vocabulary = _ensure_tokenizer(task, text, report)
        _ensure_tokens(task, text, vocabulary, report)


def train_tokenizer(task: Task, console: Console | None = None) -> None:
    """Makes the task's text store where it's missing, and its tokenizer.

    Raises:
      UserError: as `prepare`.
    """
    report = _Report(task.name, console or Console())
    with lock(task.folder):
        _ensure_tokenizer(task, _ensure_text(task, report), report)


class _Report:
    """Progress of the stages: a live bar on a terminal, else a line every ten seconds."""

    def __init__(self, name: str, console: Console):
        self._name, self._console = name, console

    def say(self, message: str) -> None:
        # `soft_wrap`: paths and numbers are to be copied, so lines aren't broken at 80 columns
        self._console.print(
            f"{self._name}: {message}", soft_wrap=True, highlight=False, markup=False
        )

    @contextlib.contextmanager
    def stage(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Gives a function to call with what is done so far, out of `total`."""
        if self._console.is_terminal:
            with Progress(console=self._console, transient=True) as bar:
                line = bar.add_task(f"{self._name}: {what}", total=total)
                yield lambda done: bar.update(line, completed=done)
            return
        last = time.monotonic()

        def advance(done: int) -> None:
            nonlocal last
            if time.monotonic() - last > PLAIN_PERIOD:
                last = time.monotonic()
                share = f"{done / total:.0%}" if total else f"{done:,}"
                self.say(f"{what}: {share}")

        self.say(what)
        yield advance


def _ensure_text(task: Task, report: _Report) -> TextStore:
    folder = task.folder / "text"
    if (folder / "made_from.json").exists():
        text = TextStore.open(task.folder, task.text_config)
        _refuse_changed_input(task, text)
        report.say(f"text is there: {folder}, {_counts(text)}")
        return text
    if folder.exists():
        raise UserError(f"{folder} isn't a text store; delete it or give the task another name.")
    started = time.monotonic()
    with report.stage("storing text", task.source.total_bytes()) as advance:
        _split_and_write(task, advance)
    text = TextStore.open(task.folder, task.text_config)
    report.say(f"text: {_counts(text)}, {time.monotonic() - started:.1f} s")
    return text


def _counts(text: TextStore) -> str:
    megabytes = sum(map(text.size, SPLITS)) / 1e6
    train, validation = map(text.count, SPLITS)
    return f"{train:,} + {validation:,} documents, {megabytes:.1f} MB"


def _refuse_changed_input(task: Task, text: TextStore) -> None:
    """A pod has the store and perhaps not the source: only an input that's there can differ."""
    try:
        now = task.source.stamp()
    except UserError:
        return
    before = text.made_from["stamp"]
    if now != before:
        raise UserError(
            f"the input of {text.folder} changed since ({difference(before, now)}); delete "
            f"{task.folder} to prepare again, or give the task another name."
        )


def _split_and_write(task: Task, advance: Callable[[int], None]) -> None:
    about = {"config": task.text_config, "stamp": task.source.stamp()}
    low, high = 2**64, -1

    def hashed(text: str) -> int:
        nonlocal low, high
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        low, high = min(low, value), max(high, value)
        return value

    def write(threshold: int) -> dict[str, int]:
        documents = _watched(task.source.documents(), advance)
        return write_text(
            task.folder,
            documents,
            lambda text: "validation" if hashed(text) < threshold else "train",
            about,
        )

    counts = write(int(task.validation_fraction * 2**64))
    if all(counts.values()):
        return
    if low >= high:  # none, or all of them copies of one
        raise UserError(
            f"{task.source.place()} has {sum(counts.values())} documents, {int(high >= 0)} "
            f"different; train and validation need one each: give more text or end documents "
            f"otherwise (Text.documents_by)."
        )
    # Few documents: the fraction left one split empty, so it gets the one nearest to it.
    write(low + 1 if counts["validation"] == 0 else high)


def _watched(documents: Iterator[tuple[str, int]], advance: Callable[[int], None]) -> Iterator[str]:
    for number, (text, read) in enumerate(documents):
        if number % 256 == 0:
            advance(read)
        yield text


def _ensure_tokenizer(task: Task, text: TextStore, report: _Report) -> Vocabulary:
    config = task.vocabulary
    if not isinstance(config, SentencePiece) or config.path is not None:
        vocabulary = task.load_vocabulary()
        report.say(f"vocabulary is there: {vocabulary.size:,} ids")
        return vocabulary
    model = task.folder / "tokenizer.model"
    if model.exists():
        vocabulary = load_vocabulary(config, task.folder)
        _refuse_other_text(model, text)
        report.say(f"tokenizer is there: {model}, {vocabulary.size:,} ids")
        return vocabulary
    started = time.monotonic()
    with report.stage(f"training the {config.model_type} tokenizer", None):
        content = config.train(_sampled_lines(text, config.sample))
        about = {"config": dataclasses.asdict(config), "text": text.digest}
        # The model goes last: where it is, all of it is.
        write_json(task.folder / "tokenizer.json", about)
        write_file(model, content)
    vocabulary = load_vocabulary(config, task.folder)
    report.say(f"tokenizer: {vocabulary.size:,} ids, {time.monotonic() - started:.1f} s")
    return vocabulary


def _refuse_other_text(model: Path, text: TextStore) -> None:
    about = read_json(model.with_name("tokenizer.json")) or {}
    if about.get("text") != text.digest:
        raise UserError(
            f"{model} was trained on another text than {text.folder}; delete it to train again, or "
            f"bind SentencePiece.path to keep it."
        )


def _sampled_lines(text: TextStore, budget: int) -> Iterator[str]:
    """Lines of random training documents until `budget` bytes; memory follows the sample."""
    documents = text.count("train")
    average = max(1, text.size("train") // documents)
    wanted = min(documents, 2 * budget // average + 100)
    order = np.random.default_rng(SAMPLE_SEED).choice(documents, wanted, replace=False)
    for document in itertools.chain.from_iterable(text.chunks("train", map(int, order))):
        for line in document.split("\n"):
            if line:
                yield line
        budget -= len(document.encode())
        if budget <= 0:
            return


def _ensure_tokens(task: Task, text: TextStore, vocabulary: Vocabulary, report: _Report) -> None:
    folder = task.folder / tokens_name(text.digest, vocabulary)
    if not (folder / "made_from.json").exists():
        if folder.exists():
            raise UserError(f"{folder} isn't a token store; delete it and prepare again.")
        started = time.monotonic()
        with report.stage("storing tokens", sum(map(text.count, SPLITS))) as advance:
            chunks = _counted(text, advance)
            write_tokens(task.folder, text.digest, vocabulary, chunks)
        took = f", {time.monotonic() - started:.1f} s"
    else:
        took = " are there"
    splits = (read_json(folder / "made_from.json") or {})["splits"]
    train, validation = (splits[split]["tokens"] for split in SPLITS)
    report.say(f"tokens{took}: {folder}, {train:,} + {validation:,}")


def _counted(text: TextStore, advance: Callable[[int], None]) -> dict[str, Iterator[list[str]]]:
    done = 0

    def counted(split: str) -> Iterator[list[str]]:
        nonlocal done
        for chunk in text.chunks(split):
            yield chunk
            done += len(chunk)
            advance(done)

    return {split: counted(split) for split in SPLITS}
