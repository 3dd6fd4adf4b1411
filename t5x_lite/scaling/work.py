"""FLOPs of a model's programs for one row, and of each part, traced from shapes alone."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import losses
from t5x_lite.aot import count
from t5x_lite.data.tasks import Trainable
from t5x_lite.nn import parameters
from t5x_lite.nn.cache import init_cache
from t5x_lite.nn.config import ModelConfig, StackConfig
from t5x_lite.nn.transformer import Transformer
from t5x_lite.types import Batch, PyTree

LENGTH = 2048  # of a row, where neither the user nor the model's learned positions say


def row_shapes(
    model: ModelConfig, task: Trainable | None, length: int | None, target_length: int | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one row: as the task has them, or tokens, targets and weights alone.

    Args:
        model: whose stacks are filled.
        task: needs no data.
        length: of the encoder, or of the only stack; None: as many as it has learned positions.
        target_length: of a decoder beside an encoder; None: the task's, or `length`.

    Raises:
        UserError: more tokens than a stack has positions.
    """
    if length is None:
        stacks = filter(None, (model.encoder, model.decoder))
        length = min(filter(None, map(_positions, stacks)), default=LENGTH)
    if task is not None:
        shapes = task.for_family(model.kind).batches(
            "train", batch_size=1, length=length, seed=0
        ).shapes  # fmt: skip
        batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    else:
        smallest = jax.eval_shape(lambda: parameters.smallest_batch(model))
        batch = dict(smallest)
        batch |= {"targets": smallest["tokens"]} if "tokens" in smallest else {}
        batch = {name: _of_length(leaf, length) for name, leaf in batch.items()}
        batch["weights"] = jax.ShapeDtypeStruct((1, length), jnp.float32)
    if target_length is not None:
        batch = {
            name: _of_length(leaf, target_length) if name in _TARGETS else leaf
            for name, leaf in batch.items()
        }
    sides = lengths_of(model, batch)
    model.check_lengths(sides.get("encoder", sides.get("decoder")), sides.get("decoder"))
    return batch


_TARGETS = ("tokens", "targets", "weights", "segments", "positions")


def _of_length(leaf: jax.ShapeDtypeStruct, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length, *leaf.shape[2:]), leaf.dtype)


def _positions(stack: StackConfig) -> int | None:
    return getattr(stack.positions, "max_length", None)


def lengths_of(model: ModelConfig, batch: Batch) -> dict[str, int]:
    """Tokens a row of each stack."""
    both = model.kind == "encoder-decoder"
    sides = {"encoder": "encoder_" if both else "", "decoder": ""}
    return {
        name: next(
            batch[entry].shape[1]
            for entry in (f"{prefix}tokens", f"{prefix}features")
            if entry in batch
        )
        for name, prefix in sides.items()
        if getattr(model, name) is not None
    }


def count_work(model: ModelConfig, loss: losses.Loss | None, batch: Batch) -> dict[str, Any]:
    """FLOPs of a row's matrix products in each program, and by part: docs/counting.md, `flops`."""
    once = dataclasses.replace(model, remat="none")
    forward = _traced(forward_program(once, loss), batch, once)
    counts = {
        "forward": forward.matmul,
        "training": 3 * forward.matmul,
        "executed": _traced(jax.grad(forward_program(model, loss)), batch, model).matmul,
        "elementwise": forward.elementwise,
        "parts": _parts(forward, lengths_of(model, batch)),
    }
    visible = {
        name: visible_share(getattr(model, name), n) for name, n in lengths_of(model, batch).items()
    }
    hidden = sum(
        round(part["flops"] * (1 - visible[part["stack"]]))
        for part in counts["parts"]
        if part["part"] == "attention scores"
    )
    counts["visible"] = forward.matmul - hidden
    if model.decoder is not None and model.predicts == "next":
        counts["decoding"] = _decoding(once, lengths_of(model, batch)).matmul
    return counts


def forward_program(
    model: ModelConfig, loss: losses.Loss | None
) -> Callable[[PyTree, Batch], jax.Array]:
    """A function of (parameters, batch) whose gradient is training: the loss, or all outputs."""
    module = Transformer(model)

    def apply(params, batch, dropout_keys=None):
        return module.apply({"params": params}, batch, dropout_keys)

    def value(params: PyTree, batch: Batch):
        if loss is not None:
            return sum(map(jnp.sum, loss(apply, params, None, batch, None).terms.values()))
        output = apply(params, batch)
        found = jax.tree.leaves((output.hidden_BTD, output.aux))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in found if _is_float(x))

    return value


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _traced(function: Callable, batch: Batch, model: ModelConfig) -> count.Flops:
    return count.flops(jax.jit(function).trace(parameters.abstract(model)[0], batch).jaxpr)


def _decoding(model: ModelConfig, lengths: Mapping[str, int]) -> count.Flops:
    """Of one token more, which looks at a cache of a whole row."""
    module = Transformer(model)

    def step(params, cache, batch):
        return losses.logits(module.apply({"params": params}, batch, cache=cache))

    cache = row_cache(model, lengths)
    batch = {"tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32)}
    program = jax.jit(step).trace(parameters.abstract(model)[0], cache, batch)
    return count.flops(program.jaxpr)


def row_cache(model: ModelConfig, lengths: Mapping[str, int]) -> PyTree:
    """Shapes of the cache of one row, of a model with a decoder."""
    return jax.eval_shape(lambda: init_cache(model, 1, lengths["decoder"], lengths.get("encoder")))


def _parts(found: count.Flops, lengths: Mapping[str, int]) -> list[dict[str, Any]]:
    """A row's FLOPs by stack and part, and a token's of the side that they are of."""
    main = "decoder" if "decoder" in lengths else "encoder"
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for kind, products in (("flops", found.products), ("elementwise", found.others)):
        for place, flops in products.items():
            part = part_of(place, kind == "flops")
            row = rows.setdefault(part, {"flops": 0, "elementwise": 0})
            row[kind] += flops
    return [
        {"stack": stack, "part": part, **row,
         "per_token": row["flops"] / lengths[side if side in lengths else main]}
        for (stack, part, side), row in rows.items() if any(row.values())
    ]  # fmt: skip


def part_of(place: str, is_product: bool = True) -> tuple[str, str, str]:
    """(stack, part, stack whose tokens it works on) of an operation, by its place in the program.

    What attention computes besides products, softmax above all, belongs to its scores.
    """
    names = [name for name in re.split(r"[/()]", place) if name]
    tail = names[-1] if names else ""
    if "Transformer" not in names:  # the loss's own
        return "head", "logits", "head"
    stack = next((name for name in ("encoder", "decoder", "head") if name in names), "embedder")
    scores = " scores" if not is_product or re.search(r"\w*TS\b", tail) else ""
    if "cross_attention" in names:
        if "cross_attention._memory" in names:
            return stack, "cross-attention, keys and values", "encoder"
        return stack, f"cross-attention{scores}", stack
    if "attention" in names:
        return stack, f"attention{scores}", stack
    if "router" in names or tail.startswith("BTE"):
        return stack, "router", stack
    if "experts" in names:
        return stack, "experts", stack
    if any(re.fullmatch(r"(ffn|shared)(_\d+)?", name) for name in names):
        return stack, "feed-forward", stack
    if "embedder" in (stack, *names) or "input_projection" in names:
        return stack, "embedding", stack
    return stack, "transform" if stack == "head" else "other", stack


def visible_share(stack: StackConfig, length: int) -> float:
    """The share of the square of scores that masks leave, over a stack's layers."""
    shares = []
    for block in stack.blocks:
        attention = getattr(block, "attention", None)
        if attention is None:
            continue
        reach = min(getattr(attention, "window", None) or length, length)
        # Keys before the query and itself, and on either side where nothing is causal.
        before = reach * (reach + 1) // 2 + (length - reach) * reach
        seen = before if stack.causal else 2 * before - length
        shares += [seen / length**2] * attention.heads
    return sum(shares) / len(shares) if shares else 1.0
