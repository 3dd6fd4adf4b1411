"""What counting alone predicts: unigram and interpolated bigram, on a model's own targets.

Jelinek–Mercer interpolation (Jelinek & Mercer 1980): p(w | v) is a mixture of the bigram's, the
unigram's and the uniform frequency, with weights by how often v was seen. The weights come from EM
on every tenth training document, against counts from the other nine; the counts that score are
those of all ten. The held-out text is never fitted.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from t5x_lite.data.converters import Row
from t5x_lite.data.objectives import CausalLM
from t5x_lite.data.pipeline import Batches
from t5x_lite.data.streams import Documents
from t5x_lite.data.tasks import Task
from t5x_lite.errors import UserError

MAX_TOKENS = 10_000_000  # training tokens that are counted, from the first document on
TENTH = 10
EM_ROUNDS = 20
BUCKETS = 32  # contexts by the logarithm of their count


@dataclasses.dataclass(frozen=True)
class Score:
    """Mean loss over the targets that count."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Scores of both n-gram models on the same targets."""

    unigram: Score
    bigram: Score


def baselines(task: Task, held_out: Batches) -> Baselines:
    """Counts the task's training tokens and scores the targets of `held_out`.

    Raises:
      UserError: the task isn't a causal language model, or isn't prepared.
    """
    if not isinstance(task.objective, CausalLM):
        raise UserError(
            f"n-grams compare with CausalLM only; task {task.name} has "
            f"{type(task.objective).__name__}."
        )
    vocabulary = task.load_vocabulary()
    vocabulary.require("bos_id", "eos_id")
    rows = _training_rows(task.store("train").column("text"), vocabulary.bos_id, vocabulary.eos_id)
    return score(Bigram.fit(rows, vocabulary.size), held_out, vocabulary.byte_lengths())


def score(
    model: "Bigram", batches: Iterable[Row], byte_lengths: Int[np.ndarray, " V"]
) -> Baselines:
    """Scores targets of weight above 0; the context of each is the token that the model sees."""
    unigram = bigram = 0.0
    tokens = text_bytes = 0
    for batch in batches:
        counts = batch["weights"] > 0
        context, target = batch["tokens"][counts], batch["targets"][counts]
        unigram -= float(np.log(model.unigram[target]).sum())
        bigram -= float(np.log(model.probabilities(context, target)).sum())
        tokens += len(target)
        text_bytes += int(byte_lengths[target].sum())
    if not tokens:
        raise UserError("no held-out target to score; raise validation_fraction or batches.")

    def mean(nats: float) -> Score:
        per_byte = nats / math.log(2) / text_bytes if text_bytes else math.nan
        return Score(nats / tokens, per_byte, tokens, text_bytes)

    return Baselines(mean(unigram), mean(bigram))


class _Counts:
    """Pairs seen, sparse: sorted keys context·V + target."""

    def __init__(self, rows: list[np.ndarray], vocabulary_size: int):
        self.size = vocabulary_size
        self.context = np.concatenate([np.zeros(0, np.int64), *(row[:-1] for row in rows)])
        self.target = np.concatenate([np.zeros(0, np.int64), *(row[1:] for row in rows)])
        self.keys, self.seen = np.unique(
            self.context * vocabulary_size + self.target, return_counts=True
        )
        self.contexts = np.bincount(self.context, minlength=vocabulary_size)
        self.targets = np.bincount(self.target, minlength=vocabulary_size)

    def components(self, context: np.ndarray, target: np.ndarray) -> np.ndarray:
        """[n, 3] bigram, unigram and uniform probability of each pair."""
        unigram = self.targets[target] / self.targets.sum()
        key = context.astype(np.int64) * self.size + target
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        pairs = np.where(self.keys[place] == key, self.seen[place], 0)
        total = self.contexts[context]
        # after a context never seen, the unigram stands in for the bigram: rows still sum to 1
        bigram = np.where(total > 0, pairs / np.maximum(total, 1), unigram)
        return np.stack([bigram, unigram, np.full(len(key), 1 / self.size)], axis=1)

    def buckets(self, context: np.ndarray) -> np.ndarray:
        """[n] which weights a context uses."""
        bucket = np.ceil(np.log2(self.contexts[context] + 1)).astype(np.int64)
        return np.minimum(bucket, BUCKETS - 1)


@dataclasses.dataclass(frozen=True)
class Bigram:
    """Interpolated counts; `unigram` [V] is the interpolated unigram model."""

    counts: _Counts
    weights: Float[np.ndarray, "buckets 3"]
    unigram: Float[np.ndarray, " V"]

    @classmethod
    def fit(cls, rows: list[np.ndarray], vocabulary_size: int) -> "Bigram":
        """Counts documents (ids with bos and eos), fits the weights on every tenth of them."""
        unseen_rows = rows[TENTH - 1 :: TENTH] or rows
        kept = [row for i, row in enumerate(rows) if i % TENTH != TENTH - 1]
        fitted, unseen = _Counts(kept, vocabulary_size), _Counts(unseen_rows, vocabulary_size)
        components = fitted.components(unseen.context, unseen.target)
        weights = _expectation_maximisation(components, fitted.buckets(unseen.context))
        one_bucket = np.zeros(len(components), np.int64)
        mixture = _expectation_maximisation(components[:, 1:], one_bucket)[0]
        counts = _Counts(rows, vocabulary_size)
        frequency = counts.targets / counts.targets.sum()
        return cls(counts, weights, mixture[0] * frequency + mixture[1] / vocabulary_size)

    def probabilities(
        self, context: Int[np.ndarray, " n"], target: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """p(target | context); over all targets they sum to 1."""
        weights = self.weights[self.counts.buckets(context)]
        return (weights * self.counts.components(context, target)).sum(axis=1)


def _training_rows(documents: Documents, bos: int, eos: int) -> list[np.ndarray]:
    count = int(np.searchsorted(documents.offsets[1:], MAX_TOKENS)) + 1
    ends = documents.offsets[: count + 1].tolist()
    rows = [documents.slice(a, b) for a, b in itertools.pairwise(ends)]
    return [np.concatenate([[bos], row, [eos]]).astype(np.int64) for row in rows]


def _expectation_maximisation(components: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """[BUCKETS, k] mixture weights that make the components likeliest, bucket by bucket."""
    k = components.shape[1]
    weights = np.full((BUCKETS, k), 1 / k)
    for _ in range(EM_ROUNDS):
        share = weights[buckets] * components
        share /= share.sum(axis=1, keepdims=True)
        # one imagined observation of each keeps every weight above 0, also in an empty bucket
        sums = [np.bincount(buckets, part, minlength=BUCKETS) + 1 for part in share.T]
        weights = np.stack(sums, axis=1) / np.sum(sums, axis=0)[:, None]
    return weights
