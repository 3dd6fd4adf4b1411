"""Runs a tiny training of a family, as a process that may be killed in the middle.

    python resumable.py DATA_DIR MODEL_DIR FAMILY [--kill_at STEP]

Used by test_resume.py, and as a module for the tiny tasks and models of the other tests.
"""

import argparse
import json
import os
import pathlib
import signal

from t5x_lite import optim, schedules
from t5x_lite.data.objectives import CausalLM, MaskedLM, SpanCorruption
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.t5 import t5_1_0
from t5x_lite.train import loop

STEPS, KILL_AT, CHECKPOINT_PERIOD = 8, 7, 3
OBJECTIVES = {"gpt2": CausalLM(), "bert": MaskedLM(), "t5": SpanCorruption()}
PRESETS = {"gpt2": gpt2, "bert": bert, "t5": t5_1_0}
SHAPE = {"width": 16, "layers": 2, "heads": 2, "vocab_size": 363}
SHAPES = {"gpt2": SHAPE, "bert": SHAPE, "t5": SHAPE | {"head_dim": 8, "hidden": 32}}


def tiny_model(family: str, **overrides) -> ModelConfig:
    """Dropout on, two scanned layers, width 16."""
    return PRESETS[family]("tiny", **SHAPES[family] | overrides)


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
    """Sixty short documents of countable text."""
    path = folder / "corpus.jsonl"
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    with path.open("w") as file:
        for number in range(60):
            text = " ".join(words[(number * k) % 7] for k in range(1, 12 + number % 5))
            file.write(json.dumps({"text": f"{number}: {text}"}) + "\n")
    return path


def tiny_task(data_dir: pathlib.Path, family: str = "gpt2") -> Task:
    """The corpus as bytes; `prepare` it once."""
    source = JsonLines(str(data_dir / "corpus.jsonl"))
    return Task("tiny", source, Bytes(), OBJECTIVES[family], str(data_dir), 0.2)


def prepared_task(data_dir: pathlib.Path, family: str = "gpt2") -> Task:
    """The same, ready to train on."""
    if not (data_dir / "corpus.jsonl").exists():
        write_corpus(data_dir)
        prepare(tiny_task(data_dir))
    return tiny_task(data_dir, family)


def arguments(data_dir: pathlib.Path, model_dir: pathlib.Path, family: str) -> dict:
    """Arguments of `loop.train`, for tests to change."""
    rate = schedules.cosine(1e-2, STEPS, 2)
    return {
        "model": tiny_model(family),
        "task": prepared_task(data_dir, family),
        "model_dir": str(model_dir / family),
        "steps": STEPS,
        "batch_size": 8,
        "length": 32,
        "seed": 3,
        "optimizer": optim.Adafactor(rate, min_factored=8) if family == "t5" else optim.AdamW(rate),
        "microbatches": 2,
        "eval_period": 4,
        "checkpoint_period": CHECKPOINT_PERIOD,
        "log_period": 1,
        "ema_decay": 0.9 if family == "gpt2" else None,
        "peak_flops": 1e9,
    }


def kill_before(step: int) -> None:
    """Kills this process with SIGKILL as the loop asks for the batch of `step`."""
    iterate = loop.iterate

    def deadly(batches, start=0, **rows):
        for number, batch in enumerate(iterate(batches, start, **rows), start + 1):
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    loop.iterate = deadly


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir", type=pathlib.Path)
    parser.add_argument("model_dir", type=pathlib.Path)
    parser.add_argument("family", choices=PRESETS)
    parser.add_argument("--kill_at", type=int)
    args = parser.parse_args()
    if args.kill_at:
        kill_before(args.kill_at)
    loop.train(**arguments(args.data_dir, args.model_dir, args.family))


if __name__ == "__main__":
    main()
