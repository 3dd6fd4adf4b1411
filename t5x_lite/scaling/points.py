"""Measured points of a scaling law: read from CSV or JSONL, checked, any two of N, D, C given."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.errors import UserError

FLOPS = 6.0  # a token and parameter, forward and backward (Kaplan et al. 2020, §2.1)
_AGREE = 0.01  # conventions are one where C / 6ND differs by less


@dataclasses.dataclass(frozen=True)
class Points:
    """Finished runs.

    Attributes:
      columns: "n" parameters, "d" tokens, "c" FLOPs, "loss" in nats, and "density" where the runs'
        sparsity is known, whose "n" then counts the weights that aren't zero.
      unfinished: rows that were left out because their run had not ended.
      dropped: rows that were left out for their high loss, as asked.
    """

    columns: dict[str, np.ndarray]
    unfinished: int = 0
    dropped: int = 0

    def __len__(self):
        return len(self.columns["loss"])


def read(
    path: str,
    *,
    n: str | None = None,
    d: str | None = None,
    c: str | None = None,
    loss: str = "loss",
    sparsity: str | None = None,
    final: str | None = None,
    drop_highest: int = 0,
    flops: str | None = None,
) -> Points:
    """Points of a file, a row each; the names are its columns'.

    Args:
      path: .csv, .tsv or .jsonl.
      n: parameters. Two of N, D and C suffice, with C = 6ND.
      d: training tokens.
      c: training FLOPs.
      loss: the last loss, nats.
      sparsity: share of the weights that are zero; `n` counts them too.
      final: true in rows of runs that have ended; others are left out and counted.
      drop_highest: how many of the highest losses to leave out.
      flops: where N, D and C are all given and C isn't 6ND: "given" keeps it, "6nd" counts anew.

    Raises:
      UserError: no such file or column, a value that isn't a positive number, a run twice, or
        several conventions of FLOPs in one file.
    """
    names = {"n": n, "d": d, "c": c, "loss": loss, "density": sparsity}
    wanted = {key: name for key, name in names.items() if name is not None}
    if len({"n", "d", "c"} & wanted.keys()) < 2:
        raise UserError("two of N, D and C are needed: name their columns by --n, --d and --c.")
    rows: list[list[float]] = []
    unfinished = 0
    for line, row in _rows(Path(path)):
        for name in (*wanted.values(), *([final] if final else [])):
            if name not in row:
                known = ", ".join(filter(None, row))
                raise UserError(f"{path}, line {line}: no column {name!r}; there are: {known}.")
        if final is not None and str(row[final]).strip().lower() not in ("true", "1", "1.0"):
            unfinished += 1
            continue
        rows.append([_number(row[name], f"{path}, line {line}", key, name)
                     for key, name in wanted.items()])  # fmt: skip
    if not rows:
        raise UserError(f"{path} has no finished run ({unfinished} unfinished).")
    columns = dict(zip(wanted, np.array(rows).T, strict=True))
    columns = _completed(columns, flops, path)
    _check_once(columns, path)
    keep = np.argsort(np.argsort(-columns["loss"], kind="stable"), kind="stable") >= drop_highest
    return Points({key: v[keep] for key, v in columns.items()}, unfinished, int(np.sum(~keep)))


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {why}.") from error
    if path.suffix == ".jsonl":
        for line, record in enumerate(text.splitlines(), 1):
            if not record.strip():
                continue
            try:
                row = json.loads(record)
            except ValueError as error:
                raise UserError(f"{path}, line {line}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {line}: not a JSON object.")
            yield line, row
        return
    if path.suffix not in (".csv", ".tsv"):
        raise UserError(f"{path}: points are read from .csv, .tsv or .jsonl.")
    reader = csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
    for row in reader:
        yield reader.line_num, row


def _number(value: Any, where: str, key: str, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name}={value!r} is no number.") from None
    if key == "density":
        if not 0 <= number < 1:
            raise UserError(f"{where}: {name}={value} is a share of zeros, in [0, 1).")
        return 1 - number
    if not math.isfinite(number) or number <= 0:
        raise UserError(f"{where}: {name}={value} must be positive and finite; remove the run.")
    return number


def _completed(columns, flops, path):
    """All of N, D and C. Of sparse runs N becomes the weights that aren't zero."""
    if "c" not in columns:
        columns["c"] = FLOPS * columns["n"] * columns["d"]
    elif "d" not in columns:
        columns["d"] = columns["c"] / (FLOPS * columns["n"])
    elif "n" not in columns:
        columns["n"] = columns["c"] / (FLOPS * columns["d"])
    else:
        ratio = columns["c"] / (FLOPS * columns["n"] * columns["d"])
        if flops is None and ratio.max() / ratio.min() > 1 + _AGREE:
            raise UserError(
                f"{path}: C is {ratio.min():.3g} to {ratio.max():.3g} times 6ND, so its rows may "
                f"count FLOPs differently; --flops given keeps C, --flops 6nd takes 6ND."
            )
        if flops == "6nd":
            columns["c"] = FLOPS * columns["n"] * columns["d"]
    if "density" in columns:
        columns["n"] = columns["n"] * columns["density"]
    return columns


def _check_once(columns, path):
    seen: dict[tuple[float, ...], int] = {}
    for number, row in enumerate(zip(*columns.values(), strict=True), 1):
        if row in seen:
            raise UserError(
                f"{path}: runs {seen[row]} and {number} have the same sizes and the same loss, "
                f"{columns['loss'][number - 1]:g}; remove one."
            )
        seen[row] = number
