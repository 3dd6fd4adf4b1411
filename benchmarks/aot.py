"""Published models on TPU slices that aren't there: `t5x_lite compile` for each of a list.

    python benchmarks/aot.py [--folder DIR] [--only NAME …]

Compiles one after the other (minutes each), keeps each report in DIR/NAME.json, leaves out what is
there already, and writes aot.md beside this file: memory by the TPU's compiler, and modelled times.
A program that doesn't compile or fit is a line of the table, too, and makes this end with an error;
so does one that fits the next smaller slice, where a model is to have the smallest that holds it.
"""

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("aot.md")
GIB = 2**30
NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        name: of its report.
        topology: the cloud's name.
        files: gin files, the run's first.
        sizes: rows and tokens a row.
        rules: the rule table.
        bindings: what else is set.
        smaller: the next smaller slice, which must not hold it, and rows for it: one a chip.
    """

    name: str
    topology: str
    files: Sequence[str]
    sizes: tuple[int, int]
    rules: str = "fsdp"
    bindings: Sequence[str] = ()
    smaller: tuple[str, int] | None = None

    def on_smaller(self) -> "Case":
        """The same on the next smaller slice."""
        topology, rows = self.smaller
        name = f"{self.name.removesuffix(self.topology)}{topology}"
        sizes = rows, self.sizes[1]
        return dataclasses.replace(self, name=name, topology=topology, sizes=sizes, smaller=None)

    def command(self, report: Path) -> list[str]:
        rows, length = self.sizes
        files = [part for file in self.files for part in ("--gin_file", file)]
        macros = [f"BATCH_SIZE={rows}", f"LENGTH={length}", f"RULES='{self.rules}'", *self.bindings]
        return [
            *(sys.executable, "-m", "t5x_lite", "compile", *files),
            *("--topology", self.topology, "--json", str(report)),
            *(f"--gin.{binding}" for binding in macros),
        ]


def llama(remat: str = "save_qkv_proj") -> list[str]:
    return ["llama.llama.dtype='bfloat16'", f"llama.llama.remat='{remat}'"]


LLAMA = "runs/pretrain_llama.gin"
MOMENTS = "optim.AdamW.moment_dtype='bfloat16'"  # DeepSeek-V3's own (2024, section 3.3.2)
CASES = (
    Case("llama2-7b-v5p-128", "v5p-128", (LLAMA, "models/llama/7b.gin"), (256, 4096),
         bindings=llama()),
    Case("llama2-7b-v5e-256", "v5e-256", (LLAMA, "models/llama/7b.gin"), (256, 4096),
         bindings=llama("full")),
    Case("llama-70b-v5p-512", "v5p-512", (LLAMA, "models/llama/70b.gin"), (512, 4096),
         bindings=llama("full")),
    Case("t5-xxl-v5p-128", "v5p-128", ("runs/pretrain_t5.gin", "models/t5_1_1/xxl.gin"),
         (512, 512), bindings=["t5.t5_1_1.dtype='bfloat16'", "t5.t5_1_1.remat='minimal'"]),
    Case("bert-large-v5e-16", "v5e-16", ("runs/pretrain_bert.gin", "models/bert/large.gin"),
         (256, 512), bindings=["bert.bert.dtype='bfloat16'", "bert.bert.remat='minimal'"]),
    # With both moments in float32, one row a chip needs 96.80 of 95.74 GiB.
    Case("gpt3-175b-v5p-64", "v5p-64", ("runs/pretrain_gpt.gin", "models/gpt3/175b.gin"),
         (128, 2048), bindings=["gpt3.gpt3.dtype='bfloat16'", "gpt3.gpt3.remat='full'", MOMENTS],
         smaller=("v5p-32", 16)),
    Case("deepseek-v3-v5p-256", "v5p-256", ("runs/pretrain_moe.gin", "models/deepseek_v3/671b.gin"),
         (128, 4096), "fsdp_ep",
         ["deepseek.deepseek_v3.dtype='bfloat16'", "deepseek.deepseek_v3.remat='full'",
          "MeshConfig.expert=4", MOMENTS], ("v5p-128", 64)),
    Case("llama3-8b-128k-v5p-128", "v5p-128", (LLAMA, "models/llama/3-8b.gin"), (16, 131072),
         "fsdp_sp", [*llama("full"), "MeshConfig.sequence=4"]),
)  # fmt: skip


def compiled(case: Case, folder: Path) -> dict[str, Any]:
    """The report of a program, with `error` where there is one."""
    file = folder / f"{case.name}.json"
    if not file.exists():
        run = subprocess.run(case.command(file), text=True, stderr=subprocess.PIPE, check=False)
        if run.returncode and not file.exists():  # else it doesn't fit, and the report says so
            said = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            return {"error": said[-1]}
    report = json.loads(file.read_text())
    return report if report["fits"] else report | {"error": f"doesn't fit: {_held(report)} a chip"}


Reports = Sequence[tuple[Case, dict[str, Any]]]


def lines(rows: Reports, smaller: Reports) -> Iterator[str]:
    """The page."""
    yield "# Published models on TPU slices, compiled without one\n"
    yield "Written by `python benchmarks/aot.py`. Memory is the TPU compiler's word; **times and"
    yield "MFU are modelled, never measured** ([docs/compile.md](../docs/compile.md))."
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    yield f"{datetime.date.today()}, {versions}.\n"
    yield ("| program | rows × tokens | rules | HBM a chip, of | FLOPs a chip | HBM bytes "
           "| ICI + DCN bytes | modelled step | MFU at best | bound by |")  # fmt: skip
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for case, report in rows:
        yield _row(case, report)
    yield "\nThe next smaller slices, with one row a chip, by the compiler's refusals:\n"
    for case, report in smaller:
        yield f"- {case.name}: {report.get('error', 'fits, so it is the smallest')}"
    yield "\nThe commands, without `--json`:\n\n```sh"
    for case, _ in rows:
        words = case.command(Path("report.json"))[2:]
        yield " ".join(f'"{word}"' if "'" in word else word for word in words if "json" not in word)
    yield "```"


def _row(case: Case, report: dict[str, Any]) -> str:
    first = f"| {case.name} | {case.sizes[0]} × {case.sizes[1]} | {case.rules} |"
    if "error" in report:
        return f"{first} {report['error']} |" + " |" * 6
    sent = sum(row["bytes"] for row in report["collectives"])
    flops = report["flops"] / report["chips"]
    return (
        f"{first} {_held(report)} | {flops / 1e12:,.1f} T | {report['hbm_bytes'] / 1e9:,.1f} GB "
        f"| {sent / 1e9:,.1f} GB | {report['step_seconds']:.3f} s | {report['mfu']:.1%} "
        f"| {report['bound']} |"
    )


def _held(report: dict[str, Any]) -> str:
    return "{total:.2f} of {capacity:.2f} GiB".format(
        **{name: report["hbm"][name] / GIB for name in ("total", "capacity")}
    )


def _all() -> list[str]:
    smaller = (case.on_smaller() for case in CASES if case.smaller)
    return [case.name for case in (*CASES, *smaller)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/aot_reports"))
    parser.add_argument("--only", nargs="*", metavar="NAME", default=_all())
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    def reports(cases: Iterable[Case]) -> Reports:
        found = []
        for case in cases:
            is_there = (args.folder / f"{case.name}.json").exists()
            asked = is_there or case.name in args.only
            found.append((case, compiled(case, args.folder) if asked else {"error": NOT_RUN}))
        return found

    rows = reports(CASES)
    smaller = reports(case.on_smaller() for case in CASES if case.smaller)
    TABLE.write_text("\n".join(lines(rows, smaller)) + "\n", encoding="utf-8")
    failed = any(report.get("error", NOT_RUN) != NOT_RUN for _, report in rows)
    return int(failed or any(report.get("fits") for _, report in smaller))


if __name__ == "__main__":
    sys.exit(main())
