"""The rule that keeps evaluation sets out of the training text."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.data.curate.rules import Document, DocumentRule, Drop, Judge
from t5x_lite.data.curate.words import needs_extra, word_tokenizer
from t5x_lite.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Decontaminate(DocumentRule):
    """Drops documents that share an n-gram of words with an evaluation set.

    13 words as in Brown et al. 2020, §C. Case, accents, numbers and punctuation don't count. An
    evaluation text of fewer words than n has no n-gram and isn't looked for; the report counts
    those. The n-grams of all sets are held in memory by every worker, about 100 bytes each.

    Attributes:
      sources: the evaluation sets; each text field of a record is looked for by itself.
      fields: those fields; None: all that hold text, also inside of lists and objects.
    """

    sources: tuple[Source, ...] | list[Source] = ()
    ngram: int = 13
    fields: tuple[str, ...] | list[str] | None = None
    tokenizer: str = "en"

    def __post_init__(self):
        if not self.sources:
            raise self.refuse("sources", "name at least one evaluation set")
        object.__setattr__(self, "sources", tuple(self.sources))
        self.require(1, 1000, "ngram")

    def _config(self) -> Any:
        from datatrove.pipeline.decont.n_grams import NGramsDecontConfig

        return NGramsDecontConfig(n_grams=self.ngram)

    def prepare(self, folder: Path) -> dict[str, int]:
        """Writes each set's n-grams, hashed, as datatrove's filter wants them.

        datatrove's own indexer isn't used: it imports lighteval, and with that PyTorch.
        """
        with needs_extra(self.title):
            from datatrove.pipeline.decont.n_grams import NGramsDecontFilter

            # for its hash and tokenizer, so that the index and the search agree
            search = NGramsDecontFilter(str(folder), self._config(), language=self._language())
        counts = {"evaluation texts": 0, "evaluation texts too short to look for": 0}
        for number, source in enumerate(self.sources):
            hashes: set[int] = set()
            for text in self._texts(source):
                found = self._hashes(search, text)
                hashes |= found
                counts["evaluation texts"] += 1
                counts["evaluation texts too short to look for"] += not found
            np.array(sorted(hashes), np.uint64).tofile(folder / f"{number}.index.hashes")
        return counts

    def _language(self) -> Any:
        return word_tokenizer(self.tokenizer)

    def _hashes(self, search: Any, text: str) -> set[int]:
        from datatrove.utils.text import ngrams, simplify_text

        words = search.tokenizer.word_tokenize(simplify_text(text, search.config.norm_config))
        return {search.hash_func(" ".join(ngram)) for ngram in ngrams(words, self.ngram)}

    def _texts(self, source: Source) -> Iterator[str]:
        for part in source.parts():
            for record, _ in source.records(part, _refuse):
                chosen = record if self.fields is None else [record.get(f) for f in self.fields]
                yield from _strings(chosen)

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""
        with needs_extra(self.title):
            from datatrove.pipeline.decont.n_grams import NGramsDecontFilter

            search = NGramsDecontFilter(str(folder), self._config(), language=self._language())

        def verdict(document: Document) -> Drop | None:
            search.filter(document)
            number = document.metadata.pop("contaminated_task", None)
            words = document.metadata.pop("contaminated_ngram", None)
            return number and Drop(f"in {self.sources[int(number)].place()}", words)

        return lambda documents: [verdict(one) for one in documents]


def _refuse(error: Exception) -> None:
    raise error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)
