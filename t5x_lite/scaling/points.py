"""Measured points of a scaling law: read from CSV or JSON, checked, completed by C = 6ND."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import expressions
from t5x_lite.scaling.expressions import Expression

FLOPS = 6.0  # a token and parameter, forward and backward (Kaplan et al. 2020, §2.1)
_AGREE = 0.01  # conventions are one where C / 6ND differs by less


@dataclasses.dataclass(frozen=True)
class Points:
    """Finished runs.

    Attributes:
      columns: "n" parameters, "d" tokens, "c" FLOPs, or one of them alone; "loss" in nats; and
        where they are known "density", the share of weights that aren't zero, which "n" then
        counts alone; "unique" tokens; "accuracy", NaN where it wasn't measured; "seed", a number
        for each.
      unfinished: rows, or runs of several rows, that were left out because they had not ended.
      dropped: rows that were left out for their high loss, as asked.
      curves: of runs of several rows, all rows' "n", "d", "c", "loss" and "run", a number for each.
    """

    columns: dict[str, np.ndarray]
    unfinished: int = 0
    dropped: int = 0
    curves: dict[str, np.ndarray] | None = None

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
    unique: str | None = None,
    accuracy: str | None = None,
    run: str | None = None,
    seed_column: str | None = None,
    final: str | None = None,
    where: str | None = None,
    drop_highest: int = 0,
    flops: str | None = None,
) -> Points:
    """Points of a file, a row each; the names are its columns' or arithmetic on them.

    Args:
      path: .csv, .tsv, .jsonl or .json, a list of objects.
      n: parameters. Two of N, D and C give the third by C = 6ND; one alone stays alone.
      d: training tokens.
      c: training FLOPs.
      loss: the last loss, nats.
      sparsity: share of the weights that are zero, or that no token uses; `n` counts them too.
      unique: training tokens that differ; D counts repeated ones again.
      accuracy: on a task, between 0 and 1; may be empty in some rows.
      run: what rows of one training curve share; the last of them is the run's result.
      seed_column: in what runs of the same sizes differ.
      final: true in rows of runs that have ended; others are left out and counted.
      where: which rows to read at all, such as `dataset == 'c4' and tokens > 1e9`.
      drop_highest: how many of the highest losses to leave out.
      flops: where N, D and C are all given and C isn't 6ND: "given" keeps it, "6nd" counts anew.

    Raises:
      UserError: no such file or column, a value that isn't a positive number, a run twice, or
        several conventions of FLOPs in one file.
    """
    names = {"n": n, "d": d, "c": c, "loss": loss, "density": sparsity, "unique": unique,
             "accuracy": accuracy, "run": run, "seed": seed_column, "final": final}  # fmt: skip
    wanted = {key: name for key, name in names.items() if name is not None}
    _check_sizes(wanted)
    rows = _values(Path(path), wanted, where)
    if final is None:
        last = np.ones(len(rows), bool)
    else:
        last = np.array([_true(row["final"]) for row in rows], bool)
    columns = {
        key: _numbered([row[key] for row in rows])
        if key in ("run", "seed")
        else np.array([row[key] for row in rows], float)
        for key in wanted
        if key != "final"
    }
    ended, unfinished = _ended(columns, last, path)
    if not ended.any():
        raise UserError(f"{path} has no finished run ({unfinished} unfinished).")
    columns = _completed(columns, flops, path)
    curves = None
    if run is not None:
        whole = np.isin(columns["run"], columns["run"][ended])
        kept = columns.keys() & {"n", "d", "c", "loss", "run"}
        curves = {key: columns[key][whole] for key in kept}
        del columns["run"]
    columns = {key: values[ended] for key, values in columns.items()}
    _check_once(columns, path)
    keep = np.argsort(np.argsort(-columns["loss"], kind="stable"), kind="stable") >= drop_highest
    columns = {key: values[keep] for key, values in columns.items()}
    return Points(columns, unfinished, int(np.sum(~keep)), curves)


def _check_sizes(wanted: Mapping[str, str]) -> None:
    """One of N, D and C is enough for a law of it alone, but not for every other column."""
    known = {"n", "d", "c"} & wanted.keys()
    if not known:
        raise UserError(
            "no N, D or C: name their columns by --n, --d and --c; two suffice for every law, one "
            "for Kaplan's power of it."
        )
    if len(known) > 1:  # which give the third
        return
    if "density" in wanted and known != {"n"}:
        raise UserError("--sparsity is of N, which isn't known: name its column by --n.")
    if "unique" in wanted and known != {"d"}:
        raise UserError("--unique is of D, which isn't known: name its column by --d.")
    if "run" in wanted and known == {"n"}:
        raise UserError("--run needs what grows along a run: name the column of D or C.")


def _values(path: Path, wanted: Mapping[str, str], where: str | None) -> list[dict[str, Any]]:
    """What is wanted of each row; of rows whose loss doesn't count yet too."""
    options = {"density": "--sparsity", "seed": "--seed_column"}
    formulas: dict[str, Expression] = {}
    chosen = None
    values, count = [], 0
    known: list[str] = []
    for line, row in _rows(path):
        count += 1
        if list(row) != known:  # the first row, or a line of JSON with other names
            known = list(row)
            formulas = {
                key: Expression(text, known, f"{path}, line {line}, {options.get(key, '--' + key)}")
                for key, text in wanted.items()
            }
            chosen = None if where is None else Expression(where, known, f"{path}, --where")
        at = f"{path}, line {line}"
        try:
            if chosen is not None and not chosen(row):
                continue
            found = {key: formula(row) for key, formula in formulas.items()}
        except (ValueError, TypeError, ArithmeticError) as error:
            raise UserError(f"{at}: {error}; --where chooses rows.") from None
        counts = "run" in found or _true(found.get("final", True))
        for key in found.keys() - {"run", "seed", "final"}:
            found[key] = _number(found[key], at, key, wanted[key]) if counts else math.nan
        values.append(found)
    if count and not values:
        raise UserError(f"{path}: --where {where!r} is true in none of its {count} rows.")
    return values


def _true(cell: Any) -> bool:
    return str(cell).strip().lower() in ("true", "1", "1.0", "yes")


def _numbered(labels: list[Any]) -> np.ndarray:
    """A number for each label, in the order in which they come."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(str(label).strip(), len(seen)) for label in labels], int)


def _ended(columns, last, path):
    """Rows that are runs' results, and how many runs have none."""
    if "run" not in columns:
        return last, int(np.sum(~last))
    ended, unfinished = np.zeros(len(last), bool), 0
    for run in np.unique(columns["run"]):
        rows = np.flatnonzero((columns["run"] == run) & last)
        if not len(rows):
            unfinished += 1
            continue
        grown = columns["d"] if "d" in columns else columns["c"]
        end = rows[np.argmax(grown[rows])]
        if np.sum(grown[rows] == grown[end]) > 1:
            raise UserError(
                f"{path}: rows {end + 1} and {rows[grown[rows] == grown[end]][-1] + 1} are both "
                f"the end of one run; remove one, or name by --run what tells runs apart."
            )
        ended[end] = True
    return ended, unfinished


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {why}.") from error
    if path.suffix in (".jsonl", ".json"):
        yield from _json_rows(path, text)
        return
    if path.suffix not in (".csv", ".tsv"):
        raise UserError(f"{path}: points are read from .csv, .tsv, .jsonl or .json.")
    reader = csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        yield reader.line_num, row


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    def parsed(record, line):
        try:
            return json.loads(record)
        except ValueError as error:
            raise UserError(f"{path}, line {line}: not JSON ({error}).") from error

    if path.suffix == ".json":
        records = parsed(text, 1)
        if not isinstance(records, list):
            raise UserError(f"{path}: not a list of JSON objects; a .jsonl file has one a line.")
        numbered = list(enumerate(records, 1))
    else:
        lines = enumerate(text.splitlines(), 1)
        numbered = [(line, parsed(record, line)) for line, record in lines if record.strip()]
    for line, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line}: not a JSON object.")
        yield line, row


def _number(value: Any, where: str, key: str, name: str) -> float:
    if key == "accuracy" and (value is None or str(value).strip() == ""):
        return math.nan  # not measured
    try:
        found = expressions.number(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name}={value!r} is no number.") from None
    if key == "density":
        if not 0 <= found < 1:
            raise UserError(f"{where}: {name}={value} is a share of zeros, in [0, 1).")
        return 1 - found
    if key == "accuracy" and not 0 <= found <= 1:
        raise UserError(
            f"{where}: {name}={value} is no share; give percents as --accuracy '{name} / 100'."
        )
    if key != "accuracy" and not (math.isfinite(found) and found > 0):
        raise UserError(f"{where}: {name}={value} must be positive and finite; remove the run.")
    return found


def _completed(columns, flops, path):
    """All of N, D and C, or one. Of sparse runs N becomes the weights that aren't zero."""
    if len({"n", "d", "c"} & columns.keys()) == 1:
        pass
    elif "c" not in columns:
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
    if "unique" in columns:  # what is there to read, of which a short run sees a part
        columns["unique"] = np.minimum(columns["unique"], columns["d"])
    return columns


def _check_once(columns, path):
    """Equal sizes and losses are one run given twice; so are equal sizes and seeds."""
    if len({"n", "d", "c"} & columns.keys()) == 1:
        return  # runs of one N may differ in D
    sizes = [values for key, values in columns.items() if key not in ("loss", "accuracy")]
    if "seed" not in columns:
        sizes.append(columns["loss"])
    seen: dict[tuple[float, ...], int] = {}
    for number, row in enumerate(zip(*sizes, strict=True), 1):
        if row in seen:
            same = "seed" if "seed" in columns else "loss"
            raise UserError(
                f"{path}: runs {seen[row]} and {number} have the same sizes and the same {same}, "
                f"{columns[same][number - 1]:g}; remove one."
            )
        seen[row] = number
