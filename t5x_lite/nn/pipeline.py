"""Pipeline parallelism: each device of the mesh axis `stage` holds, and computes, a run of layers.

A batch passes the stages in microbatches (GPipe: Huang et al. 2019, §2.3). In tick t stage s works
on microbatch t - s, then hands what it made of it to the next stage. In the first and the last
stages - 1 ticks some stages have no microbatch yet, or none any more: the bubble. They compute
something all the same, which is thrown away.

`jax.shard_map` takes the stage axis alone out of the compiler's hands, so that a layer's code, its
own `shard_map`s over other axes included, is the same in a pipeline and out of it.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.attention import LayerInputs
from t5x_lite.nn.blocks import Round, Section
from t5x_lite.nn.config import ModelConfig
from t5x_lite.partitioning import Sharding
from t5x_lite.types import PyTree

STAGE = "stage"
# What a microbatch takes of LayerInputs: its rows, where there is more than one for all.
_PER_ROW = ("sees", "rotation", "positions_BT", "segments_BT", "dropout_keys")


def stages(sharding: Sharding | None) -> int:
    """Runs that the layers of a stack are divided into; 1 without a pipeline."""
    if sharding is None or STAGE not in sharding.axes("layers"):
        return 1
    return sharding.mesh.shape[STAGE]


def microbatches(rows: int, sharding: Sharding) -> int:
    """How many microbatches `rows` pass the pipeline in: a multiple of the stages.

    What `sharding` says; else two for each stage where the rows divide by that, or one. More make
    the bubble smaller, and the matrix products too.

    Raises:
        UserError: the rows don't divide.
    """
    count, asked = stages(sharding), sharding.pipeline_microbatches
    devices = sharding.parts("batch") // count
    if asked is not None and (asked < 1 or asked % count):
        raise UserError(
            f"pipeline_microbatches={asked} must be a multiple of stage={count}, each of which "
            f"feeds as many; try PIPELINE_MICROBATCHES={max(1, asked // count) * count}."
        )
    parts = asked or next((n for n in (2 * count, count) if rows % (n * devices) == 0), count)
    if rows % (parts * devices):
        best = max(1, rows // (parts * devices)) * parts * devices
        raise UserError(
            f"{rows} rows (BATCH_SIZE over MICROBATCHES) don't divide into {parts} pipeline "
            f"microbatches on {devices} data-parallel devices; try {best} rows or another "
            "PIPELINE_MICROBATCHES."
        )
    return parts


def bubble(stages: int, microbatches: int) -> float:
    """The share of its time in which a stage computes nothing that is used."""
    return (stages - 1) / (microbatches + stages - 1)


def check(model: ModelConfig, sharding: Sharding, rows: int) -> str | None:
    """Says how a batch of `rows` passes the pipeline; None where there is none.

    Raises:
        UserError: a model whose layers can't be divided among the stages, or rows that can't among
            microbatches.
    """
    count = stages(sharding)
    if count == 1:
        return None
    if model.kind == "encoder-decoder":
        raise UserError(
            f"stage={count}: an encoder-decoder can't be pipelined, since every layer of the "
            "decoder reads the encoder's output; set stage=1 and leave 'pp' out of RULES."
        )
    if not model.scan:
        raise UserError(
            f"stage={count}: only scanned layers are divided among stages; set scan=True."
        )
    if model.remat == "offload":
        # libtpu 0.0.42.1: "async-start expects the shape of operand 0 to match".
        raise UserError(
            f"stage={count}: the TPU compiler can't offload what a loop over microbatches keeps; "
            "set remat='full' or 'save_qkv_proj' instead of 'offload'."
        )
    section = next((s for s in model.main.sections if s.stacked), None)
    if section is None:
        raise UserError(
            f"stage={count}: the {model.main.layers} layers have no stacked parameters that could "
            "be divided among stages; set stage=1 and leave 'pp' out of RULES."
        )
    _check_layers(section, count)
    parts, each = microbatches(rows, sharding), section.repeats * len(section.blocks) // count
    return (
        f"pipeline of {count} stages × {each} layer{'s' * (each > 1)}, "
        f"{parts} microbatches, bubble {bubble(count, parts):.0%}"
    )


def _check_layers(section: Section, count: int) -> None:
    repeats, each = section.repeats, len(section.blocks)
    if repeats % count:
        unit = "layers" if each == 1 else f"rounds of {each} layers"
        best = max(d for d in range(1, count + 1) if repeats % d == 0)
        raise UserError(
            f"{repeats} {unit} don't divide by stage={count}; try stage={best} or "
            f"{-(-repeats // count) * count} {unit}."
        )


def run(
    module: type[nn.Module],
    section: Section,
    common: layers.Common,
    scope: Scope,
    x_BTD: Float[Array, "B T D"],
    inputs: LayerInputs,
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """What scanning over the section's layers gives, computed in a pipeline.

    Args:
        module: the section's block, rematerialised or not.
        section: the stacked layers.
        common: what modules share; its sharding says how many stages there are.
        scope: of the stack, which holds the section's parameters, [layers, …].
        x_BTD: the residual stream.
        inputs: of all layers.

    Returns:
        The residual stream, and auxiliaries, [layers, …] with rows at the axis where a block has
        them (the first, of a `Round` the second).

    Raises:
        UserError: layers that don't divide by stages, rows that don't by microbatches.
    """
    sharding = common.sharding
    _check_layers(section, stages(sharding))
    rows = _Rows(x_BTD.shape[0], sharding)
    per_row, shared, put_together = _take_apart(inputs, rows.count)
    path = (*scope.path, section.name)

    def stage(params, x_ISbTD, per_row, shared):
        inner = dataclasses.replace(common, sharding=sharding.inside())

        def layer(x_bTD, own, now):
            values, number = own
            place = Scope({"params": values}, name=section.name, path=path)
            with place.temporary():
                block = module(section.block, inner, parent=place)
                x_bTD, (_, aux) = block(x_bTD, None, number, now)
            return x_bTD, aux

        def inputs_of(part):
            each = jax.lax.axis_size(STAGE)
            own = jax.tree.map(lambda leaf: leaf[part // each, part % each], per_row)
            return put_together(own, shared)

        return _ticks(layer, section, params, x_ISbTD[:, 0], inputs_of)

    whole, own_layers, own_rows = PartitionSpec(), PartitionSpec(STAGE), PartitionSpec(None, STAGE)
    # No check of what varies over stages: blocks' inner loops begin with constants, which don't.
    piped = jax.shard_map(
        stage, mesh=sharding.mesh, in_specs=(own_layers, own_rows, whole, whole),
        out_specs=(own_rows, PartitionSpec(None, None, STAGE)), axis_names={STAGE}, check_vma=False,
    )  # fmt: skip
    out_ISbTD, aux = piped(
        scope.variables()["params"][section.name], rows.split(x_BTD),
        jax.tree.map(rows.split, per_row), shared,
    )  # fmt: skip
    axis = 2 if isinstance(section.block, Round) else 1
    return rows.merge(out_ISbTD), jax.tree.map(lambda leaf: rows.merge(leaf, axis), aux)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Which row of a batch is in which microbatch: one that is on the same device.

    Outside of the pipeline rows are split over data-parallel devices, then stages. Microbatch
    i · stages + s has every I-th of stage s's rows: [B, …] becomes [I, S, B / (I · S), …].
    """

    count: int
    sharding: Sharding

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """Data-parallel devices, stages, a microbatch's rows on each of the former, I."""
        each = stages(self.sharding)
        turns = microbatches(self.count, self.sharding) // each
        devices = self.sharding.parts("batch") // each
        return devices, each, self.count // (devices * each * turns), turns

    def split(self, x: Array) -> Array:
        """[B, …] → [I, S, b, …]."""
        devices, each, rows, turns = self._sizes
        x = x.reshape(devices, each, rows, turns, *x.shape[1:])
        x = jnp.moveaxis(x, (3, 1), (0, 1))
        return x.reshape(turns, each, devices * rows, *x.shape[4:])

    def merge(self, x: Array, axis: int = 0) -> Array:
        """[I, S, …, b, …] → […, B, …] with rows at `axis`; undoes `split`."""
        devices, each, rows, turns = self._sizes
        x = jnp.moveaxis(x, (0, 1), (axis, axis + 1))  # […, I, S, b, …]
        before, after = x.shape[:axis], x.shape[axis + 3 :]
        x = x.reshape(*before, turns, each, devices, rows, *after)
        x = jnp.moveaxis(x, (axis + 2, axis + 1, axis + 3), (axis, axis + 1, axis + 2))
        return x.reshape(*before, self.count, *after)


def _ticks(
    layer: Callable, section: Section, params: PyTree, x_IbTD: Array, inputs_of: Callable
) -> tuple[Array, dict[str, Array]]:
    """One stage's work, inside of `shard_map`: its layers are in `params`, in `x_IbTD` its rows.

    Every stage feeds the first one and is given results by the last: the microbatches i · S …
    i · S + S - 1 lie on one stage each, and move down by one each tick until stage 0 takes them in.
    What comes out of the last stage moves down in the same way to where it belongs.
    """
    index, count = jax.lax.axis_index(STAGE), jax.lax.axis_size(STAGE)
    parts, own = x_IbTD.shape[0] * count, section.repeats // count
    numbers = section.first + len(section.blocks) * (index * own + jnp.arange(own))
    up = functools.partial(_shift, pairs=[(s, s + 1) for s in range(count - 1)])
    down = functools.partial(_shift, pairs=[(s + 1, s) for s in range(count - 1)])

    def tick(carry, now):
        x_bTD, fed_bTD, out_IbTD = carry
        inputs = inputs_of(jnp.clip(now - index, 0, parts - 1))
        waiting_bTD = x_IbTD[jnp.minimum(now // count, x_IbTD.shape[0] - 1)]
        fed_bTD = jnp.where(now % count == 0, waiting_bTD, fed_bTD)
        x_bTD = jnp.where(index == 0, fed_bTD, x_bTD)
        x_bTD, aux = jax.lax.scan(
            lambda x, of_layer: layer(x, of_layer, inputs), x_bTD, (params, numbers)
        )
        slot = jnp.maximum(now - (count - 1), 0) // count
        done_bTD = jnp.where(index == count - 1, x_bTD, down(out_IbTD[slot]))
        out_IbTD = jax.lax.dynamic_update_index_in_dim(out_IbTD, done_bTD, slot, 0)
        return (up(x_bTD), down(fed_bTD), out_IbTD), aux

    # In the bubble before its first microbatch a stage works on embeddings rather than on zeros,
    # which a norm might divide by.
    start = x_IbTD[0], x_IbTD[0], jnp.zeros_like(x_IbTD)
    (_, _, out_IbTD), aux = jax.lax.scan(tick, start, jnp.arange(parts + count - 1))

    def of_microbatches(leaf):  # this stage's came in ticks index … index + parts - 1
        leaf = jax.lax.dynamic_slice_in_dim(leaf, index, parts)
        return leaf.reshape(-1, count, *leaf.shape[1:])

    return out_IbTD[:, None], jax.tree.map(of_microbatches, aux)


def _shift(x: Array, pairs: list[tuple[int, int]]) -> Array:
    """Each stage's array at another; zeros where none arrives."""
    return jax.lax.ppermute(x, STAGE, pairs)


def _take_apart(inputs: LayerInputs, rows: int) -> tuple[list[Array], list[Array], Callable]:
    """Arrays with the batch's rows, arrays that serve them all, and what makes inputs of both."""
    keys, sees = inputs.dropout_keys, inputs.sees
    stored = sees is not None and sees.whole is not None
    if stored:  # made anew of each microbatch's rows, rather than sent to all stages
        inputs = inputs.replace(sees=sees.bare())
    if keys is not None:  # a key array's hidden axis has no place in a PartitionSpec
        inputs = inputs.replace(dropout_keys=jax.random.key_data(keys))
    leaves, tree = jax.tree_util.tree_flatten_with_path(inputs)
    rowwise = [path[0].name in _PER_ROW and leaf.shape[0] == rows for path, leaf in leaves]

    def put_together(per_row: list[Array], shared: list[Array]) -> LayerInputs:
        sources = {True: iter(per_row), False: iter(shared)}
        inputs = tree.unflatten([next(sources[own]) for own in rowwise])
        if stored:
            inputs = inputs.replace(sees=inputs.sees.stored())
        if keys is None:
            return inputs
        wrapped = jax.random.wrap_key_data(inputs.dropout_keys, impl=jax.random.key_impl(keys))
        return inputs.replace(dropout_keys=wrapped)

    def chosen(own: bool) -> list[Array]:
        pairs = zip(leaves, rowwise, strict=True)
        return [leaf for (_, leaf), rows in pairs if rows == own]

    return chosen(True), chosen(False), put_together
