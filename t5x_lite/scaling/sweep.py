"""A sweep: runs of one gin file that differ in a few of its values, planned before they are run."""

import collections
import dataclasses
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.scaling.pool import LOCK

PLAN, CONFIGS, RUNS, LOGS = "sweep.json", "configs", "runs", "logs"  # in a sweep's folder
LONGEST = 120  # characters of a run's name
_REFERENCE = re.compile(r"[@%][A-Za-z]")

Values = Mapping[str, Any]
# From NAME=VALUE lines to the merged gin text, and the arguments that it gives `train`.
Configure = Callable[[list[str]], tuple[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs that differ in a few gin values, each named as `--gin.NAME=VALUE` names it.

    A string that begins with @ or % is a gin reference, as in a gin file.

    Attributes:
      name: of the sweep.
      points: values of each run; the key "name" names the run, or its values do.
      axes: name to values; every point is run with every combination of them.
      held_out: points that are run last, and predicted from the others before that.
      trunk: runs that differ in nothing but STEPS and CHECKPOINT_PERIOD share their way: each
        begins where the one before it saved at its CHECKPOINT_PERIOD (`trunk.py`).
    """

    name: str
    points: Sequence[Values] = ({},)
    axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    held_out: Sequence[Values] = ()
    trunk: bool = False

    def __post_init__(self):
        if not self.points:
            raise UserError(f"sweep {self.name} has no points; give it one, {{}} for the file's.")
        for axis, values in self.axes.items():
            if not isinstance(values, list | tuple) or not values:
                raise UserError(f"axis {axis} of sweep {self.name} is {values!r}; give it a list "
                                f"of values.")  # fmt: skip
            if any(axis in point for point in self.points):
                raise UserError(f"{axis} is an axis of sweep {self.name} and in its points too; "
                                f"keep one.")  # fmt: skip
        self._check_once()

    def _check_once(self):
        seen: dict[str, str] = {}
        names: dict[str, Values] = {}
        for name, values, _ in self.runs():
            text = ", ".join(overrides(values))
            if text in seen:
                raise UserError(
                    f"sweep {self.name} has a run twice ({text or 'without any value'}): remove "
                    f"one, or give them different values of SEED."
                )
            if name in names:
                raise UserError(f"sweep {self.name} has two runs named {name}; rename one.")
            seen[text], names[name] = name, values

    def runs(self) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """Name, values and whether it is held out, of every run in order."""
        combined = [dict(zip(self.axes, c, strict=True)) for c in itertools.product(
            *self.axes.values())]  # fmt: skip
        for point, more in itertools.product(self.points, combined):
            yield _name(point, more), _values(point) | more, False
        for point in self.held_out:
            yield _name(point, {}), _values(point), True


def _values(point: Values) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name != "name"}


def _name(point: Values, more: Values) -> str:
    """`width64-layers2-steps300`, or the point's own name and the axes' values."""
    own = [str(point["name"])] if "name" in point else _words(_values(point))
    name = "-".join([*own, *_words(more)]) or "run"
    if len(name) > LONGEST:
        name = f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise UserError(f"a run can't be named {name!r}: letters, digits, '_', '-', '.' and '+'.")
    return name


def _words(values: Values) -> list[str]:
    plain = {name.rsplit(".", 1)[-1].lower(): str(value) for name, value in values.items()}
    return [f"{name}{re.sub(r'[^A-Za-z0-9_.+-]+', '_', v).strip('_')}" for name, v in plain.items()]


def overrides(values: Values) -> list[str]:
    """`NAME=VALUE` of each, as gin reads it."""
    return [f"{name}={_literal(value)}" for name, value in values.items()]


def _literal(value: Any) -> str:
    is_reference = isinstance(value, str) and _REFERENCE.match(value)
    return value if is_reference else repr(value)


# --- a sweep with everything known of its runs ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before it is run.

    Attributes:
      name: also its folder's, under `runs/` of the sweep.
      values: its own gin values.
      held_out: predicted from the others before it is run.
      config: the whole gin text that `train` gets.
      facts: sizes and settings, json-able (`facts.py`).
      kin: runs of equal kin compile the same shapes.
      after: the run whose checkpoint it begins from, and at which step; None for none.
    """

    name: str
    values: dict[str, Any]
    held_out: bool
    config: str
    facts: dict[str, Any]
    kin: str
    after: tuple[str, int] | None = None

    @property
    def gin_hash(self) -> str:
        """Names the configuration: 12 hexadecimal digits of the text's SHA-256."""
        return hashlib.sha256(self.config.encode()).hexdigest()[:12]


def plan(
    sweep: Sweep,
    configure: Configure,
    facts_of: Callable[[str, dict[str, Any]], tuple[dict[str, Any], str]],
    starts: Callable[[Sequence[tuple]], Mapping[str, tuple[str, int]]] = lambda runs: {},
) -> list[Run]:
    """Every run of a sweep, configured and measured; nothing is allocated.

    Args:
      sweep: the points.
      configure: reads the gin files with some values replaced.
      facts_of: the text and the arguments of `train` to facts and kin; `facts.facts`.
      starts: where runs of a trunk begin; `trunk.starts`.

    Raises:
      UserError: a name that nothing reads, a value that can't be used, or one run twice.
    """
    runs, given = [], []
    for name, values, held_out in sweep.runs():
        try:
            config, arguments = configure(overrides(values))
            facts, kin = facts_of(config, arguments)
        except UserError as error:
            line = str(error).splitlines()[0]
            raise UserError(f"run {name} of sweep {sweep.name}: {line}") from error
        runs.append(Run(name, values, held_out, config, facts, kin))
        given.append((name, values, arguments))
    _check_hashes(sweep, runs)
    if not sweep.trunk:
        return runs
    after = starts(given)
    return [dataclasses.replace(run, after=after.get(run.name)) for run in runs]


def _check_hashes(sweep: Sweep, runs: Sequence[Run]) -> None:
    by_hash = collections.defaultdict(list)
    for run in runs:
        by_hash[run.gin_hash].append(run.name)
    for names in by_hash.values():
        if len(names) > 1:
            raise UserError(f"runs {names[0]} and {names[1]} of sweep {sweep.name} come out the "
                            f"same; remove one.")  # fmt: skip


# --- the sweep's folder --------------------------------------------------------------------------


def write(sweep: Sweep, runs: Sequence[Run], out: Path) -> None:
    """Stores the plan and each run's gin file, so that the folder says all that is run there.

    A sweep may grow: runs that the folder doesn't know are added.

    Raises:
      UserError: the folder holds another sweep, or can't be written.
    """
    if (out / PLAN).exists():
        _check_same(sweep, runs, out)
    elif out.exists() and any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no sweep; give another --out.")
    stored = {"name": sweep.name, "runs": [_stored(run) for run in runs]}
    for run in runs:
        write_text(out / CONFIGS / f"{run.name}.gin", run.config)
    write_text(out / PLAN, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def _stored(run: Run) -> dict[str, Any]:
    kept = {name: value for name, value in vars(run).items() if name != "config"}
    return kept | {"gin_hash": run.gin_hash}


def read(out: Path) -> tuple[str, list[Run]]:
    """The name and the runs of the sweep in a folder.

    Raises:
      UserError: it holds none, or is damaged.
    """
    try:
        stored = json.loads((out / PLAN).read_text(encoding="utf-8"))
        runs = []
        for row in stored["runs"]:
            config = (out / CONFIGS / f"{row['name']}.gin").read_text(encoding="utf-8")
            after = None if row["after"] is None else (row["after"][0], row["after"][1])
            row = {n: v for n, v in row.items() if n != "gin_hash"} | {"after": after}
            runs.append(Run(config=config, **row))
    except FileNotFoundError as error:
        raise UserError(f"{out} holds no sweep ({error.filename} is missing); `sweep run` makes "
                        f"one.") from error  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / PLAN} can't be read ({error}).") from error
    return stored["name"], runs


def _check_same(sweep: Sweep, runs: Sequence[Run], out: Path) -> None:
    name, before = read(out)
    now = {run.name: run for run in runs}
    remedy = "undo the change or give another --out"
    if gone := [run.name for run in before if run.name not in now]:
        raise UserError(
            f"{out} holds another sweep ({name}): {len(gone)} of its {len(before)} runs aren't in "
            f"sweep {sweep.name}, {gone[0]} for one; {remedy}."
        )
    for run in before:
        if run.config != now[run.name].config:
            changed = _difference(run.config, now[run.name].config)
            raise UserError(f"{out} holds another sweep: run {run.name} had {changed}; {remedy}.")


def _difference(before: str, after: str) -> str:
    """The first lines that differ, `STEPS = 10, and now STEPS = 20`."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    old, new = ([line[2:] for line in lines if line[:2] == sign][:2] for sign in ("- ", "+ "))
    return f"{'; '.join(old) or 'nothing'}, and now has {'; '.join(new) or 'nothing'}"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; leaves one alone that holds the text already.

    Raises:
      UserError: it can't be written.
    """
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; free some space or give another --out."
        ) from error
