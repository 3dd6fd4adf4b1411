"""Rows as a model sees them, for people: the look that finds most bugs in data."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from t5x_lite.data.converters import ROWWISE, SIDES, Row
from t5x_lite.data.files import read_json
from t5x_lite.data.tasks import Trainable
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

SEGMENT_STYLES = ("cyan", "yellow")  # neighbours are told apart
COLUMNS = ("segments", "positions", "tokens", "prefix", "token_types", "targets", "weights")
PIECES = ("tokens", "targets")  # shown as ids and as text


def show(
    *,
    task: Trainable,
    length: int = 128,
    seed: int = 0,
    model: Any = None,
    split: str = "train",
    rows: int = 2,
    tokens: int = 40,
    first: int = 0,
    console: Console | None = None,
) -> None:
    """Prints rows of a task or a mixture: pieces, ids, targets, weights, segments, positions.

    Args:
      task: what to show; prepared by `t5x_lite data prepare`.
      length: tokens a row, as in training.
      seed: of order and noise, as in training.
      model: its `kind` decides how an objective for several families looks; None: as it is bound.
      split: "train", in the order of training, or "validation", each task's from its beginning.
      rows: how many.
      tokens: positions to print of each row's sides; 0 for all.
      first: the row to begin with.
      console: where to print; None: standard output.

    Raises:
      UserError: the task isn't prepared, or a number is out of range.
    """
    for name, value, least in (("rows", rows, 1), ("tokens", tokens, 0), ("first", first, 0)):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}.")
    console = console or Console()
    task = task if model is None else task.for_family(model.kind)
    vocabulary = task.load_vocabulary()
    if split == "train":
        batches = task.batches("train", batch_size=1, length=length, seed=seed)
        _about(console, batches.fingerprint, batches.rows_per_epoch)
        for note in batches.notes:
            console.print(note, highlight=False, soft_wrap=True)
        for number in range(first, first + rows):
            _show_row(console, f"row {number}", batches.row(number), vocabulary, tokens)
        return
    for name, held_out in task.evaluations(batch_size=1, length=length, split=split).items():
        for number in range(first, min(first + rows, len(held_out))):
            _show_row(console, f"{name}, row {number}", held_out.row(number), vocabulary, tokens)


def _about(console: Console, fingerprint: Mapping[str, Any], rows: int) -> None:
    tasks = fingerprint.get("tasks") or {fingerprint["task"]: fingerprint}
    for name, of in tasks.items():
        rate = f", rate {of['rate']:g}" if "rate" in of else ""
        console.print(
            f"{name}: {of['objective']['name']}, {of['records']:,} records{rate}", highlight=False
        )
    console.print(f"{rows:,} rows an epoch", highlight=False)


def _show_row(console: Console, title: str, row: Row, vocabulary: Vocabulary, tokens: int) -> None:
    for side in reversed(SIDES):
        if side in row:
            _show_side(console, title, side, row, vocabulary, tokens)
    for name in ROWWISE:
        if name in row:
            console.print(f"{name}: {row[name].tolist()}", highlight=False)


def _show_side(
    console: Console, title: str, side: str, row: Row, vocabulary: Vocabulary, tokens: int
) -> None:
    prefix = side.removesuffix("tokens")
    segments = row[f"{prefix}segments"]
    used = int((segments > 0).sum())
    what = "encoder, " if prefix else ""
    weighted = ""
    if not prefix and "weights" in row:  # others bear one loss a row
        weighted = f", loss on {int((row['weights'] > 0).sum())}"
    heading = f"{title}: {what}{used} of {len(segments)} positions{weighted}"
    console.print(f"\n[bold]{heading}[/bold]", highlight=False)
    console.print(_text(row, prefix, vocabulary, used), soft_wrap=True)
    columns = [name for name in COLUMNS if f"{prefix}{name}" in row]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", justify="right")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
        if name in PIECES:
            table.add_column("", no_wrap=True)
    for place in range(min(used, tokens or used)):
        table.add_row(*_cells(row, prefix, place, columns, vocabulary))
    console.print(table)
    if tokens and used > tokens:
        console.print(f"… {used - tokens} more: --tokens 0 shows all", style="dim")


def _cells(
    row: Row, prefix: str, place: int, columns: list[str], vocabulary: Vocabulary
) -> list[Text]:
    segment = int(row[f"{prefix}segments"][place])
    style = SEGMENT_STYLES[segment % 2]
    cells = [Text(str(place), "dim")]
    for name in columns:
        value = row[f"{prefix}{name}"][place]
        if name not in PIECES:
            cells.append(Text(f"{value:g}"))
            continue
        bears = name == "tokens" or row["weights"][place] > 0
        shade = style if name == "tokens" else ("bold green" if bears else "dim")
        cells += [Text(f"{value}", shade), Text(_piece(vocabulary, value), shade)]
    return cells


def _text(row: Row, prefix: str, vocabulary: Vocabulary, used: int) -> Text:
    """The side's pieces in a row, each segment in its colour; sentinels and the like stand out."""
    text = Text()
    special = set(vocabulary.special_ids.tolist())
    for token, segment in zip(
        row[f"{prefix}tokens"][:used].tolist(), row[f"{prefix}segments"][:used], strict=True
    ):
        style = "bold magenta" if token in special else SEGMENT_STYLES[int(segment) % 2]
        text.append(_piece(vocabulary, token), style)
    return text


def _piece(vocabulary: Vocabulary, token: Any) -> str:
    piece = vocabulary.piece(int(token))
    return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", "·").replace("\n", "↵")


def list_data(configs: Path, data_dir: str = "data", console: Console | None = None) -> None:
    """Prints the tasks that come with t5x_lite, and what is prepared in a folder.

    Args:
      configs: the folder of gin files.
      data_dir: the folder of prepared data.
      console: where to print; None: standard output.
    """
    console = console or Console()
    table = Table("task file", "what it is", box=None, pad_edge=False)
    for path in sorted((configs / "tasks").rglob("*.gin")):
        table.add_row(path.relative_to(configs).as_posix(), _first_sentence(path))
    console.print(table)
    prepared = sorted(Path(data_dir).glob("*/text/made_from.json"))
    if not prepared:
        console.print(f"\nnothing is prepared in {data_dir}/ (seen from {Path.cwd()})")
        return
    table = Table(f"in {data_dir}/", "records", "MB", "tokens (ids)", box=None, pad_edge=False)
    for path in prepared:
        table.add_row(*_prepared(path.parent.parent))
    console.print()
    console.print(table)


def _first_sentence(path: Path) -> str:
    """Of the comment that a gin file opens with, without its references."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r" \(|[:.] ", text)[0].removesuffix(".")


def _prepared(folder: Path) -> list[str]:
    made = read_json(folder / "text" / "made_from.json") or {}
    shards, size = made.get("shards", []), sum(made.get("bytes", {}).values())
    stores = [read_json(path) or {} for path in sorted(folder.glob("tokens-*/made_from.json"))]
    tokens = [
        f"{sum(store['tokens'].values()):,} ({store['vocabulary_size']:,})" for store in stores
    ]
    records = np.sum([list(shard.values()) for shard in shards]) if shards else 0
    return [folder.name, f"{int(records):,}", f"{size / 1e6:.1f}", ", ".join(tokens) or "none"]
