"""The rules that compare all documents: exact and near duplicates, found by datatrove.

Each finds in three steps: every task writes signatures of its documents, other tasks compare them,
and then each task learns which of its documents go.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5x_lite.data.curate.rules import Document, Rule
from t5x_lite.data.curate.words import needs_extra, word_tokenizer


class Found(NamedTuple):
    """What was found about one task's documents, which are numbered in order from 0."""

    dropped: set[int]
    copies: dict[int, int]  # of a document that stays: how many documents it now stands for
    cluster: dict[int, int]  # of a document that has near duplicates: which cluster it's in


class Step(NamedTuple):
    """A step that compares: `build()` makes datatrove's, to be run as so many tasks."""

    name: str
    tasks: int


@dataclasses.dataclass(frozen=True)
class DuplicateRule(Rule):
    """Base of the rules over all documents. `folder` holds what the steps tell each other."""

    copies_field = "copies"  # of a kept document's metadata: how many it stands for

    def signatures(self, folder: Path) -> Any:
        """datatrove's step that consumes a task's documents and writes their signatures."""
        raise NotImplementedError

    def steps(self) -> list[Step]:
        """The steps that follow once all signatures are there, in order."""
        raise NotImplementedError

    def build(self, step: str, folder: Path) -> Any:
        """datatrove's step of that name."""
        raise NotImplementedError

    def found(self, folder: Path, rank: int) -> Found:
        """What the steps found about the documents of a task."""
        raise NotImplementedError


def _text(document: Document) -> str:
    return document.text


@dataclasses.dataclass(frozen=True)
class ExactDuplicates(DuplicateRule):
    """Of documents with the same text, to the byte (a 64-bit hash of it), keeps one.

    The kept one's metadata says in `exact_copies` how many there were.
    """

    copies_field = "exact_copies"

    def _config(self) -> Any:
        with needs_extra(self.title):
            from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

        return ExactDedupConfig(content_getter=_text)

    def signatures(self, folder: Path) -> Any:
        """As in `DuplicateRule`."""
        config = self._config()  # first: it says what isn't installed
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupSignature

        return ExactDedupSignature(str(folder / "signatures"), config)

    def steps(self) -> list[Step]:
        """As in `DuplicateRule`."""
        return [Step("compare", 1)]

    def build(self, step: str, folder: Path) -> Any:
        """As in `DuplicateRule`."""
        from datatrove.pipeline.dedup.exact_dedup import ExactFindDedups

        return ExactFindDedups(str(folder / "signatures"), str(folder / "found"), self._config())

    def found(self, folder: Path, rank: int) -> Found:
        """As in `DuplicateRule`."""
        file = folder / "found" / "00000" / f"{rank:05d}"
        others = _pairs(file.with_suffix(".c4_counts"))
        copies = {document: other + 1 for document, other in others.items()}
        return Found(set(_numbers(file.with_suffix(".c4_dup")).tolist()), copies, {})


@dataclasses.dataclass(frozen=True)
class NearDuplicates(DuplicateRule):
    """Of documents that share most of their n-grams, keeps one (MinHash; Broder 1997).

    Documents are near duplicates where all hashes of a bucket agree, and so are those of a chain
    of near duplicates. Two of similarity s are found with probability 1 - (1 - s**h)**b, for b
    buckets of h hashes: with FineWeb's 14 x 8 of 5-grams (Penedo et al. 2024, §3.4), 92% at
    s = 0.8, half at 0.68, 1% at 0.4. Numbers, case, accents and punctuation don't count. A document
    of fewer than `ngram` words has no n-grams and is kept.

    The kept one's metadata says in `near_copies` how many there were.
    """

    copies_field = "near_copies"

    ngram: int = 5
    buckets: int = 14
    hashes_per_bucket: int = 8
    seed: int = 1
    tokenizer: str = "en"

    def __post_init__(self):
        self.require(1, 1000, "ngram", "buckets", "hashes_per_bucket")

    def _config(self) -> Any:
        with needs_extra(self.title):
            from datatrove.pipeline.dedup.minhash import MinhashConfig

        return MinhashConfig(
            n_grams=self.ngram,
            num_buckets=self.buckets,
            hashes_per_bucket=self.hashes_per_bucket,
            seed=self.seed,
        )

    def signatures(self, folder: Path) -> Any:
        """As in `DuplicateRule`."""
        config, language = self._config(), word_tokenizer(self.tokenizer)
        from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

        return MinhashDedupSignature(str(folder / "signatures"), config, language)

    def steps(self) -> list[Step]:
        """As in `DuplicateRule`."""
        return [Step("compare", self.buckets), Step("cluster", 1)]

    def build(self, step: str, folder: Path) -> Any:
        """As in `DuplicateRule`."""
        from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster

        pairs = str(folder / "pairs")
        if step == "compare":
            return MinhashDedupBuckets(str(folder / "signatures"), pairs, config=self._config())
        return MinhashDedupCluster(
            pairs,
            str(folder / "found"),
            config=self._config(),
            save_cluster_id=True,
            save_cluster_size=True,
        )

    def found(self, folder: Path, rank: int) -> Found:
        """As in `DuplicateRule`."""
        file = folder / "found" / f"{rank:06d}"
        dropped = set(_numbers(file.with_suffix(".remove")).tolist())
        sizes = _pairs(file.with_suffix(".sizes"))
        copies = {document: size for document, size in sizes.items() if document not in dropped}
        return Found(dropped, copies, _pairs(file.with_suffix(".clusters")))


def _numbers(file: Path) -> np.ndarray:
    """What datatrove stored as little-endian 32-bit numbers; no file where it found nothing."""
    return np.fromfile(file, "<u4") if file.is_file() else np.zeros(0, "<u4")


def _pairs(file: Path) -> dict[int, int]:
    return dict(_numbers(file).reshape(-1, 2).tolist())
