"""A layer, and how the layers of a stack follow each other: all alike, in a pattern, or shared.

A kind of block is a config with `module`, `init_cache`, `attention` and `cross_attention`, and a
module that maps (x, cache, layer number, LayerInputs) to (x, (cache, auxiliaries)).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.errors import UserError
from t5x_lite.nn import layers
from t5x_lite.nn.attention import AttentionConfig, LayerInputs
from t5x_lite.nn.bottleneck import BottleneckConfig
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.mla import MLAConfig
from t5x_lite.nn.moe import MoEConfig
from t5x_lite.nn.remat import LAYER_INPUT, checkpoint_name
from t5x_lite.nn.residual import ResidualConfig
from t5x_lite.partitioning import constrain

ACTIVATION = ("batch", "length", "act_embed")

LayerResult = tuple[Float[Array, "B T D"], tuple[Any, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One layer: self-attention, then cross-attention where there is one, then the FFN."""

    attention: AttentionConfig | MLAConfig
    ffn: MLPConfig | MoEConfig
    residual: ResidualConfig
    cross_attention: AttentionConfig | None = None
    ffn_residual: ResidualConfig | None = None  # None: as `residual`

    def module(self) -> type[nn.Module]:
        """The class of the module that does it; takes (config, common)."""
        return Block

    def init_cache(self, batch: int, slots: int, memory_slots: int | None, dtype: str):
        """The layer's empty cache."""
        cache = {"attention": self.attention.init_cache(batch, slots, dtype)}
        if self.cross_attention is not None:
            cache["cross_attention"] = self.cross_attention.init_cache(batch, memory_slots, dtype)
        return cache


class Block(nn.Module):
    """One layer. Each sublayer draws its dropout from keys folded with the layer and its number."""

    config: BlockConfig
    common: layers.Common

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], cache: Any, layer: Array | int, inputs: LayerInputs
    ) -> LayerResult:
        """Returns the residual stream, and (the layer's cache, its auxiliaries)."""
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        c, aux, caches = self.config, {}, {}
        keys = layers.fold_in(inputs.dropout_keys, layer)

        def connect(number, name, sublayer, residual=c.residual):
            site = layers.fold_in(keys, 2 * number)
            return residual.connect(x_BTD, sublayer, site, self.common, name)

        attention = {"attention": c.attention.build(self.common, "attention")}
        if c.cross_attention is not None:
            attention["cross_attention"] = c.cross_attention.build(
                self.common, "cross_attention", cross=True
            )
        for number, (name, module) in enumerate(attention.items()):
            own = None if cache is None else cache[name]
            site = layers.fold_in(keys, 2 * number + 1)
            x_BTD, caches[name] = connect(
                number, name, lambda y, m=module, o=own, s=site: m(y, o, inputs, s)
            )
        number = len(attention)
        ffn, site = c.ffn.build(self.common, "ffn"), layers.fold_in(keys, 2 * number + 1)
        x_BTD, aux = connect(
            number, "ffn", lambda y: ffn(y, site, inputs.segments_BT), c.ffn_residual or c.residual
        )
        x_BTD = constrain(x_BTD, ACTIVATION, self.common.sharding)
        if inputs.capture:
            aux = {**aux, "layer_outputs_BTD": x_BTD}
        return x_BTD, (None if cache is None else caches, aux)


BlockKind = BlockConfig | BottleneckConfig


@dataclasses.dataclass(frozen=True)
class Round:
    """Layers that differ from each other and are scanned as one; their axis comes second."""

    blocks: tuple[BlockKind, ...]

    def module(self) -> type[nn.Module]:
        """The class of the module that does it; takes (config, common)."""
        return _Round

    def init_cache(self, batch: int, slots: int, memory_slots: int | None, dtype: str):
        """The layers' empty caches."""
        return {
            f"block_{number}": block.init_cache(batch, slots, memory_slots, dtype)
            for number, block in enumerate(self.blocks)
        }


class _Round(nn.Module):
    config: Round
    common: layers.Common

    @nn.compact
    def __call__(self, x_BTD, cache, layer, inputs: LayerInputs) -> LayerResult:
        """Runs its layers, the first of which has number `layer`; auxiliaries are stacked."""
        caches, auxiliaries = {}, []
        for number, block in enumerate(self.config.blocks):
            name = f"block_{number}"
            run = block.module()(block, self.common, name=name)
            own = None if cache is None else cache[name]
            x_BTD, (caches[name], aux) = run(x_BTD, own, layer + number, inputs)
            auxiliaries.append(jax.tree.map(lambda leaf: leaf[None], aux))
        return x_BTD, (None if cache is None else caches, concatenate(auxiliaries))


def concatenate(auxiliaries: list[dict[str, Array]]) -> dict[str, Array]:
    """Joins auxiliaries along their first axis, layers; not every layer has each of them."""
    names = {name: None for aux in auxiliaries for name in aux}
    return {
        name: jnp.concatenate([aux[name] for aux in auxiliaries if name in aux]) for name in names
    }


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Layers that differ: `first` once each, then `blocks` again and again, cut short at the end.

    Gemma's local and global attention, DeepSeek's dense layers before its experts.
    """

    blocks: tuple[BlockKind, ...]
    first: tuple[BlockKind, ...] = ()

    def __post_init__(self):
        if not self.blocks:
            raise UserError("a pattern repeats at least one block.")


@dataclasses.dataclass(frozen=True)
class Shared:
    """The same parameters in every layer (ALBERT)."""

    block: BlockKind


@dataclasses.dataclass(frozen=True)
class Section:
    """A run of layers that are compiled together.

    Its parameters stand under `name`: one layer's, or stacked over `repeats` rounds of the block
    (`name` is then "layers"), or one layer's that all rounds share.
    """

    name: str
    block: BlockKind | Round
    first: int  # the number of its first layer
    repeats: int = 1
    stacked: bool = False

    @property
    def blocks(self) -> tuple[BlockKind, ...]:
        """The layers of one round."""
        return self.block.blocks if isinstance(self.block, Round) else (self.block,)


def sections(block: "BlockKind | Pattern | Shared", count: int) -> tuple[Section, ...]:
    """The sections of a stack of `count` layers, in order."""
    if isinstance(block, Shared):
        return (Section("shared", block.block, 0, count),)
    if not isinstance(block, Pattern):
        return (Section("layers", block, 0, count, stacked=True),)
    first, period = block.first[:count], len(block.blocks)
    rounds, rest = divmod(count - len(first), period)
    result = [Section(f"first_{n}", each, n) for n, each in enumerate(first)]
    if rounds:
        unit = block.blocks[0] if period == 1 else Round(block.blocks)
        result.append(Section("layers", unit, len(first), rounds, stacked=True))
    start = len(first) + rounds * period
    result += [Section(f"last_{n}", block.blocks[n], start + n) for n in range(rest)]
    return tuple(result)
