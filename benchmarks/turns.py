"""What the benchmarks share: contenders as processes that take turns, and environments for them."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH = HERE.parent / ".venv-torch"
TOLERANCE = 0.05  # of first losses: parameters are drawn by different generators


class FailedError(Exception):
    """A contender that ended before its work was done."""


class Process:
    """A contender at work: `python SCRIPT JOB`, lines of JSON for its answers.

    Args:
      name: for messages.
      python: the interpreter.
      script: a file beside this one.
      job: its argument, json-able.
      environment: variables besides this process's own.
    """

    def __init__(
        self, name: str, python: str, script: str, job: dict[str, Any], **environment: str
    ):
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(job)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def answer(self) -> dict:
        """Waits for the next line. Raises FailedError where the process ended instead."""
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.errors.seek(0)
        raise FailedError(f"{self.name} failed: {self.errors.read()[-2000:]}")

    def ask(self, question: object) -> dict:
        """Writes a line and waits for the next one."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends it, and gives it time to end what it started."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def disagreement(results: dict[str, dict]) -> str:
    """Says where contenders of contender.py can't be computing the same model, if so."""
    counts = {name: result["parameters"] for name, result in results.items()}
    losses = {name: result["losses"][0] for name, result in results.items()}
    if len(set(counts.values())) > 1:
        return f"Not the same model: parameters {counts}"
    low, high = min(losses.values()), max(losses.values())
    return f"Not the same model: first losses {losses}" if high > (1 + TOLERANCE) * low else ""


def make_environment(folder: Path, requirements: str, python: str = sys.executable) -> None:
    """A virtual environment with what a file names, a line at a time: options, requirements."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install"]
    for line in (HERE / requirements).read_text().splitlines():
        if line and not line.startswith("#"):
            subprocess.run([*pip, *line.split()], check=True)


def among(known) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{','.join(unknown)}: not among {','.join(known)}")
        return text.split(",")

    return parse


def positive(text: str) -> int:
    """A parser of counts."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def answering() -> Callable[..., None]:
    """In a contender: a function that answers. What libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    return answer
