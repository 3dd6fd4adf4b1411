"""A tiny Llama on countable text, through the command line: its options, its data and its log."""

import json
import os
import re

from t5x_lite import cli

TINY = [
    "--gin_file=runs/pretrain_llama.gin",
    "--gin.TEXT='text.txt'",
    "--gin.VOCABULARY=@vocabularies.Bytes()",
    "--gin.VOCAB_SIZE=363",
    *(
        f"--gin.llama.{name}"
        for name in ("width=16", "layers=1", "heads=2", "kv_heads=1", "hidden=16")
    ),
    *("--gin.LENGTH=16", "--gin.WARMUP_STEPS=1", "--gin.LOG_PERIOD=1", "--gin.PEAK_FLOPS=1e9"),
]


def xla_flags(devices):
    """What the tests' own programs are compiled with, for a process of so many devices."""
    return re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])


def prepare(folder):
    """Writes the text and its tokens; the folder is the current one."""
    lines = (f"{a} and {b} are {a + b}.\n\n" for a in range(20) for b in range(20))
    (folder / "text.txt").write_text("".join(lines))
    assert cli.main(["data", "prepare", *TINY]) == 0


def rows(model_dir):
    """What a run has logged; nothing before its first row."""
    path = model_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
