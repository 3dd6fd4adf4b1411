"""From sources to stored tokens: text, tokenizer, tokens.

Text and tokens are made in shards, one for each part of the source, by as many processes as there
are cores. A shard is whole or not there; a run that was killed goes on with the shards that are
missing, and a store takes its name when all are there. Memory is bounded by the longest record in
each process and by the tokenizer's sample.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from t5x_lite.data import text_store, token_store
from t5x_lite.data.files import difference, disk_errors, lock, read_json, write_file, write_json
from t5x_lite.data.sources import Part, Source
from t5x_lite.data.tasks import Task, Trainable
from t5x_lite.data.text_store import SPLITS, TextShard, TextStore
from t5x_lite.data.token_store import TokenShard, tokens_name
from t5x_lite.data.vocabularies import SentencePiece, Vocabulary, load_vocabulary
from t5x_lite.errors import UserError

SAMPLE_SEED = 0  # which records train the tokenizer
PLAIN_PERIOD = 10.0  # seconds between lines of progress where there is no terminal


def prepare(task: Trainable, console: Console | None = None, workers: int | None = None) -> None:
    """Makes what is missing of each task's text, tokenizer and tokens, and says what was there.

    Args:
      task: a task, or a mixture.
      console: where progress goes; None: standard output.
      workers: processes; None: one for each core.

    Raises:
      UserError: the source, the disk or the vocabulary's size won't do. Finished shards stay, for
        the same command to go on with.
    """
    console, workers = console or Console(), _checked(workers)
    texts = _ensure_texts(task, console, workers)
    _ensure_tokenizer(task, texts, console)
    for own, text in zip(task.tasks(), texts, strict=True):
        with lock(own.folder):
            _ensure_tokens(own, text, _Report(own.name, console), workers)


def train_tokenizer(
    task: Trainable, console: Console | None = None, workers: int | None = None
) -> None:
    """Makes the text stores where they are missing, and the tokenizer.

    Args:
      task: a task, or a mixture.
      console: where progress goes; None: standard output.
      workers: processes; None: one for each core.

    Raises:
      UserError: as `prepare`.
    """
    console, workers = console or Console(), _checked(workers)
    _ensure_tokenizer(task, _ensure_texts(task, console, workers), console)


def _checked(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1.")
    return workers


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


# --- shards --------------------------------------------------------------------------------------


# One worker's work: `write` makes it, and then the file `done` is there.
Shard = TextShard | TokenShard


def write_shards(
    shards: Sequence[Shard], sizes: Sequence[int], workers: int, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Writes those that aren't there; gives what is to be said of each.

    Raises:
      UserError: of the first shard that fails; those under way are finished.
    """
    missing = [shard for shard in shards if not shard.done.exists()]
    todo = sum(sizes[shard.number] for shard in missing)
    done = sum(sizes) - todo
    advance(done)
    for shard in _written(missing, min(workers, len(missing))):
        done += sizes[shard.number]
        advance(done)
    return [read_json(shard.done) for shard in shards]


def _written(shards: Sequence[Shard], workers: int) -> Iterator[Shard]:
    if workers <= 1:
        for shard in shards:
            shard.write()
            yield shard
        return
    # Spawned: the parent may hold threads of JAX, which don't survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_follow, initargs=(os.getpid(),)
    )
    with pool:
        futures = {pool.submit(_write, shard): shard for shard in shards}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, perhaps for want of memory; finished shards stay: run the "
                "same command again, with fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _follow(parent: int) -> None:
    """Ctrl-C is the parent's to handle. Killed, it leaves no worker that writes beside the next."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write(shard: Shard) -> None:
    shard.write()


@contextlib.contextmanager
def _gathered(target: Path, made_of: dict[str, Any]) -> Iterator[Path]:
    """A folder where a store's shards gather, which becomes `target` when the block ends well.

    Shards of the same things that a killed run finished are still there.
    """
    folder = target.with_name(target.name + ".partial")
    plan = folder / "plan.json"
    if read_json(plan) != made_of:
        shutil.rmtree(folder, ignore_errors=True)
        with disk_errors(folder):
            (folder / "shards").mkdir(parents=True)
        write_json(plan, made_of)
    try:
        yield folder
    except BaseException:
        if not any((folder / "shards").glob("*.json")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    with disk_errors(target):
        shutil.rmtree(folder / "shards")
        plan.unlink()
        os.replace(folder, target)


# --- text ----------------------------------------------------------------------------------------


def _ensure_texts(data: Trainable, console: Console, workers: int) -> list[TextStore]:
    texts = []
    for task in data.tasks():
        with lock(task.folder):
            texts.append(_ensure_text(task, _Report(task.name, console), workers))
    return texts


def _ensure_text(task: Task, report: _Report, workers: int) -> TextStore:
    folder = task.folder / "text"
    if (folder / "made_from.json").exists():
        text = TextStore.open(task.folder, task.text_config)
        _refuse_changed_input(task, text)
        report.say(f"text is there: {folder}, {_counts(text)}")
        return text
    if folder.exists():
        raise UserError(f"{folder} isn't a text store; delete it or give the task another name.")
    started = time.monotonic()
    _write_text(task, report, workers)
    text = TextStore.open(task.folder, task.text_config)
    report.say(f"text: {_counts(text)}, {time.monotonic() - started:.1f} s")
    if left := task.source.left_out():
        report.say("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in left.items()))
    if skipped := text.made_from["skipped"]:
        report.say(f"skipped {skipped:,} broken records: {'; '.join(text.made_from['broken'])}")
    return text


def _counts(text: TextStore) -> str:
    megabytes = sum(map(text.size, SPLITS)) / 1e6
    train, validation = map(text.count, SPLITS)
    return f"{train:,} + {validation:,} records, {megabytes:.1f} MB"


def _stamp(task: Task) -> dict[str, str]:
    held_out = task.validation_source
    return task.source.stamp() | ({} if held_out is None else held_out.stamp())


def _refuse_changed_input(task: Task, text: TextStore) -> None:
    """A pod has the store and perhaps not the source: only an input that's there can differ."""
    try:
        now = _stamp(task)
    except UserError:
        return
    before = text.made_from["stamp"]
    if now != before:
        raise UserError(
            f"the input of {text.folder} changed since ({difference(before, now)}); delete "
            f"{task.folder} to prepare again, or give the task another name."
        )


def _write_text(task: Task, report: _Report, workers: int) -> None:
    about = {"config": task.text_config, "stamp": _stamp(task)}
    parts = _parts(task)
    threshold = int(task.validation_fraction * 2**64)
    fields = tuple(task.objective.tokenizer.fields)
    made_of = about | {"parts": _digest(parts)}
    with _gathered(task.folder / "text", made_of) as folder:

        def write() -> list[dict[str, Any]]:
            shards = [
                TextShard(
                    folder,
                    number,
                    len(parts),
                    source,
                    part,
                    task.preprocessors,
                    fields,
                    split,
                    threshold,
                )
                for number, (source, part, split) in enumerate(parts)
            ]
            sizes = [part.size for _, part, _ in parts]
            with report.stage("storing text", sum(sizes)) as advance:
                return write_shards(shards, sizes, workers, advance)

        shards = write()
        if not all(_split_counts(shards).values()):
            for done in (folder / "shards").iterdir():
                done.unlink()
            threshold = _other_threshold(task, shards)
            shards = write()
        text_store.finish(folder, fields, shards, about)


def _parts(task: Task) -> list[tuple[Source, Part, str | None]]:
    """What each shard reads, and which split that is where the source decides."""
    held_out = task.validation_source
    if held_out is None:
        return [(task.source, part, None) for part in task.source.parts()]
    return [(task.source, part, "train") for part in task.source.parts()] + [
        (held_out, part, "validation") for part in held_out.parts()
    ]


def _digest(parts: Sequence[tuple[Source, Part, str | None]]) -> str:
    named = [(part.pieces, split) for _, part, split in parts]
    return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def _split_counts(shards: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {split: sum(shard["documents"][split] for shard in shards) for split in SPLITS}


def _other_threshold(task: Task, shards: Sequence[dict[str, Any]]) -> int:
    """Few records: the fraction left one split empty, so it gets the one nearest to it.

    Raises:
      UserError: there are no two different ones, or the sources decide.
    """
    counts = _split_counts(shards)
    low = min((shard["low"] for shard in shards), default=0)
    high = max((shard["high"] for shard in shards), default=-1)
    if task.validation_source is not None:
        empty = next(split for split in SPLITS if not counts[split])
        source = task.source if empty == "train" else task.validation_source
        raise UserError(f"{source.place()} has no records for the {empty} split; give it some.")
    if low >= high:  # none, or all of them copies of one
        raise UserError(
            f"{task.source.place()} has {sum(counts.values())} records, {int(high >= 0)} "
            f"different; train and validation need one each: give more text, or end documents "
            f"otherwise (Text.documents_by)."
        )
    return low + 1 if counts["validation"] == 0 else high


# --- tokenizer -----------------------------------------------------------------------------------


def _ensure_tokenizer(data: Trainable, texts: Sequence[TextStore], console: Console) -> None:
    """One for each folder that tasks look for theirs in: a mixture's tasks share one."""
    tasks = data.tasks()
    folders = dict.fromkeys(task.vocabulary_folder for task in tasks)
    for folder in folders:
        own = [task for task in tasks if task.vocabulary_folder == folder]
        report = _Report(data.name if len(folders) == 1 else own[0].name, console)
        held = [text for task, text in zip(tasks, texts, strict=True) if task in own]
        config = own[0].vocabulary
        different = next((task for task in own if task.vocabulary != config), None)
        if different is not None:
            raise UserError(
                f"tasks {own[0].name} and {different.name} share the tokenizer of {folder} but "
                f"configure it differently; bind the same vocabulary to both."
            )
        with lock(folder):
            _ensure_one(config, folder, held, report)


def _ensure_one(
    config: Any, folder: Path, texts: Sequence[TextStore], report: _Report
) -> Vocabulary:
    if not isinstance(config, SentencePiece) or config.path is not None:
        vocabulary = load_vocabulary(config, folder)
        report.say(f"vocabulary is there: {vocabulary.size:,} ids")
        return vocabulary
    model, digest = folder / "tokenizer.model", _text_digest(texts)
    if model.exists():
        vocabulary = load_vocabulary(config, folder)
        _refuse_other_text(model, texts)
        report.say(f"tokenizer is there: {model}, {vocabulary.size:,} ids")
        return vocabulary
    started = time.monotonic()
    with report.stage(f"training the {config.model_type} tokenizer", None):
        content = config.train(_sampled_lines(texts, config.sample))
        about = {"config": dataclasses.asdict(config), "text": digest}
        # The model goes last: where it is, all of it is.
        write_json(folder / "tokenizer.json", about)
        write_file(model, content)
    vocabulary = load_vocabulary(config, folder)
    report.say(f"tokenizer: {vocabulary.size:,} ids, {time.monotonic() - started:.1f} s")
    return vocabulary


def _text_digest(texts: Sequence[TextStore]) -> str:
    return "+".join(text.digest for text in texts)


def _refuse_other_text(model: Path, texts: Sequence[TextStore]) -> None:
    about = read_json(model.with_name("tokenizer.json")) or {}
    if about.get("text") != _text_digest(texts):
        places = ", ".join(str(text.folder) for text in texts)
        raise UserError(
            f"{model} was trained on another text than {places}; delete it to train again, or "
            f"bind SentencePiece.path to keep it."
        )


def _sampled_lines(texts: Sequence[TextStore], budget: int) -> Iterator[str]:
    """Lines of random training records until `budget` bytes, of each text in equal parts."""
    for text in texts:
        yield from _lines_of(text, budget // len(texts))


def _lines_of(text: TextStore, budget: int) -> Iterator[str]:
    records = text.count("train")
    average = max(1, text.size("train") // records)
    wanted = min(records, 2 * budget // average + 100)
    order = np.random.default_rng(SAMPLE_SEED).choice(records, wanted, replace=False)
    for record in itertools.chain.from_iterable(text.chunks("train", map(int, order))):
        for line in "\n".join(record.values()).split("\n"):
            if budget <= 0:
                return
            budget -= len(line.encode()) + 1
            if line:
                yield line


# --- tokens --------------------------------------------------------------------------------------


def _ensure_tokens(task: Task, text: TextStore, report: _Report, workers: int) -> None:
    vocabulary, tokenizer = task.own_vocabulary, task.objective.tokenizer
    folder = task.folder / tokens_name(text.digest, vocabulary, tokenizer)
    took = " are there"
    if not (folder / "made_from.json").exists():
        if folder.exists():
            raise UserError(f"{folder} isn't a token store; delete it and prepare again.")
        started = time.monotonic()
        _write_tokens(task, text, folder, report, workers)
        took = f", {time.monotonic() - started:.1f} s"
    tokens = (read_json(folder / "made_from.json") or {})["tokens"]
    report.say(f"tokens{took}: {folder}, {tokens['train']:,} + {tokens['validation']:,}")


def _write_tokens(task: Task, text: TextStore, target: Path, report: _Report, workers: int) -> None:
    vocabulary, tokenizer = task.own_vocabulary, task.objective.tokenizer
    made_of = {"text": text.digest, "vocabulary": vocabulary.fingerprint}
    sizes = [sum(shard.values()) for shard in text.shards]
    with _gathered(target, made_of) as folder:
        shards = [
            TokenShard(folder, number, text, task.vocabulary, task.vocabulary_folder, tokenizer)
            for number in range(len(text.shards))
        ]
        with report.stage("storing tokens", sum(sizes)) as advance:
            about = write_shards(shards, sizes, workers, advance)
        token_store.finish(folder, text.digest, vocabulary, tokenizer, about)
