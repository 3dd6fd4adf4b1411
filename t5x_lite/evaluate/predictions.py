"""What a model answers on the validation split, and what the tasks' metrics say of it.

Labels and numbers are read off the head. Text is decoded greedily from the same inputs as in
training, one example a row; an answer in a context is its best span over all windows.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from t5x_lite import distributed
from t5x_lite.data.converters import Row
from t5x_lite.data.objectives import ExtractiveQA, Sides
from t5x_lite.data.objectives.base import NONE
from t5x_lite.data.objectives.question_answering import answer_texts
from t5x_lite.data.objectives.records import TRIM
from t5x_lite.data.pipeline import Batches, iterate
from t5x_lite.data.task_metrics import LABELS, VALUES, judge
from t5x_lite.data.tasks import EVALUATION_SEED, Task, Trainable
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.generate import Decoding, generate
from t5x_lite.decode.sampling import GREEDY
from t5x_lite.errors import UserError
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import Sharding
from t5x_lite.train.evaluation import on_mesh
from t5x_lite.train.step import model_apply
from t5x_lite.types import Batch, Params

Answers = tuple[list[Any], list[Any]]  # predictions, and what `task_metrics` compares them with
SPLIT = "validation"


def measure(
    model: ModelConfig,
    params: Params,
    task: Trainable,
    held_out: Mapping[str, Batches],
    sharding: Sharding,
    *,
    length: int,
    batches: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of each task that has some, by the task's name.

    Args:
        model: the run's model, of the family that `task` is for.
        params: the model's.
        task: the run's task, or a mixture.
        held_out: `task.evaluations`.
        sharding: that of `params`.
        length: as in training.
        batches: how many to read; None for the whole split. A question counts if all its windows
            are read.
        max_tokens: the most tokens of an answer that is text; None: as many as targets may have,
            and any number in a context.

    Raises:
        UserError: a package is missing; more tokens than the model has positions.
    """
    answering = _Answering(model, params, sharding, batches, max_tokens)
    found = {}
    for own in task.tasks():
        if own.metrics:
            answers = answering.answers(own, held_out[own.name], task.sides(length))
            found[own.name] = judge(own.metrics, *answers)
    return found


@dataclasses.dataclass(frozen=True)
class _Answering:
    """A model that answers; the fields are arguments of `measure`."""

    model: ModelConfig
    params: Params
    sharding: Sharding
    batches: int | None
    max_tokens: int | None

    def __post_init__(self):
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1.")

    def answers(self, task: Task, held_out: Batches, sides: Sides) -> Answers:
        """What the model says of a task's validation split, and what is right."""
        if task.objective.answers in (LABELS, VALUES):
            return self._of_rows(held_out, task.objective.answers)
        if isinstance(task.objective, ExtractiveQA):
            return self._found(task, held_out)
        return self._written(task, held_out.batch_size, sides)

    def _outputs(self, held_out: Batches) -> Iterator[tuple[Row, dict[str, np.ndarray]]]:
        """Each batch with what the head puts into `aux`."""
        apply = model_apply(self.model, self.sharding)
        # Every process gets the outputs of all rows.
        outputs = jax.jit(
            lambda params, batch: apply(params, batch).aux,
            out_shardings=self.sharding.replicated(),
        )
        for batch in iterate(held_out):
            placed = next(on_mesh(iter([batch]), self.sharding))
            yield batch, jax.tree.map(np.asarray, outputs(self.params, placed))

    def _of_rows(self, held_out: Batches, kind: str) -> Answers:
        predictions, references = [], []
        for batch, aux in self._outputs(held_out):
            is_real = batch["label_weights"] > 0
            logits_BC = aux["logits"][is_real]
            chosen = logits_BC.argmax(axis=1) if kind == LABELS else logits_BC[:, 0]
            predictions += chosen.tolist()
            references += batch["labels"][is_real].tolist()
        return predictions, references

    def _found(self, task: Task, held_out: Batches) -> Answers:
        windows = held_out.tasks[0].examples
        spans: dict[int, _Spans] = {}
        numbers = iter(range(len(windows)))
        for _, aux in self._outputs(held_out):
            rows = zip(aux["start_logits"], aux["end_logits"], strict=True)
            for (start_T, end_T), number in zip(rows, numbers, strict=False):
                record, first, begin, stop = windows.place(number)
                context = slice(begin, begin + stop - first)
                best = best_span(start_T[context], end_T[context], self.max_tokens)
                none = float(start_T[0] + end_T[0])  # both ends at cls
                spans[record] = spans.get(record, _Spans()).with_window(best, first, none)
        whole, following = max(spans) + 1, next(numbers, None)
        if following is not None and windows.place(following)[0] < whole:
            whole -= 1  # its other windows aren't read
        if not whole:
            raise UserError(
                f"batches={self.batches} hold no question of {task.name} with all its windows; "
                f"give more."
            )
        return _texts(task, [spans[record] for record in range(whole)])

    def _written(self, task: Task, size: int, sides: Sides) -> Answers:
        if (processes := distributed.process_count()) > 1:
            raise UserError(
                f"metrics of generated text are computed by one process, not {processes}: leave "
                f"METRICS out, or evaluate with --processes 1."
            )
        vocabulary = task.own_vocabulary
        objective = dataclasses.replace(task.objective, packing=NONE, too_long=TRIM)
        alone = dataclasses.replace(task, objective=objective)
        rows = alone.rows(SPLIT, sides, objective.shapes(sides), EVALUATION_SEED)
        total = rows.count()
        if self.batches is not None:
            total = min(total, self.batches * size)
        model = Transformer(self.model, self.sharding)
        banned_V = jnp.asarray(_banned(vocabulary, self.model.physical_vocab))
        limit = self.max_tokens or _longest(objective.targets_length, sides)
        decoding = Decoding(limit, vocabulary.stop_ids, GREEDY, vocabulary.pad_id)
        keys_B = jax.random.split(jax.random.key(0), size)  # greedy decoding reads none
        predictions: list[str] = []
        for begin in range(0, total, size):
            # The last batch is filled up with its last row: an empty one can't be a prompt.
            numbers = np.minimum(np.arange(begin, begin + size), total - 1)
            read = [rows.row(0, int(number)) for number in numbers]
            prompt = prompts_of({name: np.stack([row[name] for row in read]) for name in read[0]})
            made = generate(model, self.params, prompt, keys_B, decoding, banned_V)
            written_BT, lengths_B = np.asarray(made.tokens_BT), np.asarray(made.lengths_B)
            ids = (row[:n] for row, n in zip(written_BT, lengths_B, strict=True))
            predictions += map(vocabulary.decode, ids)
        records = itertools.islice(task.records(SPLIT), total)
        return predictions[:total], [[record["targets"]] for record in records]


def _longest(targets_length: int | None, sides: Sides) -> int:
    """Tokens that targets may have: of a decoder's row half, unless the task says otherwise."""
    if "encoder_tokens" in sides:
        return sides["tokens"]
    return targets_length or max(1, sides["tokens"] // 2)


def prompts_of(rows: Row) -> Batch:
    """What a model reads before the first target: of rows [B, …] with one example each."""
    if "encoder_tokens" in rows:
        first_B1 = rows["tokens"][:, :1]
        encoder = {name: rows[name] for name in ("encoder_tokens", "encoder_segments")}
        return encoder | {"tokens": first_B1, "segments": np.ones_like(first_B1)}
    last_B = np.argmax(rows["weights"] > 0, axis=1)  # the first target's own input
    places_T = np.arange(rows["tokens"].shape[1])
    segments_BT = (places_T[None] <= last_B[:, None]).astype(np.int32)
    prompt = {"tokens": rows["tokens"] * segments_BT, "segments": segments_BT}
    return prompt | {"prefix": segments_BT} if "prefix" in rows else prompt


def _banned(vocabulary: Vocabulary, physical: int) -> np.ndarray:
    """[physical V], True for ids that stand for no text, but those that end it."""
    banned_V = np.arange(physical) >= vocabulary.size
    banned_V[vocabulary.special_ids] = True
    banned_V[list(vocabulary.stop_ids)] = False
    return banned_V


def best_span(
    start_T: Float[np.ndarray, " T"], end_T: Float[np.ndarray, " T"], longest: int | None = None
) -> tuple[float, int, int]:
    """The highest sum of a first and a last token's score, and these two.

    The last isn't before the first (Devlin et al. 2019, §4.2), and they span at most `longest`
    tokens. Of no tokens at all the score is -inf.
    """
    if not len(start_T):
        return -np.inf, 0, -1
    allowed_TT = np.tri(len(start_T), dtype=bool).T
    if longest is not None:
        allowed_TT &= np.tri(len(start_T), k=longest - 1, dtype=bool)
    scores_TT = np.where(allowed_TT, start_T[:, None] + end_T[None, :], -np.inf)
    first, last = np.unravel_index(np.argmax(scores_TT), scores_TT.shape)
    return float(scores_TT[first, last]), int(first), int(last)


@dataclasses.dataclass(frozen=True)
class _Spans:
    """The best of a question's windows so far, in tokens of its whole context."""

    score: float = -np.inf
    first: int = 0
    last: int = -1
    none: float = np.inf  # the lowest score of no answer: one window that has one is enough

    def with_window(self, best: tuple[float, int, int], begin: int, none: float) -> "_Spans":
        score, first, last = best
        none = min(self.none, none)
        if score <= self.score:
            return dataclasses.replace(self, none=none)
        return _Spans(score, begin + first, begin + last, none)


def _texts(task: Task, spans: list[_Spans]) -> Answers:
    """Spans as the contexts' own text. No answer is one where the split has such questions."""
    records = list(itertools.islice(task.records(SPLIT), len(spans)))
    references = [answer_texts(record) for record in records]
    may_be_none = not all(references)
    predictions = []
    for record, span in zip(records, spans, strict=True):
        context, text = record["context"], ""
        if span.last >= 0 and not (may_be_none and span.none > span.score):
            _, offsets = task.own_vocabulary.encode_with_offsets(context)
            text = context[offsets[span.first, 0] : offsets[span.last, 1]]
        predictions.append(text)
    return predictions, [texts or [""] for texts in references]
