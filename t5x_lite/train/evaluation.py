"""The loss on held-out batches, while training and afterwards."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite.data.pipeline import Batches, iterate
from t5x_lite.losses import Apply, Loss
from t5x_lite.partitioning import Sharding
from t5x_lite.train.step import make_eval_step
from t5x_lite.types import Batch, Params

Evaluate = Callable[[Params], dict[str, float]]


def rows_here(sharding: Sharding, batch_size: int) -> range | list[int]:
    """The rows of a batch that this process's devices hold, ascending.

    It is the mesh that says so, not the number of the process: where an axis like `tensor` goes
    across hosts, several of them hold the same rows.
    """
    parts = sharding.batch((batch_size,)).addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({row for (part,) in parts for row in range(batch_size)[part]})
    return range(batch_size) if len(rows) == batch_size else rows


def on_mesh(
    batches: Iterator[Batch], sharding: Sharding, rows: Sequence[int] | None = None, of: int = 0
) -> Iterator[Batch]:
    """Batches as arrays of the mesh, their rows over its data axes.

    Args:
        batches: whole ones, or of one process.
        sharding: of the model.
        rows: which rows of the whole `batches` have, at least those of `rows_here`; None for all.
        of: rows of the whole.
    """
    for batch in batches:
        yield {name: _place(x, name, sharding, rows, of) for name, x in batch.items()}


def _place(
    x: np.ndarray, name: str, sharding: Sharding, rows: Sequence[int] | None, of: int
) -> jax.Array:
    shape = x.shape if rows is None else (of, *x.shape[1:])
    where = sharding.batch(shape, name)
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    # jax.make_array_from_process_local_data would have to infer what each axis of `x` covers.
    rows = range(len(x)) if rows is None else rows

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0])
        start = rows.index(first)  # a shard's rows follow each other, and ours are ascending
        return x[(slice(start, start + last - first), *index[1:])]

    return jax.make_array_from_callback(shape, where, shard)


def jit_eval_step(apply: Apply, loss: Loss) -> Any:
    """`make_eval_step`, compiled, of the loss without what regularises training."""
    return jax.jit(make_eval_step(apply, _plain(loss)))


def _plain(loss: Loss) -> Loss:
    return getattr(loss, "plain", loss)


def make_evaluate(
    apply: Apply, loss: Loss, held_out: Mapping[str, Batches], sharding: Sharding
) -> Evaluate:
    """`evaluate(params)`: the loss's first term and its metrics over each task's batches.

    Keys are `eval/loss`, `eval/accuracy`, …, averaged over all that is weighted; where there are
    several tasks, `eval/TASK/loss`, … too. Nothing that regularises training counts.
    """
    eval_step = jit_eval_step(apply, loss)
    main = next(iter(_plain(loss).coefficients))

    def totals_of(params: Params, batches: Batches) -> dict[str, Any]:
        totals: dict[str, Any] = {}
        rows = rows_here(sharding, batches.batch_size)
        data = iterate(batches, rows=rows)
        for batch in on_mesh(data, sharding, rows, batches.batch_size):
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
