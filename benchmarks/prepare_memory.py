"""Peak memory of `data prepare` at several sizes of one corpus: it must not grow.

    python benchmarks/prepare_memory.py [--gigabytes 0.5 1 2] [--workers 2] [--folder DIR]

Writes texts of random words as JSON lines, prepares each by a command of its own, and prints the
peak of resident memory of all its processes together, seen every 20 ms, and the time. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WORDS, MEAN_WORDS = 20_000, 200
GIN = """
from __gin__ import dynamic_registration
include 'gin_configs/tasks/causal_lm.gin'
CORPUS = 'corpus'
"""


def write_corpus(path: Path, size: int) -> None:
    """JSON lines of Zipf-distributed words, about 1.4 KB each, until there are `size` bytes."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 11, WORDS)]
    share = 1 / np.arange(1, WORDS + 1)
    written = 0
    with path.open("w") as file:
        while written < size:
            drawn = rng.choice(WORDS, 100_000, p=share / share.sum())
            cuts = np.sort(rng.choice(len(drawn), len(drawn) // MEAN_WORDS, replace=False))
            for part in np.split(drawn, cuts):
                if len(part):
                    written += file.write(json.dumps({"text": " ".join(words[w] for w in part)}))
                    written += file.write("\n")


def resident(pid: int) -> int:
    """Resident bytes of a process and all that it started; a page that they share counts twice."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = {int(c) for t in tasks for c in (t / "children").read_text().split()}
    except (OSError, IndexError, ValueError):  # it has ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident, children))


def measured(command: list[str], cwd: Path) -> tuple[int, float]:
    """Peak resident bytes and seconds of a command."""
    began, peak = time.perf_counter(), 0
    with (cwd / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.02)
    if process.returncode:
        sys.exit((cwd / "log").read_text())
    return peak, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        (folder / "task.gin").write_text(GIN)
        for gigabytes in options.gigabytes:
            write_corpus(folder / "corpus.jsonl", int(gigabytes * 1e9))
            shutil.rmtree(folder / "data", ignore_errors=True)
            command = [sys.executable, "-m", "t5x_lite", "data", "prepare"]
            command += ["--gin_file", "task.gin", "--gin.TEXT='corpus.jsonl'"]
            command += ["--workers", str(options.workers)]
            peak, seconds = measured(command, folder)
            print(f"{gigabytes:g} GB: peak {peak / 1e6:,.0f} MB, {seconds:.0f} s", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
