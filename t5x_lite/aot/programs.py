"""The programs that runs of `eval` and `generate` call; `train.program` has that of `train`."""

import jax
import jax.numpy as jnp

from t5x_lite.data.converters import Shapes
from t5x_lite.decode.generate import Decoding, jit_decode
from t5x_lite.decode.sampling import Sampling
from t5x_lite.errors import UserError
from t5x_lite.losses import Loss
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import Sharding
from t5x_lite.train.evaluation import jit_eval_step
from t5x_lite.train.program import Program, batch_shapes, placed
from t5x_lite.train.step import model_apply
from t5x_lite.types import Params


def eval_program(model: ModelConfig, loss: Loss, sharding: Sharding, shapes: Shapes) -> Program:
    """The step of `eval`, and of evaluations while training: (parameters, batch) to sums."""
    function = jit_eval_step(model_apply(model, sharding), loss)
    return Program(function, (_params(model, sharding), batch_shapes(shapes, sharding)))


def generate_program(
    model: ModelConfig, sharding: Sharding, rows: int, length: int, max_tokens: int
) -> Program:
    """What `generate` runs: it reads a batch of prompts, then draws a token a row in each turn.

    Args:
        model: has a decoder.
        sharding: mesh and rules.
        rows: prompts at once.
        length: tokens of a row in all; what isn't written is the prompt.
        max_tokens: that are written.

    Raises:
        UserError: a model without a decoder, or no room for a prompt.
    """
    if model.decoder is None:
        raise UserError("an encoder-only model writes nothing; compile it with --verb eval.")
    if not 1 <= max_tokens < length:
        raise UserError(f"max_tokens={max_tokens} must be at least 1 and less than "
                        f"LENGTH={length}, of which the rest is the prompt.")  # fmt: skip
    prompt = dict.fromkeys(("tokens", "segments"), (rows, length - max_tokens))
    if model.kind == "encoder-decoder":
        prompt = {f"encoder_{name}": shape for name, shape in prompt.items()}
        prompt |= dict.fromkeys(("tokens", "segments"), (rows, 1))
    batch = batch_shapes(
        {name: (shape, jnp.dtype("int32")) for name, shape in prompt.items()}, sharding
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    decoding = Decoding(max_tokens, (1,), Sampling(0.8, None, 0.95))
    banned = jax.ShapeDtypeStruct((model.physical_vocab,), bool)
    module, params = Transformer(model, sharding), _params(model, sharding)
    return Program(jit_decode, (module, params, batch, keys, decoding, banned))


def _params(model: ModelConfig, sharding: Sharding) -> Params:
    shapes, axes = parameters.abstract(model)
    shardings = jax.tree.map(lambda leaf, names: sharding.named(names, leaf.shape), shapes, axes)
    return placed(shapes, shardings)
