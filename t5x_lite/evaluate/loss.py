"""The `eval` verb: the held-out loss of a checkpoint, beside n-gram models of the same tokens."""

import math

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from t5x_lite.data.pipeline import Batches
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.evaluate import ngram
from t5x_lite.losses import CrossEntropy
from t5x_lite.nn.config import ModelConfig
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.evaluation import make_evaluate
from t5x_lite.train.loop import check_fit
from t5x_lite.train.restore import restore_params
from t5x_lite.train.step import check_batch, model_apply


def evaluate(
    *,
    model: ModelConfig,
    task: Task,
    model_dir: str,
    batch_size: int,
    length: int,
    step: int | None = None,
    batches: int | None = None,
    baselines: bool = False,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 - frozen
    rules: str = "fsdp",
) -> dict[str, float | int]:
    """Prints and returns the loss on the validation split.

    Args:
        model: the run's model.
        task: the run's task.
        model_dir: where the run's checkpoints are.
        batch_size: rows a batch.
        length: tokens a row, as in training.
        step: of the checkpoint; None for the newest good one.
        batches: how many to read; None for the whole split.
        baselines: also score a unigram and an interpolated bigram model (causal tasks).
        mesh: devices along each mesh axis.
        rules: rule table of `partitioning.RULES`.

    Returns:
        `step`, `loss` in nats per target token, `accuracy`, `perplexity`, `bits_per_byte`.

    Raises:
        UserError: no such checkpoint, or one of another model or vocabulary.
    """
    sharding = Sharding(mesh.build(), rules)
    check_batch(batch_size, 1, sharding)
    held_out = task.evaluation(batch_size=batch_size, length=length, batches=batches)
    check_fit(model, task, held_out)
    vocabulary = task.load_vocabulary()
    params, step = restore_params(model, model_dir, step, sharding, vocabulary.fingerprint)
    console = Console()
    with console.status(f"evaluating {len(held_out)} batches"):
        row = make_evaluate(model_apply(model, sharding), CrossEntropy(), held_out, sharding)(
            params
        )
    del params
    loss, density = row["eval/loss"], tokens_per_byte(held_out, vocabulary)
    result = {
        "step": step,
        "loss": loss,
        "accuracy": row["eval/accuracy"],
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * density,
    }
    scores = {f"{model_dir}, step {step}": (loss, result["bits_per_byte"])}
    if baselines:
        with console.status("counting n-grams"):
            counted = ngram.baselines(task, held_out)
        scores = {
            "unigram": (counted.unigram.nats_per_token, counted.unigram.bits_per_byte),
            "bigram, interpolated": (counted.bigram.nats_per_token, counted.bigram.bits_per_byte),
            **scores,
        }
    _show(console, scores, result)
    return result


def tokens_per_byte(batches: Batches, vocabulary: Vocabulary) -> float:
    """Target tokens for each byte of raw text that they stand for."""
    lengths = vocabulary.byte_lengths()
    tokens = total = 0
    for batch in batches:
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
