"""A training step of Llama 2 7B compiled for TPUs that aren't there: t5x_lite beside MaxText.

    python benchmarks/maxtext.py --setup --python3 PYTHON    once: MaxText, in .venv-maxtext
    python benchmarks/maxtext.py [--folder DIR] [--only v5e-16 …]

MaxText's program comes from its own `train_compile`, ours from `t5x_lite compile`. One compiler
says what both hold, and one model (t5x_lite/aot) what both compute, move, send and take.
One after the other, minutes each. Reports are kept in DIR, and what is there isn't compiled again.
Ends with an error where ours needs more memory of a chip than MaxText's.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from aot import GIB, LLAMA, Case, llama
from turns import make_environment

from t5x_lite.aot import topology

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / ".venv-maxtext"
LENGTH = 2048
TOPOLOGIES = ("v5e-16", "v5p-16")  # of 16 and of 8 chips: v5p's names count cores
# No TPU; no lock against other processes that only compile.
COMPILING = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
COMPILING |= {"TPU_LOG_DIR": "disabled"}
# MaxText without the cloud and the hub, and t5x_lite.aot beside it.
OFFLINE = {**COMPILING, "DECOUPLE_GCLOUD": "TRUE", "HF_HUB_OFFLINE": "1"}
OFFLINE |= {"PYTHONPATH": str(HERE.parent)}
Report = Mapping[str, Any]

ALIKE = """\
Alike: Llama 2 7B as published, untied, one row of 2,048 packed tokens a chip; parameters, gradients
and both moments of AdamW float32, products bfloat16; gradients clipped to norm 1; parameters and
state split over all chips; layers scanned, of which nothing is kept but the input (`full` on both
sides); splash attention, blocks of 512.

Not alike:

- The loss: MaxText has all logits of a row at once, in float32, and targets as rows of one-hot
  numbers; t5x_lite goes through chunks of 512 tokens.
- The norms' scales: split over the chips by MaxText, whole on each by t5x_lite (3 MiB of a chip).
- Weight decay: of every parameter by MaxText, of all but the norms' scales by t5x_lite.
- MaxText's step also returns norms of the gradients and of the parameters.
- MaxText asks the compiler for its own generator of random numbers; neither step draws any.
"""


def compiled(name: str, folder: Path, python: Path) -> tuple[Report, Report]:
    """(MaxText's report, ours) on a topology."""
    theirs, ours = (folder / f"{side}-{name}.json" for side in ("maxtext", "t5x_lite"))
    chips = topology.find(name).chips
    if not theirs.exists():
        options = {"model_name": "llama2-7b", "per_device_batch_size": 1}
        options |= {"max_target_length": LENGTH, "base_output_directory": str(folder)}
        job = {"topology": name, "options": options, "json": str(theirs)}
        script = str(HERE / "maxtext_contender.py")
        run([str(python), "-P", script, json.dumps(job)], theirs, OFFLINE)
    if not ours.exists():
        files = (LLAMA, "models/llama/7b.gin")
        case = Case(f"llama2-7b-{name}", name, files, (chips, LENGTH), bindings=llama("full"))
        run(case.command(ours), ours, COMPILING)
    return tuple(json.loads(file.read_text()) for file in (theirs, ours))


def run(command: Sequence[str], report: Path, variables: Mapping[str, str]) -> None:
    """Compiles; what is printed meanwhile goes beside the report."""
    log, environment = report.with_suffix(".log"), {**os.environ, **variables}
    with log.open("w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, env=environment, check=False, **streams)
    if done.returncode:
        raise SystemExit(f"{report.stem} wasn't compiled; {log} has what was printed.")


GB = 1e9


def quantities(report: Report) -> dict[str, float]:
    """What the table compares: each by its name and unit."""
    hbm, chips = report["hbm"], report["chips"]
    found = {
        f"HBM {part}, GiB": hbm[part] / GIB
        for part in ("arguments", "temporaries", "output", "alias", "code", "total")
    }
    found["FLOPs a chip, T"] = report["flops"] / chips / 1e12
    found["  of matrix products, T"] = report["matmul_flops"] / chips / 1e12
    found["HBM bytes, GB"] = report["hbm_bytes"] / GB
    found["collective bytes, GB"] = sum(row["bytes"] for row in report["collectives"]) / GB
    for row in sorted(report["collectives"], key=lambda row: row["kind"]):
        name = f"  {row['kind']}, GB"
        found[name] = found.get(name, 0) + row["bytes"] / GB
    found["  waited for, GB"] = sum(row["awaited_bytes"] for row in report["collectives"]) / GB
    for resource in ("compute", "hbm", "ici"):
        found[f"modelled {resource}, ms"] = 1e3 * report["seconds"][resource]
    found["modelled step, ms"] = 1e3 * report["step_seconds"]
    return found


def table(name: str, theirs: Report, ours: Report) -> Iterator[str]:
    """Lines of Markdown: the compiler's word on memory, then what is counted and modelled."""
    one, other = quantities(theirs), quantities(ours)
    target = topology.find(name)
    yield f"| {name}, {target.chips} chips | MaxText | t5x_lite | t5x_lite / MaxText |"
    yield "|---|---|---|---|"
    # Kinds of collectives that only one side has stand where that side has them.
    for what in dict.fromkeys([*one, *other]):
        left, right = one.get(what, 0), other.get(what, 0)
        ratio = f"{right / left:.3f}" if left else "-"
        yield f"| {what.strip()} | {left:,.2f} | {right:,.2f} | {ratio} |"
    # The same model on both sides, so the FLOPs that the MFU is of are the same, too.
    peak = target.chips * target.chip.peak["bfloat16"]
    left, right = (ours["model_flops"] / peak / each["step_seconds"] for each in (theirs, ours))
    yield f"| modelled MFU at best | {left:.1%} | {right:.1%} | {right / left:.3f} |"
    yield f"| bound by | {theirs['bound']} | {ours['bound']} | |"


def version(package: str) -> str:
    """Of what is installed here."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", action="store_true", help="make MaxText's environment")
    parser.add_argument("--python3", default="python3.12", help="for --setup: Python 3.12")
    parser.add_argument("--maxtext_python", type=Path, default=ENVIRONMENT / "bin" / "python")
    parser.add_argument("--folder", type=Path, default=Path("maxtext_reports"))
    parser.add_argument("--only", nargs="*", default=TOPOLOGIES, choices=TOPOLOGIES)
    args = parser.parse_args()
    if args.setup:
        if shutil.which(args.python3) is None:
            parser.error(f"no {args.python3}; MaxText needs Python 3.12: name it by --python3.")
        make_environment(ENVIRONMENT, "requirements-maxtext.txt", args.python3)
        return 0
    if not args.maxtext_python.exists():
        parser.error(f"no {args.maxtext_python}; run --setup first.")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    more = []
    print(f"{datetime.date.today()}. Memory is the compiler's word; times are modelled.\n")
    for name in args.only:
        theirs, ours = compiled(name, folder, args.maxtext_python)
        here = {package: version(package) for package in ("jax", "libtpu")}
        for side, versions in (("MaxText", theirs["versions"]), ("t5x_lite", here)):
            print(f"{side}: " + ", ".join(f"{key} {value}" for key, value in versions.items()))
        if any(theirs["versions"][package] != here[package] for package in here):
            print("These are different compilers, so that figures differ for that alone, too.")
        print("", *table(name, theirs, ours), "", sep="\n", flush=True)
        if ours["hbm"]["total"] > theirs["hbm"]["total"]:
            more.append(name)
    print(ALIKE)
    if more:
        print(f"t5x_lite needs more memory of a chip on {', '.join(more)}.")
    return int(bool(more))


if __name__ == "__main__":
    sys.exit(main())
