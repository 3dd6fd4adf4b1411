"""The `eval` verb: a checkpoint's held-out loss and metrics, beside n-grams of the same tokens."""

import itertools
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from t5x_lite import distributed
from t5x_lite.data.pipeline import Batches
from t5x_lite.data.tasks import Trainable
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError
from t5x_lite.evaluate import ngram
from t5x_lite.evaluate.predictions import measure
from t5x_lite.losses import CrossEntropy, Loss
from t5x_lite.nn.config import ModelConfig
from t5x_lite.partitioning import MeshConfig, Rules, Sharding
from t5x_lite.train.evaluation import make_evaluate
from t5x_lite.train.loop import check_fit
from t5x_lite.train.restore import restore_params
from t5x_lite.train.step import check_batch, model_apply


def evaluate(
    *,
    model: ModelConfig,
    task: Trainable,
    model_dir: str,
    batch_size: int,
    length: int,
    step: int | None = None,
    batches: int | None = None,
    baselines: bool = False,
    max_tokens: int | None = None,
    loss: Loss = CrossEntropy(),  # noqa: B008 - frozen
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 - frozen
    rules: str | Rules = "fsdp",
) -> dict[str, float | int]:
    """Prints and returns loss and metrics on the validation split, of a mixture on each task's.

    Args:
        model: the run's model.
        task: the run's task.
        model_dir: where the run's checkpoints are.
        batch_size: rows a batch.
        length: tokens a row, as in training.
        step: of the checkpoint; None for the newest good one.
        batches: how many to read; None for the whole split.
        baselines: also score a unigram and an interpolated bigram model (causal tasks).
        max_tokens: the most tokens of an answer that the task's metrics judge; see
            predictions.py.
        loss: the training loss; what regularises is left out.
        mesh: devices along each mesh axis.
        rules: which mesh axes split what: parts of `partitioning.PARTS`, joined by "_".

    Returns:
        `step`, `loss` in nats per target token, `accuracy`, `perplexity`, `bits_per_byte`; of a
        mixture, `TASK/loss` of each. Of a loss of one result a row, `loss` and its metrics alone.
        Then the metrics of the task, or `TASK/METRIC` of a mixture's.

    Raises:
        UserError: no such checkpoint, or one of another model or vocabulary; a metric that can't be
            computed.
    """
    sharding = Sharding(mesh.build(), rules)
    check_batch(batch_size, 1, sharding)
    task = task.for_family(model.kind)
    held_out = task.evaluations(batch_size=batch_size, length=length, batches=batches)
    check_fit(model, task, next(iter(held_out.values())), loss)
    vocabulary = task.load_vocabulary()
    params, step = restore_params(model, model_dir, step, sharding, vocabulary.fingerprint)
    console = Console(quiet=not distributed.is_first())
    with console.status(f"evaluating {sum(map(len, held_out.values()))} batches"):
        apply = model_apply(model, sharding)
        row = make_evaluate(apply, loss, held_out, sharding)(params)
        limits = {"length": length, "batches": batches, "max_tokens": max_tokens}
        measured = measure(model, params, task, held_out, sharding, **limits)
    del params
    if not isinstance(loss, CrossEntropy):
        return _show_rowwise(console, step, row) | _show_metrics(console, measured, held_out)
    densities = {name: tokens_per_byte([own], vocabulary) for name, own in held_out.items()}
    density = tokens_per_byte(held_out.values(), vocabulary)
    mean = row["eval/loss"]
    result = {
        "step": step,
        "loss": mean,
        "accuracy": row["eval/accuracy"],
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": mean / math.log(2) * density,
    }
    scores = {}
    if baselines:
        scores = _baselines(task, held_out, console)
    if len(held_out) > 1:
        for name, own in densities.items():
            nats = row[f"eval/{name}/loss"]
            scores[f"{model_dir}, step {step}, {name}"] = (nats, nats / math.log(2) * own)
            result[f"{name}/loss"] = nats
    scores[f"{model_dir}, step {step}"] = (mean, result["bits_per_byte"])
    _show(console, scores, result)
    return result | _show_metrics(console, measured, held_out)


def _show_rowwise(console: Console, step: int, row: Mapping[str, float]) -> dict[str, float | int]:
    result = {name.removeprefix("eval/"): value for name, value in row.items()}
    del result["seconds"]
    shown = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
    console.print(f"step {step}: {shown}", highlight=False)
    return {"step": step, **result}


def _show_metrics(
    console: Console, measured: Mapping[str, Mapping[str, float]], held_out: Mapping[str, Batches]
) -> dict[str, float]:
    result = {}
    for task, scores in measured.items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        console.print(f"{task}: {shown}", highlight=False, soft_wrap=True)
        prefix = f"{task}/" if len(held_out) > 1 else ""
        result |= {f"{prefix}{name}": value for name, value in scores.items()}
    return result


def _baselines(
    task: Trainable, held_out: Mapping[str, Batches], console: Console
) -> dict[str, tuple[float, float]]:
    if len(held_out) > 1:
        raise UserError("n-grams compare on one task; evaluate its own gin file, not a mixture's.")
    with console.status("counting n-grams"):
        counted = ngram.baselines(task.tasks()[0], next(iter(held_out.values())))
    named = {"unigram": counted.unigram, "bigram, interpolated": counted.bigram}
    return {name: (score.nats_per_token, score.bits_per_byte) for name, score in named.items()}


def tokens_per_byte(held_out: Iterable[Batches], vocabulary: Vocabulary) -> float:
    """Target tokens for each byte of raw text that they stand for."""
    lengths = vocabulary.byte_lengths()
    tokens = total = 0
    for batch in itertools.chain.from_iterable(held_out):
        targets = batch["targets"][batch["weights"] > 0]
        tokens, total = tokens + targets.size, total + int(np.sum(lengths[targets]))
    return tokens / max(total, 1)


def _show(console: Console, scores, result) -> None:
    table = Table("held-out text", box=None, pad_edge=False)
    table.add_column("nats per token", justify="right")
    table.add_column("bits per byte", justify="right")
    for name, (nats, bits) in scores.items():
        table.add_row(name, f"{nats:.4f}", f"{bits:.4f}")
    console.print(table)
    console.print(
        f"perplexity {result['perplexity']:.2f}, accuracy {result['accuracy']:.1%}, "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s)",
        highlight=False,
    )
