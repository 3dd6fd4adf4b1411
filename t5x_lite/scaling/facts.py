"""What is known of a run before it is run: its sizes by several conventions, work and settings."""

import functools
import hashlib
import json
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.losses import CrossEntropy, Loss
from t5x_lite.nn.config import ModelConfig
from t5x_lite.scaling import counting
from t5x_lite.train.identity import model_identity
from t5x_lite.train.meter import batch_tokens, model_flops

_RATES = 1000  # of a schedule, to find its peak


def facts(config: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A run's facts, json-able, and its kin: runs of equal kin compile the same shapes.

    Args:
      config: the gin text, for the schedule's name.
      arguments: of `train`.

    Returns:
      `family`, `n_total`, `n_non_embedding`, `n_active` (parameters), `batch_size` (rows),
      `batch_tokens` (positions of a batch, padding included, on both sides), `length`, `steps`,
      `step_flops` (training FLOPs of a batch's matrix products), `d` (tokens of the whole run), `c`
      (its FLOPs), `n` = c / 6d, `learning_rate` (the schedule's peak), `optimizer`, `schedule`,
      `seed`.

    Raises:
      UserError: the run doesn't measure held-out loss, or its sizes don't fit.
    """
    if not arguments.get("eval_period"):
        raise UserError("EVAL_PERIOD is None, and a sweep compares held-out losses; set it.")
    model, steps = arguments["model"], arguments["steps"]
    task = arguments["task"].for_family(model.kind)
    batch_size, length = arguments["batch_size"], arguments["length"]
    batches = task.batches(batch_size=batch_size, length=length, seed=arguments.get("seed", 0))
    tokens = batch_tokens(batches)
    shapes = tuple((name, *row) for name, row in batches.shapes.items())
    loss, optimizer = arguments.get("loss", CrossEntropy()), arguments["optimizer"]
    work = _step_flops(model, loss, shapes)
    found = {
        "family": model.kind,
        **_counts(model),
        "batch_size": batch_size,
        "batch_tokens": tokens,
        "length": length,
        "steps": steps,
        "step_flops": work,
        "d": steps * tokens,
        "c": steps * work,
        "n": work / (6 * tokens),
        "learning_rate": _peak(optimizer.schedule, steps),
        "optimizer": type(optimizer).__name__,
        "schedule": _schedule(config, type(optimizer).__name__),
        "seed": arguments.get("seed", 0),
    }
    same = [model_identity(model), [list(map(str, shape)) for shape in shapes], str(loss)]
    kin = hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()[:12]
    return found, kin


@functools.lru_cache(maxsize=256)
def _counts(model: ModelConfig) -> dict[str, int]:
    found = counting.parameter_counts(model)
    return {f"n_{name}": found[name] for name in ("total", "non_embedding", "active")}


@functools.lru_cache(maxsize=256)
def _step_flops(model: ModelConfig, loss: Loss, shapes: tuple) -> int:
    return model_flops(model, loss, {name: (shape, dtype) for name, shape, dtype in shapes})


def _peak(schedule: Any, steps: int) -> float:
    """The highest rate; a schedule is a plain function of the step."""
    at = jnp.linspace(0, steps - 1, min(steps, _RATES)).round()
    return float(np.max(schedule(at)))


def _schedule(config: str, optimizer: str) -> str:
    """`cosine` where the gin text has `optim.AdamW.schedule = @schedules.cosine()`."""
    found = re.search(rf"^\S*\b{optimizer}\.schedule = @(\S+)\(\)", config, re.MULTILINE)
    return found[1].rsplit(".", 1)[-1] if found else "unknown"
