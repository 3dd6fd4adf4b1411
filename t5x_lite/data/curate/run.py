"""Curation: a source's documents through rules, as stages that datatrove runs and can resume."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from t5x_lite.data.curate.duplicates import DuplicateRule
from t5x_lite.data.curate.executors import Advance, Executor, Local, Stage, check_installed
from t5x_lite.data.curate.report import Finish
from t5x_lite.data.curate.rules import DocumentRule, Rule
from t5x_lite.data.curate.steps import (
    BLANK,
    Compare,
    Judge,
    Prepare,
    ReadDocuments,
    ReadSource,
    Signatures,
    Write,
)
from t5x_lite.data.files import difference, lock, read_json, write_json
from t5x_lite.data.sources import Part, Source
from t5x_lite.errors import UserError

PLAIN_PERIOD = 10.0  # seconds between lines of progress where there is no terminal


def curate(
    source: Source,
    out: str,
    rules: tuple[Any, ...] | list[Any],
    executor: Executor = Local(),  # noqa: B008  (frozen)
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Writes the documents that all rules keep to `out/*.jsonl.gz`, and what went to a report.

    The same call after a kill goes on: tasks that were done aren't done again.

    Args:
      source: where the documents come from.
      out: a folder of its own, on a file system that all workers see.
      rules: in the order in which they are applied, cheap ones first; tuples of rules may stand
        among them.
      executor: where it runs.
      console: where to say what happens.

    Returns:
      The report, as in `out/report.json`; None where an executor has only submitted the work.

    Raises:
      UserError: `out` holds something else; a rule can't have what it needs; a broken record, where
        the source isn't told to skip those.
    """
    check_installed()
    folder, rules = _checked(out, rules)
    say = _Voice(f"curate {source.name}", console or Console())
    with _disk_errors(folder), lock(folder):
        parts = source.parts()
        settings = _settings(source, rules, min(executor.tasks, len(parts)))
        if (report := _finished(folder, settings)) is not None:
            say(f"{folder}/report.json is there")
            return report
        stages = plan(source, parts, rules, folder, settings)
        if not executor.run(stages, say.stage):
            say(f"submitted; the last job writes {folder}/report.md")
            return None
        report = read_json(folder / "report.json")
        _remove_work(folder)
    read, kept = report["input"]["documents"], report["kept"]["documents"]
    say(f"kept {kept:,} of {read:,} documents; {folder}/report.md says why the others went")
    return report


def plan(
    source: Source,
    parts: list[Part],
    rules: tuple[Rule, ...],
    folder: Path,
    settings: dict[str, Any],
) -> list[Stage]:
    """The stages, in order.

    Rules of one document each run together. A rule over all documents ends a stage, which stores
    its documents and their signatures; other stages compare those; and the next one drops what they
    found before its own rules.
    """
    folder = folder.absolute()  # a worker's own folder may be another
    work, tasks = folder / "work", settings["tasks"]
    prepared = {
        rule.title: work / "prepared" / str(number)
        for number, rule in enumerate(rules)
        if isinstance(rule, DocumentRule) and rule.needs_preparation
    }
    first = work / "prepare"
    stages = [Stage("preparing the rules", (Prepare(rules, first, prepared),), 1, first)]
    read, before, found = ReadSource(source, tuple(parts)), None, None
    tallied = [first]
    for number, (judges, compared) in enumerate(_segments(rules)):
        here = work / f"{number}-documents"
        judge = Judge(read, before, judges, here, prepared, found)
        steps = (judge, Write(here / "documents"))
        names = [rule.title for rule in (before, *judges) if rule is not None]
        if compared is not None:
            found = work / f"{number}-{compared.copies_field}"
            steps += (Signatures(compared, found),)
        stages.append(Stage(f"applying {', '.join(names) or 'no rule'}", steps, tasks, here))
        if compared is not None:
            stages += _comparing(compared, found)
        read, before = ReadDocuments(here / "documents"), compared
        tallied.append(here)
    finish = Finish(folder, read.folder, tuple(tallied), settings)
    return [*stages, Stage("writing the report", (finish,), 1, work / "finish")]


def _segments(
    rules: tuple[Rule, ...],
) -> Iterator[tuple[tuple[DocumentRule, ...], DuplicateRule | None]]:
    """Rules of one document each, with the rule over all documents that follows them."""
    judges: list[DocumentRule] = []
    for rule in rules:
        if isinstance(rule, DuplicateRule):
            yield tuple(judges), rule
            judges = []
        else:
            judges.append(rule)
    yield tuple(judges), None


def _comparing(rule: DuplicateRule, folder: Path) -> Iterator[Stage]:
    for step in rule.steps():
        steps = (Compare(rule, step.name, folder),)
        name = f"{rule.title}: {step.name}"
        yield Stage(name, steps, step.tasks, folder / step.name)


def flat(rules: tuple[Any, ...] | list[Any]) -> Iterator[Rule]:
    """The rules in order. Raises UserError where something else stands among them."""
    for one in rules:
        if isinstance(one, tuple | list):
            yield from flat(one)
        elif isinstance(one, Rule):
            yield one
        else:
            raise UserError(f"{one!r} is among the rules, but is none; curate.Language() is one.")


def _checked(out: str, rules: tuple[Any, ...] | list[Any]) -> tuple[Path, tuple[Rule, ...]]:
    if "://" in out:
        raise UserError(
            f"out={out!r} must be a folder of a file system that all workers see; copy it from "
            f"there when it's done."
        )
    rules = tuple(flat(rules))
    titles = [rule.title for rule in rules]
    if not titles:
        raise UserError("rules is empty, so nothing would be dropped; name at least one rule.")
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"{titles.count(title)} rules are called {title!r}; give each a name.")
    return Path(out), rules


def _settings(source: Source, rules: tuple[Rule, ...], tasks: int) -> dict[str, Any]:
    """All that the result depends on, json-able."""
    settings = {
        "name": source.name,
        "source": source.describe(),
        "stamp": source.stamp(),
        "left_out": source.left_out(),
        # the number of tasks too: it says which documents are compared in which order
        "tasks": tasks,
        "order": [BLANK, *(rule.title for rule in rules)],
        "rules": {BLANK: {}} | {rule.title: _rule_settings(rule) for rule in rules},
    }
    return json.loads(json.dumps(settings, default=str))


def _rule_settings(rule: Rule) -> dict[str, Any]:
    values = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    if "sources" in values:
        values["sources"] = [source.describe() for source in values["sources"]]
        values["stamps"] = [source.stamp() for source in rule.sources]
    return {"rule": type(rule).__name__} | values


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The report where all is done. Raises UserError where the folder isn't this curation's."""
    report = read_json(folder / "report.json")
    begun = report["settings"] if report else read_json(folder / "work" / "settings.json")
    if begun is None:
        if any(folder.glob("*.jsonl.gz")):
            raise UserError(f"{folder} holds other documents; choose a folder of its own (out).")
        (folder / "work").mkdir(parents=True, exist_ok=True)
        write_json(folder / "work" / "settings.json", settings)
    elif begun != settings:
        raise UserError(
            f"{folder} holds another curation ({difference(begun, settings)}); delete it, or "
            f"choose another folder (out)."
        )
    return report


def _remove_work(folder: Path) -> None:
    """Frees what was only needed on the way. Logs stay."""
    for place in (folder / "work").iterdir():
        if place.is_dir():
            for inner in ("documents", "signatures", "pairs"):
                shutil.rmtree(place / inner, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"can't work in {folder}: {error.strerror or error}; free space or mend it, and run "
            f"the same command again."
        ) from error


class _Voice:
    """Progress of the stages: a live bar on a terminal, else a line every ten seconds."""

    def __init__(self, name: str, console: Console):
        self._name, self._console = name, console

    def __call__(self, message: str) -> None:
        # `soft_wrap`: paths are to be copied, so lines aren't broken at 80 columns
        self._console.print(
            f"{self._name}: {message}", soft_wrap=True, highlight=False, markup=False
        )

    @contextlib.contextmanager
    def stage(self, what: str, total: int) -> Iterator[Advance]:
        """Gives a function to call with the tasks done and the documents read so far."""
        if self._console.is_terminal:
            with Progress(console=self._console, transient=True) as bar:
                line = bar.add_task(f"{self._name}: {what}", total=total)

                def show(done: int, read: int) -> None:
                    text = f"{self._name}: {what}{_documents(read)}"
                    bar.update(line, completed=done, description=text)

                yield show
            return
        last = time.monotonic()

        def advance(done: int, read: int) -> None:
            nonlocal last
            if time.monotonic() - last > PLAIN_PERIOD:
                last = time.monotonic()
                self(f"{what}: {done} of {total} tasks{_documents(read)}")

        self(what)
        yield advance


def _documents(read: int) -> str:
    return f", {read:,} documents" if read else ""
