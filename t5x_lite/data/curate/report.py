"""What a curation did: how much came in, what each rule dropped, with examples, what stayed."""

import dataclasses
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t5x_lite.data.curate.tally import Amount, RuleTally, Tally, from_json, merged
from t5x_lite.data.files import read_json, write_file, write_json

UNSHOWN = ("rule", "name", "sources", "stamps")  # of a rule's fields, in the Markdown
REASONS = 8  # of a rule, in the Markdown; the JSON has all


@dataclasses.dataclass(frozen=True)
class Finish:
    """The last step: puts the documents in their place, then writes the report beside them.

    Attributes:
      out: the folder of the curated documents and of the report.
      documents: where the last stage wrote them.
      stages: folders of the stages with tallies, in order; the first holds the preparation's.
      settings: of the whole curation, for the report.
    """

    out: Path
    documents: Path
    stages: tuple[Path, ...]
    settings: dict[str, Any]

    def __call__(self, data: None, rank: int, tasks: int) -> None:
        """Runs again from anywhere: what has been moved stays where it is."""
        total = chained([stage_tally(folder) for folder in self.stages])
        for file in sorted(self.documents.glob("*.jsonl.gz")):
            os.replace(file, self.out / file.name)
        report = as_json(total, self.settings)
        write_file(self.out / "report.md", as_markdown(report).encode())
        write_json(self.out / "report.json", report)


def stage_tally(folder: Path) -> Tally:
    """The sum over a stage's tasks."""
    files = sorted((folder / "tallies").glob("*.json"))
    return merged(from_json(read_json(file)) for file in files)


def chained(stages: Iterable[Tally]) -> Tally:
    """The tally of stages that read each other's output: of a preparation, then of the others.

    Raises:
      RuntimeError: a stage read anything else than the one before gave.
    """
    preparation, *others = stages
    total = merged([preparation, *others])
    for before, after in itertools.pairwise(others):
        if before.passed != after.read:
            raise RuntimeError(f"a stage gave {before.passed}, the next one read {after.read}")
    total.read, total.passed = others[0].read, others[-1].passed
    gone = [rule.total() for rule in total.rules.values()]
    if total.read.documents != total.passed.documents + sum(one.documents for one in gone):
        raise RuntimeError(f"read {total.read}, kept {total.passed}, dropped {gone}")
    return total


def as_json(total: Tally, settings: dict[str, Any]) -> dict[str, Any]:
    """The report as plain values."""
    left, rules = total.read, []
    for title in settings["order"]:
        rule = total.rules.get(title, RuleTally())
        gone, taken = rule.total(), rule.changed.bytes
        after = Amount(left.documents - gone.documents, left.bytes - gone.bytes - taken)
        rules.append(_rule_json(title, rule, left, after))
        left = after
    return {
        "input": dataclasses.asdict(total.read),
        "broken_records": {"left_out": total.broken, "examples": total.broken_examples},
        "kept": dataclasses.asdict(total.passed),
        "rules": rules,
        "settings": settings,
    }


def _rule_json(title: str, rule: RuleTally, left: Amount, after: Amount) -> dict[str, Any]:
    by_size = sorted(rule.dropped.items(), key=lambda item: -item[1].documents)
    return {
        "rule": title,
        "read": dataclasses.asdict(left),
        "dropped": dataclasses.asdict(rule.total()),
        "kept": dataclasses.asdict(after),
        "reasons": [
            {"reason": reason}
            | dataclasses.asdict(amount)
            | {"examples": rule.examples.get(reason, [])}
            for reason, amount in by_size
        ],
        "changed": {"documents": rule.changed.documents, "bytes_removed": rule.changed.bytes},
        "clusters": list(rule.clusters.values()),
        "details": dict(rule.details),
    }


# --- Markdown ------------------------------------------------------------------------------------


def as_markdown(report: dict[str, Any]) -> str:
    """The report to read."""
    read, kept = report["input"], report["kept"]
    lines = [
        f"# Curation of {report['settings']['name']}",
        "",
        f"Of {_amount(read)} stay {_amount(kept)}: {_share(kept['documents'], read['documents'])} "
        f"of the documents, {_share(kept['bytes'], read['bytes'])} of the bytes.",
        "",
        "| rule | read | dropped | of those read | changed | bytes removed |",
        "|---|--:|--:|--:|--:|--:|",
        *(_row(rule) for rule in report["rules"]),
        "",
    ]
    for what, count in report["settings"]["left_out"].items():
        lines += [f"Not read: {what}, {count:,}.", ""]
    if left_out := report["broken_records"]["left_out"]:
        lines += [f"{left_out:,} broken records were left out before that, such as", ""]
        lines += [*(f"- {_plain(one)}" for one in report["broken_records"]["examples"]), ""]
    for rule in report["rules"]:
        if rule["reasons"] or rule["details"]:
            lines += _section(rule, report["settings"]["rules"][rule["rule"]])
    return "\n".join(lines)


def _row(rule: dict[str, Any]) -> str:
    read, dropped, changed = rule["read"], rule["dropped"], rule["changed"]
    removed = dropped["bytes"] + changed["bytes_removed"]
    cells = [
        _plain(rule["rule"]),
        f"{read['documents']:,}",
        f"{dropped['documents']:,}",
        _share(dropped["documents"], read["documents"]),
        f"{changed['documents']:,}",
        _bytes(removed),
    ]
    return f"| {' | '.join(cells)} |"


def _section(rule: dict[str, Any], config: dict[str, Any]) -> list[str]:
    lines = [f"## {_plain(rule['rule'])}", ""]
    fields = [f"`{name}={value!r}`" for name, value in config.items() if name not in UNSHOWN]
    if fields:
        lines += [", ".join(fields), ""]
    for name, count in rule["details"].items():
        lines.append(f"- {name}: {count:,}")
    if rule["details"]:
        lines.append("")
    for reason in rule["reasons"][:REASONS]:
        lines += [f"**{_plain(reason['reason'])}**: {_amount(reason)}", ""]
        if not rule["clusters"]:
            lines += [*(_example(one) for one in reason["examples"]), ""]
    for number, cluster in enumerate(rule["clusters"], start=1):
        lines += [f"Cluster {number}:", ""]
        lines += [
            *(_example(one, "kept" if one["is_kept"] else "dropped") for one in cluster),
            "",
        ]
    more = rule["reasons"][REASONS:]
    if more:
        lines += [f"and {len(more)} more reasons, in report.json.", ""]
    return lines


def _example(document: dict[str, Any], what: str = "") -> str:
    evidence = f" ({_plain(document['evidence'])})" if "evidence" in document else ""
    what = f"{what}, " if what else ""
    return f"- {what}`{document['id']}`{evidence}: {_plain(document['text'])}"


def _plain(text: str) -> str:
    """Without what Markdown would take for its own."""
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]<>#|~" else mark for mark in text)


def _amount(amount: dict[str, Any]) -> str:
    noun = "document" if amount["documents"] == 1 else "documents"
    return f"{amount['documents']:,} {noun} ({_bytes(amount['bytes'])})"


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,} B"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
