"""What a task does, as steps of datatrove's pipelines: read, judge, write, compare.

A step is called with the documents of the step before it, the task's number and how many there
are. All are frozen dataclasses, so that they reach other processes and machines by pickling, and
import datatrove where they run.
"""

import dataclasses
import gzip
import io
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5x_lite.data.curate.duplicates import DuplicateRule
from t5x_lite.data.curate.rules import Document, DocumentRule, Drop, Rule
from t5x_lite.data.curate.tally import EXAMPLES, Amount, RuleTally, Tally
from t5x_lite.data.files import write_json
from t5x_lite.data.sources import Part, Place, Record, Source
from t5x_lite.errors import UserError

Documents = Iterator[Document]
SHOW_SECONDS = 1.0
BLANK = "no text"  # the rule that every curation begins with


@dataclasses.dataclass(frozen=True)
class ReadSource:
    """Gives a task's share of a source: every so many parts, one by one."""

    source: Source
    # not shown: there may be many thousands
    parts: tuple[Part, ...] = dataclasses.field(repr=False)

    def records(self, tally: Tally, rank: int, tasks: int) -> Documents:
        """The task's documents, those without text left out and counted."""

        def on_broken(error: UserError) -> None:
            if self.source.broken != "skip":
                raise error
            tally.broken += 1
            if len(tally.broken_examples) < EXAMPLES:
                tally.broken_examples.append(str(error))

        for part in self.parts[rank::tasks]:
            for record, place in self.source.records(part, on_broken):
                try:
                    yield self._document(record, place)
                except UserError as error:
                    on_broken(error)

    def _document(self, record: Record, place: Place) -> Document:
        from datatrove.data import Document

        text = record.get("text")
        if not isinstance(text, str):
            raise UserError(
                f"{place} has no text field 'text' (it has {', '.join(sorted(record)[:8])}); bind "
                f"the source's field, such as sources.corpus.field."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: half a surrogate pair isn't text; mend it.") from error
        others = {name: value for name, value in record.items() if name not in ("text", "id")}
        # what an earlier curation wrote keeps its names
        metadata = others.pop("metadata", {})
        if not isinstance(metadata, dict):
            metadata = {"metadata": metadata}
        return Document(text=text, id=_identity(record, place), metadata=metadata | others)


def _identity(record: Record, place: Place) -> str:
    """The record's own name, else where it stands. Lines aren't counted from a big file's start,
    but from the byte at which the part begins.
    """
    if record.get("id") is not None:
        return str(record["id"])
    after = f"@{place.start}" if place.start else ""
    return f"{place.file}{after}:{place.number}" if place.unit else place.file


@dataclasses.dataclass(frozen=True)
class ReadDocuments:
    """Gives what the same task of an earlier stage has written."""

    folder: Path

    def records(self, tally: Tally, rank: int, tasks: int) -> Documents:
        """The documents in order."""
        from datatrove.data import Document

        with gzip.open(self.folder / f"{rank:05d}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield Document(**json.loads(line))


@dataclasses.dataclass(frozen=True)
class Judge:
    """Reads, applies rules in order, and counts into `folder/tallies`.

    Attributes:
      read: where the documents come from.
      rules: of one document each.
      duplicates: the rule whose findings about these documents are applied first.
      folder: the stage's.
      prepared: by the rule's title, the folder where its preparation lies.
    """

    read: ReadSource | ReadDocuments
    duplicates: DuplicateRule | None
    rules: tuple[DocumentRule, ...]
    folder: Path
    prepared: dict[str, Path]
    found: Path | None = None

    def __call__(self, data: None, rank: int, tasks: int) -> Documents:
        """Gives the documents that stay."""
        tally = Tally()
        read = _counted(self.read.records(tally, rank, tasks), tally.read)
        documents = _shown(read, self.folder / "progress" / f"{rank:05d}", tally.read)
        if isinstance(self.read, ReadSource):
            documents = _without_blank(documents, tally.rule(BLANK))
        if self.duplicates is not None:
            documents = self._without_duplicates(documents, tally, rank)
        for rule in self.rules:
            documents = _judged(rule, documents, tally, self.prepared.get(rule.title, self.folder))
        yield from _counted(documents, tally.passed)
        write_tally(self.folder, rank, tally)

    def _without_duplicates(self, documents: Documents, tally: Tally, rank: int) -> Documents:
        rule = self.duplicates
        found, counts = rule.found(self.found, rank), tally.rule(rule.title)
        for number, document in enumerate(documents):
            if number in found.cluster:
                counts.show(found.cluster[number], document, number not in found.dropped)
            if number in found.dropped:
                counts.drop(document, _size(document), Drop("a copy of a kept document"))
                continue
            if number in found.copies:
                document.metadata[rule.copies_field] = found.copies[number]
                counts.note({"kept documents that had copies": 1})
            yield document


def _counted(documents: Documents, amount: Amount) -> Documents:
    for document in documents:
        amount.add(1, _size(document))
        yield document


def _shown(documents: Documents, file: Path, read: Amount) -> Documents:
    """Writes now and then how many documents have been read, for who waits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    last = time.monotonic()
    for document in documents:
        if time.monotonic() - last > SHOW_SECONDS:
            last = time.monotonic()
            file.write_text(str(read.documents))
        yield document
    file.write_text(str(read.documents))


def _without_blank(documents: Documents, counts: RuleTally) -> Documents:
    for document in documents:
        if document.text.strip():
            yield document
        else:
            counts.drop(document, _size(document), Drop("blank"))


def _judged(rule: DocumentRule, documents: Documents, tally: Tally, folder: Path) -> Documents:
    judge, counts = rule.judge(folder), tally.rule(rule.title)
    for batch in iter(lambda: list(itertools.islice(documents, rule.batch_size)), []):
        before = [_size(document) for document in batch]
        for document, size, verdict in zip(batch, before, judge(batch), strict=True):
            if verdict is not None:
                counts.drop(document, size, verdict)
                continue
            if taken := size - _size(document):
                counts.changed.add(1, taken)
            yield document
    counts.note(_line_counts(judge))


def _line_counts(judge: Any) -> dict[str, int]:
    """What datatrove's filter counted of lines, where it's one that looks at lines."""
    datatrove_filter = getattr(judge, "filter", None)
    totals = {} if datatrove_filter is None else datatrove_filter.stats.stats
    return {
        label.replace("line-filter-", "lines dropped, ").replace("line-", "lines "): int(
            metric.total
        )
        for label, metric in totals.items()
        if label.startswith("line-")
    }


def _size(document: Document) -> int:
    return len(document.text.encode())


@dataclasses.dataclass(frozen=True)
class Write:
    """Writes documents as JSON lines, whole or not at all, and hands them on.

    datatrove's own writer isn't used: it lets a document's metadata choose the file (a field named
    "rank"), and leaves half a file when it's killed.
    """

    folder: Path

    def __call__(self, data: Documents, rank: int, tasks: int) -> Documents:
        """Gives what it has written."""
        target = self.folder / f"{rank:05d}.jsonl.gz"
        # of this process: a worker outlives a killed run for as long as its task takes
        beside = target.with_name(f"{target.name}.{os.getpid()}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        # no time and no name in the header: the same documents give the same file
        with (
            beside.open("wb") as raw,
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8") as file,
        ):
            for document in data:
                file.write(_line(document))
                yield document
        os.replace(beside, target)


def _line(document: Document) -> str:
    fields = {"text": document.text, "id": document.id, "metadata": document.metadata}
    return json.dumps(fields, ensure_ascii=False, default=str) + "\n"


@dataclasses.dataclass(frozen=True)
class Signatures:
    """Writes the signatures of documents, for a rule that compares them all."""

    rule: DuplicateRule
    folder: Path

    def __call__(self, data: Documents, rank: int, tasks: int) -> None:
        """Consumes the documents."""
        self.rule.signatures(self.folder).run(data, rank, tasks)


@dataclasses.dataclass(frozen=True)
class Compare:
    """A step over all signatures."""

    rule: DuplicateRule
    step: str
    folder: Path

    def __call__(self, data: None, rank: int, tasks: int) -> None:
        """Writes what it finds."""
        self.rule.build(self.step, self.folder).run(None, rank, tasks)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """What rules make once before the first document; and each rule tried, so that a model that
    isn't there is missed now and not in some hours.
    """

    rules: tuple[Rule, ...]
    folder: Path
    prepared: dict[str, Path]

    def __call__(self, data: None, rank: int, tasks: int) -> None:
        """Writes counts where a rule has some."""
        tally = Tally()
        for rule in self.rules:
            if isinstance(rule, DuplicateRule):
                rule.signatures(self.folder)
                continue
            folder = self.prepared.get(rule.title, self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            tally.rule(rule.title).note(rule.prepare(folder) or {})
            rule.judge(folder)
        write_tally(self.folder, rank, tally)


def write_tally(folder: Path, rank: int, tally: Tally) -> None:
    """Where the report finds it."""
    (folder / "tallies").mkdir(parents=True, exist_ok=True)
    write_json(folder / "tallies" / f"{rank:05d}.json", tally.to_json())
