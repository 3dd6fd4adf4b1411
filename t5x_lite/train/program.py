"""The programs of a run, each with what it is called with: to be run, or only compiled."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from t5x_lite.data.converters import Shapes
from t5x_lite.losses import Loss
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.quantized import QuantizedTraining
from t5x_lite.optim import Optimizer
from t5x_lite.partitioning import Sharding
from t5x_lite.train.corrections import correction_rule
from t5x_lite.train.identity import plain
from t5x_lite.train.state import state_shardings
from t5x_lite.train.step import make_train_step, model_apply
from t5x_lite.types import PyTree


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function, and the shapes and shardings of its arguments.

    Attributes:
        function: what `jax.jit` returned.
        inputs: its arguments as trees of `jax.ShapeDtypeStruct`; nothing is allocated.
        settings: what it was made from, by the names that a user knows.
    """

    function: Any
    inputs: tuple[PyTree, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def lower(self) -> jax.stages.Lowered:
        """Traced for the mesh of its inputs, whose devices needn't be there."""
        return self.function.lower(*self.inputs)


def train_program(
    model: ModelConfig,
    optimizer: Optimizer,
    loss: Loss,
    sharding: Sharding,
    shapes: Shapes,
    *,
    microbatches: int = 1,
    ema_decay: float | int | None = None,
    quantized: QuantizedTraining | None = None,
    correction_rate: float | int = 1e-3,
) -> Program:
    """The step that `train` runs: (state, batch, key) to (state, metrics); the state is donated.

    Args:
        model: as in `train`, like the others.
        optimizer: with its schedule.
        loss: the training loss.
        sharding: mesh, rules and pipeline.
        shapes: of a batch, name to (shape, dtype).
        microbatches: parts of a batch.
        ema_decay: of an average of the parameters; None: there is none.
        quantized: which products are of small integers.
        correction_rate: how far a step moves routers' corrections.
    """
    state, shardings = state_shardings(model, optimizer, sharding, ema_decay is not None)
    step = make_train_step(
        *(model_apply(model, sharding, quantized), loss),
        *(optimizer.build(parameters.abstract(model)[1]), optimizer.schedule),
        *(microbatches, ema_decay, sharding, correction_rule(model, correction_rate)),
    )
    function = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    inputs = (placed(state, shardings), batch_shapes(shapes, sharding), key_shape())
    settings = {
        **{"model": plain(model), "optimizer": plain(optimizer), "loss": plain(loss)},
        "batch": {name: f"{np.dtype(kind)}{list(size)}" for name, (size, kind) in shapes.items()},
        **{"rules": str(sharding.table), "pipeline_microbatches": sharding.pipeline_microbatches},
        **{"microbatches": microbatches, "ema_decay": ema_decay},
        **{"quantized": plain(quantized), "correction_rate": correction_rate},
    }
    return Program(function, inputs, settings)


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that know where they lie."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def batch_shapes(shapes: Shapes, sharding: Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's entries as they lie on the mesh."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch(shape, name))
        for name, (shape, dtype) in shapes.items()
    }


def key_shape() -> jax.ShapeDtypeStruct:
    """A random key's."""
    return jax.eval_shape(lambda: jax.random.key(0))
