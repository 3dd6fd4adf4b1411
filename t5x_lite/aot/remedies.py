"""What to change where a training step doesn't fit its chips, found by arithmetic.

The estimate is of what a step holds: its state, the gradients, and what the forward pass keeps
(train/activations.py). Its difference between two settings is taken for the compiler's.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from t5x_lite.errors import UserError
from t5x_lite.partitioning import Sharding
from t5x_lite.train.activations import stored_bytes
from t5x_lite.train.state import state_shardings
from t5x_lite.train.step import check_batch

GIB = 2**30


def held(setting: Any) -> tuple[int, int]:
    """Estimated bytes a chip of a `compile.Setting`: state and gradients, and activations."""
    ema = setting.ema_decay is not None
    shapes, where = state_shardings(setting.model, setting.optimizer, setting.sharding, ema)
    activations = stored_bytes(
        *(setting.model, setting.loss, setting.shapes, setting.sharding, setting.microbatches)
    )
    return _part(shapes, where) + _part(shapes.params, where.params), activations


def _part(shapes: Any, where: Any) -> int:
    """Bytes of a tree on one chip."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(where), strict=True)
    return sum(math.prod(w.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, w in pairs)


def nearest(setting: Any, over: int) -> str:
    """The smallest changes that take `over` bytes off a chip, each by itself, as a sentence."""
    state, activations = now = held(setting)
    most = state + activations - over
    found = []
    for options in (_remats(setting), _parts(setting, now), _rules(setting)):
        for words, size in options:
            if size <= most:
                found.append(f"{words} ({(state + activations - size) / GIB:.2f} GiB less)")
                break
    if found:
        return f"by estimate it fits with {' or '.join(found)}"
    return (
        f"by estimate no single change of remat, microbatches, batch or rules is enough: state and "
        f"gradients alone take {state / GIB:.2f} GiB; take more chips, or several changes at once"
    )


def _remats(setting: Any) -> Iterator[tuple[str, int]]:
    """Policies that keep less and less."""
    for policy in ("minimal", "save_qkv_proj", "full"):
        model = dataclasses.replace(setting.model, remat=policy)
        yield f"the model's remat='{policy}'", sum(held(dataclasses.replace(setting, model=model)))


def _parts(setting: Any, now: tuple[int, int]) -> Iterator[tuple[str, int]]:
    """More microbatches, or smaller batches, of which activations are a share."""
    state, activations = now
    share = 2
    while share * setting.microbatches <= setting.rows:
        words = []
        if _divides(setting.rows, share * setting.microbatches, setting.sharding):
            words.append(f"MICROBATCHES={share * setting.microbatches}")
        if _divides(setting.rows // share, setting.microbatches, setting.sharding):
            words.append(f"BATCH_SIZE={setting.rows // share}")
        if words:
            yield " or ".join(words), state + activations // share
        share *= 2


def _rules(setting: Any) -> Iterator[tuple[str, int]]:
    """Parameters split over the data axes, where they aren't."""
    table = setting.sharding.table
    parts = table.parts.split("_")
    if "fsdp" not in parts and setting.sharding.mesh.shape["fsdp"] > 1:
        split = "_".join(["fsdp", *(part for part in parts if part != "dp")])
        with contextlib.suppress(UserError):  # sizes that the mesh doesn't divide
            where = dataclasses.replace(setting.sharding, table=split)
            yield f"RULES='{split}'", sum(held(dataclasses.replace(setting, sharding=where)))


def _divides(rows: int, microbatches: int, sharding: Sharding) -> bool:
    try:
        check_batch(rows, microbatches, sharding)
    except UserError:
        return False
    return True
