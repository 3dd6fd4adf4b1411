"""Predict masked tokens of two texts, and how the two belong: BERT's and ALBERT's pre-training."""

import dataclasses
from typing import ClassVar

import numpy as np

from t5x_lite.data.converters import Segment, Shapes, encoder, token_shapes
from t5x_lite.data.objectives.base import (
    BEST_FIT,
    NONE,
    Examples,
    NoiseOf,
    Sides,
    check_length,
    column,
)
from t5x_lite.data.objectives.masked import Masked, mask_tokens
from t5x_lite.data.objectives.records import framed
from t5x_lite.data.objectives.sentences import LINES, Runs, Sentences, find_runs
from t5x_lite.data.streams import Columns
from t5x_lite.data.token_store import Tokenizer
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

Spans = tuple[tuple[int, int], tuple[int, int]]  # from where to where each text is read


def _check_share(name: str, value: float | int) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value} must lie between 0 and 1; BERT's and ALBERT's is 0.5.")


@dataclasses.dataclass(frozen=True)
class NextSentence:
    """Does the second text follow the first (0), or is it of another document (1)?

    BERT's (Devlin et al. 2019, §3.1, task 2). The text that stands in for a second one begins at a
    sentence drawn at random and is about as long, as far as its document goes, so that lengths
    don't give it away.

    Attributes:
      random: share of second texts that are of another document.
    """

    random: float | int = 0.5

    def __post_init__(self):
        _check_share("random", self.random)

    @property
    def keeps_sizes(self) -> bool:
        """Whether the two texts have as many tokens as before."""
        return self.random == 0

    def check(self, runs: Runs) -> None:
        """Raises UserError where no two documents are."""
        if len(runs) and len(runs.siblings(0)) == len(runs):
            raise UserError(
                "next-sentence pairs need two documents with text, in training and in validation; "
                "give more, end documents otherwise (Text.documents_by), or take SentenceOrder()."
            )

    def change(
        self, spans: Spans, run: int, runs: Runs, room: int, noise: np.random.Generator
    ) -> tuple[Spans, int]:
        """The two texts as they are shown, and their label."""
        if noise.random() >= self.random:
            return spans, 0
        first, (begin, end) = spans
        own = runs.siblings(run)
        other = int(noise.integers(len(runs) - len(own)))
        other += len(own) if other >= own.start else 0
        sentence = int(noise.integers(int(runs.firsts[other]), int(runs.stops[other])))
        return (first, runs.passage(sentence, end - begin, room - (first[1] - first[0]))), 1


@dataclasses.dataclass(frozen=True)
class SentenceOrder:
    """Are the two texts in order (0), or swapped (1)? ALBERT's (Lan et al. 2020, §3.1).

    Attributes:
      swapped: share of pairs that are.
    """

    swapped: float | int = 0.5
    keeps_sizes: ClassVar[bool] = True

    def __post_init__(self):
        _check_share("swapped", self.swapped)

    def check(self, runs: Runs) -> None:
        """Any corpus will do."""

    def change(
        self, spans: Spans, run: int, runs: Runs, room: int, noise: np.random.Generator
    ) -> tuple[Spans, int]:
        """The two texts as they are shown, and their label."""
        del run, runs, room
        return (spans[::-1], 1) if noise.random() < self.swapped else (spans, 0)


@dataclasses.dataclass(frozen=True)
class MaskedPairs(Masked):
    """A masked LM over `cls A sep B sep`, and whether B belongs after A.

    Consecutive sentences of a document, as many as fit a row, are split after one of them, drawn
    anew in each epoch (Devlin et al. 2019, §A.2; create_pretraining_data.py of
    google-research/bert). A sentence alone in its document is split after a token; one longer than
    half a row is cut evenly beforehand, so that nothing is left out but documents of one token.

    A model's head reads the first token of a row and says one thing of it. So the pairs of short
    documents share a row as segments that don't see each other, all with masked tokens to predict,
    but only the first is asked how its texts belong. Which one is first is drawn in each epoch.

    Each sentence comes once an epoch, as A or as B, but for those of B's that another document's
    text stands in for: about a quarter of the tokens with `NextSentence(0.5)`, others each epoch.

    The model needs a PairedLMHead, and the run the loss MaskedAndPairs.

    Attributes:
      pairs: what is asked of them.
      sentences: a regular expression of what stands between sentences: line ends, or with
        "(?<=[.!?]) +" spaces after a full stop.
      short: share of the documents whose pairs have at most a random number of tokens, for the
        short texts of fine-tuning; BERT's and ALBERT's is 0.1.
      packing: "best_fit": several pairs a row; "none": one, as in BERT, however short it is.
    """

    packings: ClassVar[tuple[str, ...]] = (BEST_FIT, NONE)
    pairs: NextSentence | SentenceOrder = NextSentence()
    sentences: str = LINES
    short: float | int = 0.1
    packing: str = BEST_FIT

    def __post_init__(self):
        super().__post_init__()
        self._check_packing(self.packing)
        Sentences(self.sentences)  # refuses what is no pattern
        if not 0 <= self.short <= 1:
            raise UserError(f"short={self.short} must lie between 0 and 1; BERT's is 0.1.")

    @property
    def tokenizer(self) -> Tokenizer:
        """As in `Objective`."""
        return Sentences(self.sentences)

    def sides(self, length: int) -> Sides:
        """As in `Objective`."""
        check_length(length, 8, "two texts with begin and end")
        return {"tokens": length}

    def shapes(self, sides: Sides) -> Shapes:
        """As in `Objective`."""
        shapes = token_shapes(sides["tokens"], "token_types")
        return shapes | {
            "labels": ((), np.dtype(np.int32)),
            "label_weights": ((), np.dtype(np.float32)),
        }

    def examples(self, store: Columns, vocabulary: Vocabulary, sides: Sides) -> Examples:
        """As in `Objective`. Raises UserError where next sentences have but one document."""
        vocabulary.require("cls_id", "sep_id", "mask_id")
        return _Pairs(self, store, vocabulary, sides["tokens"])


class _Pairs:
    """The pairs of a corpus."""

    is_noisy = True

    def __init__(self, objective: MaskedPairs, store: Columns, vocabulary: Vocabulary, length: int):
        self._objective, self._vocabulary = objective, vocabulary
        self._before, self._after = (vocabulary.cls_id,), (vocabulary.sep_id,)
        self._between = vocabulary.between_ids or self._after
        self._room = length - len(self._before + self._between + self._after)
        self._text = store.column("text")
        self._runs = find_runs(store, objective.sentences, self._room, objective.short)
        objective.pairs.check(self._runs)
        self.are_sizes_fixed = objective.pairs.keeps_sizes

    def __len__(self) -> int:
        return len(self._runs)

    def sizes(self, noise_of: NoiseOf) -> np.ndarray:
        """As in `SizedExamples`."""
        sizes = self._runs.sizes()
        if not self.are_sizes_fixed:
            for index in range(len(sizes)):
                (begin, middle), (start, stop) = self._shown(index, noise_of(index))[0]
                sizes[index] = middle - begin + stop - start
        return column(sizes + len(self._before + self._between + self._after))

    def segments(self, index: int, noise: np.random.Generator) -> list[Segment]:
        """As in `Examples`."""
        runs = self._runs
        spans, label = self._shown(index, noise)
        first, second = (self._text.slice(*span) for span in spans)
        ids = framed(self._before, first, self._between, second, self._after)
        places = len(self._before), len(self._before) + len(first) + len(self._between)
        sentences = [n + runs.begins(*span) for n, span in zip(places, spans, strict=True)]
        noisy, chosen = mask_tokens(
            ids, self._vocabulary, self._objective, noise, np.concatenate(sentences)
        )
        segment = encoder(noisy, ids, chosen.astype(np.float32))
        types = np.zeros(len(ids), np.int32)
        types[places[1] :] = self._vocabulary.second_type
        labels = {"labels": np.int32(label), "label_weights": np.float32(1)}
        return [segment | {"token_types": types} | labels]

    def _shown(self, run: int, noise: np.random.Generator) -> tuple[Spans, int]:
        """The two texts of a run as they are shown, and their label."""
        spans = self._split(run, noise)
        return self._objective.pairs.change(spans, run, self._runs, self._room, noise)

    def _split(self, run: int, noise: np.random.Generator) -> Spans:
        """A run in two: after one of its sentences, or where it has just one, after a token."""
        cuts = self._runs.cuts(run).tolist()
        begin, *inner, end = cuts
        middle = int(noise.choice(inner)) if inner else int(noise.integers(begin + 1, end))
        return (begin, middle), (middle, end)
