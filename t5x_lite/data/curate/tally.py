"""What one task counts, rule by rule, with examples; and the sum over tasks."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_lite.data.curate.rules import Document, Drop

EXAMPLES = 3  # of each reason, of all tasks together
EXCERPT = 200  # characters of an example
CLUSTERS = 3  # of near duplicates, shown whole


@dataclasses.dataclass
class Amount:
    """So many documents, of so many UTF-8 bytes of text together."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        """Adds to both."""
        self.documents += documents
        self.bytes += size


@dataclasses.dataclass
class RuleTally:
    """What a rule did.

    Attributes:
      dropped: by reason.
      changed: documents whose text it changed, and the bytes that this took away (or, negative,
        added).
      examples: by reason, the first few of each.
      clusters: by number, the documents of the first few clusters of near duplicates.
      details: further counts of the rule's own.
    """

    dropped: dict[str, Amount] = dataclasses.field(default_factory=dict)
    changed: Amount = dataclasses.field(default_factory=Amount)
    examples: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    clusters: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    details: dict[str, int] = dataclasses.field(default_factory=dict)

    def drop(self, document: Document, size: int, why: Drop) -> None:
        """Counts a document that goes."""
        self.dropped.setdefault(why.reason, Amount()).add(1, size)
        examples = self.examples.setdefault(why.reason, [])
        if len(examples) < EXAMPLES:
            evidence = {} if why.evidence is None else {"evidence": why.evidence}
            examples.append(shown(document) | evidence)

    def note(self, counts: Mapping[str, int]) -> None:
        """Adds counts of the rule's own."""
        for name, count in counts.items():
            self.details[name] = self.details.get(name, 0) + count

    def show(self, cluster: int, document: Document, is_kept: bool) -> None:
        """Keeps a document of a cluster of near duplicates as an example, of the first few."""
        if cluster < CLUSTERS:
            documents = self.clusters.setdefault(str(cluster), [])
            if is_kept or len(documents) <= EXAMPLES:
                documents.append(shown(document) | {"is_kept": is_kept})

    def total(self) -> Amount:
        """What went, for whatever reason."""
        amounts = self.dropped.values()
        return Amount(sum(a.documents for a in amounts), sum(a.bytes for a in amounts))


@dataclasses.dataclass
class Tally:
    """What a task read, what each rule did with it, in order, and what came out."""

    read: Amount = dataclasses.field(default_factory=Amount)
    passed: Amount = dataclasses.field(default_factory=Amount)
    rules: dict[str, RuleTally] = dataclasses.field(default_factory=dict)
    broken: int = 0
    broken_examples: list[str] = dataclasses.field(default_factory=list)

    def rule(self, title: str) -> RuleTally:
        """That rule's, made where there is none yet."""
        return self.rules.setdefault(title, RuleTally())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def from_json(value: dict[str, Any]) -> Tally:
    """The tally that `to_json` wrote."""
    rules = {
        title: RuleTally(
            dropped={reason: Amount(**amount) for reason, amount in rule["dropped"].items()},
            changed=Amount(**rule["changed"]),
            examples=rule["examples"],
            clusters=rule["clusters"],
            details=rule["details"],
        )
        for title, rule in value["rules"].items()
    }
    return Tally(
        Amount(**value["read"]),
        Amount(**value["passed"]),
        rules,
        value["broken"],
        value["broken_examples"],
    )


def merged(tallies: Iterable[Tally]) -> Tally:
    """The sum; of the examples the first tasks'."""
    total = Tally()
    for tally in tallies:
        total.read.add(tally.read.documents, tally.read.bytes)
        total.passed.add(tally.passed.documents, tally.passed.bytes)
        total.broken += tally.broken
        total.broken_examples = (total.broken_examples + tally.broken_examples)[:EXAMPLES]
        for title, rule in tally.rules.items():
            _add(total.rule(title), rule)
    return total


def _add(total: RuleTally, rule: RuleTally) -> None:
    for reason, amount in rule.dropped.items():
        total.dropped.setdefault(reason, Amount()).add(amount.documents, amount.bytes)
    total.changed.add(rule.changed.documents, rule.changed.bytes)
    for reason, examples in rule.examples.items():
        total.examples[reason] = (total.examples.get(reason, []) + examples)[:EXAMPLES]
    for cluster, documents in rule.clusters.items():
        both = total.clusters.get(cluster, []) + documents
        kept = [one for one in both if one["is_kept"]]
        total.clusters[cluster] = kept + [one for one in both if not one["is_kept"]][:EXAMPLES]
    total.note(rule.details)


def shown(document: Document) -> dict[str, str]:
    """A document as an example: its id, and how it begins, on one line."""
    lines = document.text[: 2 * EXCERPT].splitlines()
    text = " ⏎ ".join(short for line in lines if (short := " ".join(line.split())))
    is_whole = len(document.text) <= 2 * EXCERPT and len(text) <= EXCERPT
    return {"id": document.id, "text": text if is_whole else f"{text[:EXCERPT]} …"}
