"""The loss on held-out batches, while training and afterwards."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from t5x_lite.data.pipeline import Batches, iterate
from t5x_lite.losses import Apply, Loss
from t5x_lite.partitioning import Sharding
from t5x_lite.train.step import make_eval_step
from t5x_lite.types import Batch, Params

Evaluate = Callable[[Params], dict[str, float]]


def on_mesh(batches: Iterator[Batch], sharding: Sharding) -> Iterator[Batch]:
    """Batches as arrays of the mesh, their rows over its data axes."""
    for batch in batches:
        yield {name: jax.device_put(x, sharding.batch(x.shape)) for name, x in batch.items()}


def make_evaluate(
    apply: Apply, loss: Loss, held_out: Mapping[str, Batches], sharding: Sharding
) -> Evaluate:
    """`evaluate(params)`: the loss's first term and its metrics over each task's batches.

    Keys are `eval/loss`, `eval/accuracy`, …, averaged over all that is weighted; where there are
    several tasks, `eval/TASK/loss`, … too. Nothing that regularises training counts.
    """
    plain = getattr(loss, "plain", loss)
    eval_step = jax.jit(make_eval_step(apply, plain))
    main = next(iter(plain.coefficients))

    def totals_of(params: Params, batches: Batches) -> dict[str, Any]:
        totals: dict[str, Any] = {}
        for batch in on_mesh(iterate(batches), sharding):
            for name, pair in eval_step(params, batch).items():
                # Sums over many batches are kept in double precision.
                totals[name] = totals.get(name, 0.0) + np.asarray(pair, np.float64)
        return totals

    def averages(totals: Mapping[str, Any], prefix: str) -> dict[str, float]:
        return {
            f"{prefix}/{'loss' if name == main else name}": float(total / weight)
            for name, (total, weight) in totals.items()
        }

    def evaluate(params: Params) -> dict[str, float]:
        began = time.perf_counter()
        totals = {name: totals_of(params, batches) for name, batches in held_out.items()}
        terms = next(iter(totals.values()))
        row = averages({term: sum(of[term] for of in totals.values()) for term in terms}, "eval")
        if len(totals) > 1:
            for name, of in totals.items():
                row |= averages(of, f"eval/{name}")
        return {**row, "eval/seconds": time.perf_counter() - began}

    return evaluate
