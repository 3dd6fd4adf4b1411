"""What a run measured, one JSON object a line: `metrics.jsonl` in the model directory.

    {"step": 20, "loss": 5.125, "grad_norm": 1.0625, "eval/loss": 5.25}

Floats are written in full (a float32 as the double that it equals, so it comes back bit for bit),
integers as integers. JSON has no NaN or infinity: they are written as null and read as NaN.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from t5x_lite.errors import UserError

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends rows to `<model_dir>/metrics.jsonl`; each is on its way to the disk when it returns.

    Nothing is created before the first write. Disk errors are raised as `UserError`.
    """

    def __init__(self, model_dir: str | os.PathLike):
        self.path = Path(model_dir) / FILE_NAME
        self._file: BinaryIO | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, step: int | np.integer, **values: Any) -> None:
        """Appends one row. Values are numbers, bools or strings of Python, or NumPy scalars.

        Raises:
          UserError: the file cannot be written.
        """
        row = {"step": int(step), **{name: _plain(name, v) for name, v in values.items()}}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(
                line
            )  # unbuffered: one system call, so a row is whole or torn, not mixed
        except OSError as error:
            raise self._failure("written", error) from error

    def cut_back(self, step: int) -> None:
        """Drops the rows after `step`, which a resumed run will write again. All or nothing."""
        self.close()
        if not self.path.exists():
            return
        kept = [line for line, row in self._lines() if row["step"] <= step]
        beside = self.path.with_suffix(".jsonl.tmp")
        try:
            with beside.open("wb") as file:
                file.write(b"".join(kept))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            raise self._failure("cut back", error) from error

    def read(self) -> list[dict[str, Any]]:
        """All rows in the order written; a last line torn by a kill is left out.

        Raises:
          UserError: any other line is not a row, with its number.
        """
        if not self.path.exists():
            return []
        return [
            {k: math.nan if v is None else v for k, v in row.items()} for _, row in self._lines()
        ]

    def close(self) -> None:
        """Lets go of the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        with contextlib.suppress(FileExistsError):  # if it is a file, opening says so better
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            # A torn last line would run into the next row.
            whole = sum(len(line) for line, _ in self._lines())
            os.truncate(self.path, whole)
        return self.path.open("ab", buffering=0)

    def _lines(self) -> Iterable[tuple[bytes, dict[str, Any]]]:
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise self._failure("read", error) from error
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.path}, line {number} is not a row of metrics: mend or remove it."
                ) from error
            yield line, row

    def _failure(self, what: str, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be {what}: {error.strerror or error}.")


class NoLog(MetricsLog):
    """Of a process whose rows another one, process 0, writes."""

    def write(self, step: int | np.integer, **values: Any) -> None:
        """Writes nothing."""

    def cut_back(self, step: int) -> None:
        """Drops nothing."""


def _plain(name: str, value: Any) -> Any:
    """The JSON value for a Python or NumPy scalar."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{name} must be a scalar, not {type(value).__name__}")
