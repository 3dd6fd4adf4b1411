"""Timing a run's steps, and reading what they computed one step late."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from t5x_lite import flops
from t5x_lite.data.converters import Shapes
from t5x_lite.data.pipeline import Batches
from t5x_lite.errors import UserError
from t5x_lite.losses import Loss
from t5x_lite.metrics import MetricsLog
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig, compiled
from t5x_lite.train.progress import Progress
from t5x_lite.train.step import model_apply
from t5x_lite.types import Batch


def model_flops(model: ModelConfig, loss: Loss, shapes: Shapes) -> int:
    """FLOPs of a step's matrix products: three times the forward pass's.

    Of every query with every key, whichever kernel runs; what is recomputed to save memory isn't
    counted (Chowdhery et al. 2022, appendix B).
    """
    plain = dataclasses.replace(compiled(parameters.scanned(model), "plain"), remat="none")
    apply = model_apply(plain)
    batch = {name: jax.ShapeDtypeStruct(*row) for name, row in shapes.items()}
    params = parameters.abstract(plain)[0]
    return 3 * flops.matmul_flops(lambda p, b: loss(apply, p, None, b, None), params, batch)


def batch_tokens(batches: Batches) -> int:
    """Positions of a batch, padding included; an encoder-decoder's on both sides."""
    sides = [name for name in batches.shapes if name in ("tokens", "encoder_tokens")]
    return sum(math.prod(batches.shapes[name][0]) for name in sides)


class Meter:
    """Times the steps and turns device values into log rows, one step late."""

    def __init__(self, start: int, step_tokens: int, step_flops: int, peak: float):
        self._step_tokens, self._step_flops, self._peak = step_tokens, step_flops, peak
        self._began = self._mark = time.perf_counter()
        self._logged, self._waited = start, 0.0
        self._held: tuple[int, dict[str, Any]] | None = None
        self._in_flight: Any = None
        self._newest: Any = None

    def wait_for(self, data: Iterator[Batch]) -> Batch:
        """The next batch; at most two steps are in flight, and the wait for data is timed.

        A step waits for data where the one before it is done by the time that the batch is there.
        """
        if self._in_flight is not None:
            jax.block_until_ready(self._in_flight)
        began = time.perf_counter()
        batch = next(data)
        if self._newest is not None and self._newest.is_ready():
            self._waited += time.perf_counter() - began
        return batch

    def dispatched(self, metrics: dict[str, Any]) -> None:
        """Remembers the newest step under way, so that the host stays at most one ahead."""
        self._in_flight, self._newest = self._newest, metrics["loss"]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what isn't training, once the steps under way are done."""
        jax.block_until_ready(self._newest)
        began = time.perf_counter()
        yield
        self._mark += time.perf_counter() - began

    def hold(self, step: int, metrics: dict[str, Any]) -> None:
        """Keeps a step's metrics, on the device, for `flush`."""
        self._held = (step, metrics)

    def flush(self, log: MetricsLog, progress: Progress) -> None:
        """Reads what is held, if anything; logs and shows it.

        Raises:
            UserError: the loss isn't finite.
        """
        if self._held is None:
            return
        (step, metrics), self._held = self._held, None
        values = {name: np.asarray(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, steps = now - self._mark, step - self._logged
        row = {
            **values,
            "tokens_per_second": steps * self._step_tokens / seconds,
            "data_wait": self._waited / seconds,
            "seconds": now - self._began,
        }
        if self._peak:
            row["mfu"] = steps * self._step_flops / seconds / self._peak
        self._mark, self._waited, self._logged = now, 0.0, step
        log.write(step, **row)
        progress.update({"step": step, **row})
        if not np.isfinite(values["loss"]):
            raise UserError(
                f"the loss is {values['loss']} at step {step}; lower LEARNING_RATE, raise "
                f"WARMUP_STEPS, or clip gradients; the checkpoints up to there are intact."
            )
