"""Maximal update parametrisation: hyperparameters tuned at one width hold at every other.

Yang et al. 2022 (Tensor Programs V), table 3, relative to a *base*: the same model at the width
that the hyperparameters were tuned at. With r, how many times longer than the base's an axis is,
and r_in, the product over the axes that a parameter sums over:

    class    sums over       gives           initial values    Adam's rate
    input    nothing wider   anything        as the base's     as the base's
    hidden   wider axes      wider axes      r_in^-1/2         r_in^-1
    output   wider axes      nothing wider   r_in^-1           r_in^-1

Tables of rows, biases and norms are inputs. What tables 8 and 9 do by multipliers of the forward
pass is here done by initial values and rates too, since W times c is trained as W is where its
initial values and Adam's rate are divided by c: attention's 1 / head_dim in the queries, and the
output multiplier that a tied head needs in the norm before it. So the model stays the published
one, and whoever loads a checkpoint need know nothing of this.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.blocks import BlockConfig, Round
from t5x_lite.nn.config import ModelConfig, StackConfig
from t5x_lite.nn.heads import ExtendedMaskedLMHead, LMHead, MaskedLMHead
from t5x_lite.nn.layers import Identity, NormConfig, OffsetRMSNorm
from t5x_lite.nn.residual import PostNorm
from t5x_lite.types import Params, PyTree

# Axes that aren't widths, whatever their size: they differ freely between a model and its base.
FINITE = frozenset(
    {"layers", "vocab", "positions", "token_types", "buckets", "labels", "router", "expert", None}
)
_LAYER = re.compile(r"(?<![^/])layers_(\d+)(?![^/])")


@dataclasses.dataclass(frozen=True)
class Scale:
    """One parameter beside the base's: factors, each a number or, of stacked layers, an array [L].

    Attributes:
        kind: "input", "hidden" or "output".
        drawn: of the values that the model's own initialiser draws.
        shift: added to them after that.
        spread: the initial values' standard deviation, beside the base's.
        rate: of Adam's learning rate.
        entries: how many entries there are.
    """

    kind: str
    drawn: Any = 1.0
    shift: Any = 0.0
    spread: Any = 1.0
    rate: Any = 1.0
    entries: float = 1.0

    @property
    def gradient(self) -> Any:
        """Of a gradient's entries, which makes them as large as the base's.

        What a step of Adam gains, entries · (a gradient's entry) · rate, is alike at every width.
        """
        return self.entries * self.rate

    def layer(self, number: int) -> "Scale":
        """That of one layer."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        stacked = {n: float(v[number]) for n, v in fields.items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **stacked)

    def started(self, x: Array) -> Array:
        """The initial value, of what the model's own initialiser drew."""
        return self._shifted(times(x, self.drawn), 1)

    def unscaled(self, x: Array) -> Array:
        """A parameter as large as the base's."""
        return times(self._shifted(x, -1), 1 / self.spread)

    def _shifted(self, x: Array, sign: int) -> Array:
        return x + _along(x, sign * self.shift) if np.any(self.shift) else x


def is_scale(node: Any) -> bool:
    """True of a leaf of `scales`."""
    return isinstance(node, Scale)


def times(x: Array, factor: Any) -> Array:
    """`x` times a number, or times a number a layer; the same program where they are all 1."""
    if np.all(np.float32(factor) == 1):
        return x
    return x * _along(x, factor)


def _along(x: Array, values: Any) -> Array:
    values = np.asarray(values, np.float32)
    return jnp.asarray(values.reshape(*values.shape, *[1] * (x.ndim - values.ndim)))


def initial(params: Params, scales: PyTree) -> Params:
    """Parameters as muP begins with them, of those that the model's own initialiser drew."""
    return jax.tree.map(lambda scale, x: scale.started(x), scales, params, is_leaf=is_scale)


def scales(model: ModelConfig, base: ModelConfig, unrolled: bool | None = None) -> PyTree:
    """Every parameter's `Scale`, a tree like the parameters'.

    Args:
        model: the model to train.
        base: the same family at the width that hyperparameters were tuned at. Only widths are read:
            its depth, vocabulary, dtype and the like are taken to be the model's.
        unrolled: a tree of single layers; None: as the model says.

    Raises:
        UserError: the base isn't of the model's family, or the model's output has no norm.
    """
    own = parameters.declared(parameters.scanned(model))
    base = like(base, model)
    theirs = parameters.declared(base)
    _require_same(own, theirs)
    gains = _gains(model, base, own, theirs)
    norms = _offset_norms(model)
    found = {}
    for path, box in own.items():
        scale = _scale(box, theirs[path])
        gain = gains.get(path, 1.0)
        offset = gain - 1.0 if path in norms else 0.0
        found[path] = dataclasses.replace(
            scale, drawn=scale.drawn * gain, shift=offset, spread=scale.spread * gain,
            rate=scale.rate * gain,
        )  # fmt: skip
    unrolled = not model.scan if unrolled is None else unrolled
    tree = parameters.abstract(dataclasses.replace(model, scan=not unrolled))[0]
    return jax.tree_util.tree_map_with_path(lambda path, _: _at(found, path), tree)


def _at(found: dict[str, Scale], path: tuple) -> Scale:
    """That of a path, or of a layer of a stacked one."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in found:
        return found[name]
    layer = _LAYER.search(name)
    return found[_LAYER.sub("layers", name)].layer(int(layer[1]))


def _scale(box, theirs) -> Scale:
    """What table 3 says of a parameter."""
    ratios = {
        name: size / base
        for name, size, base in zip(box.names, box.value.shape, theirs.value.shape, strict=True)
        if name not in FINITE
    }
    r_in = math.prod((ratios.get(name, 1.0) for name in box.summed), start=1.0)
    entries = math.prod(ratios.values(), start=1.0)
    r_out = math.prod(ratio for name, ratio in ratios.items() if name not in box.summed)
    kind = "input" if r_in == 1 else "output" if r_out == 1 else "hidden"
    spread = {"input": 1.0, "hidden": r_in**-0.5, "output": 1 / r_in}[kind]
    known = 1.0 if box.stddev is None else box.stddev / theirs.stddev
    return Scale(kind, drawn=spread / known, spread=spread, rate=1 / r_in, entries=entries)


def like(base: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The model at the base's widths."""
    if base.kind != model.kind:
        raise UserError(
            f"MUP_BASE is {base.kind} and the model {model.kind}; give one of its family."
        )
    stacks = {
        name: dataclasses.replace(getattr(base, name), layers=getattr(model, name).layers)
        for name in ("encoder", "decoder")
        if getattr(model, name) is not None
    }
    # A task may have given the model another head than its family's.
    head = base.head if type(base.head) is type(model.head) else model.head
    return dataclasses.replace(
        base, **stacks, head=head, vocab_size=model.vocab_size,
        vocab_multiple=model.vocab_multiple, scan=True,
    )  # fmt: skip


def _require_same(own: dict, theirs: dict) -> None:
    for path in [*own, *theirs]:
        sides = [side[path].names if path in side else None for side in (own, theirs)]
        if sides[0] != sides[1]:
            has = [", ".join(filter(None, names)) if names else "none" for names in sides]
            raise UserError(
                f"MUP_BASE is of another family than the model: {path} has axes {has[1]} there and "
                f"{has[0]} here; give the model's own family at another width."
            )


# --- multipliers of the forward pass, and what holds them -----------------------------------------


def _gains(model: ModelConfig, base: ModelConfig, own: dict, theirs: dict) -> dict[str, Any]:
    """path → what its initial values and its rate are multiplied by besides.

    Multipliers that the model has already, and that change with its width, are taken back.
    """
    gains: dict[str, Any] = {}
    for name, config, its in _embedders(model, base):
        gains[f"{name}/embedding"] = 1 / _ratio(config, its)
    for path, attention, its in _attentions(model, base):
        r_head = _head_dim(attention) / _head_dim(its)
        gain = 1 / r_head / (attention.logit_scale / its.logit_scale)
        normed = _real(getattr(attention, "qk_norm", None))
        names = ("scale", "bias") if normed else ("kernel", "bias")
        gains |= {f"{path}/query{'_norm' * normed}/{name}": gain for name in names}
    head, its = model.head, base.head
    if isinstance(head, LMHead) and not head.tied:
        gains["head/kernel"] = 1 / _ratio(head, its)
    elif isinstance(head, LMHead | MaskedLMHead):
        gains |= _tied(model, base, own, theirs)
    return gains


def _tied(model: ModelConfig, base: ModelConfig, own: dict, theirs: dict) -> dict[str, Any]:
    """The output multiplier of a tied head, in the norm before it: table 8, 1 / r_in."""
    table = "embedder/embedding"
    r_in = own[table].value.shape[-1] / theirs[table].value.shape[-1]
    if isinstance(model.head, ExtendedMaskedLMHead):
        r_in = model.width / base.width
    scales = _ratio(model.embedder, base.embedder) / _ratio(model.head, base.head)
    gain = scales / r_in
    if gain == 1:
        return {}
    path, last = _last_norm(model)
    factors = gain
    if last is not None:
        factors = np.ones(own[f"{path}/scale"].value.shape[0])
        factors[last] = gain
    gains = {f"{path}/{name}": factors for name in ("scale", "bias")}
    if isinstance(model.head, ExtendedMaskedLMHead):
        gains["head/kernel"] = 1 / gain
    return gains


def _last_norm(model: ModelConfig) -> tuple[str, int | None]:
    """The norm whose output the unembedding reads; a layer's number where layers are stacked."""
    stack, name = model.main, "decoder" if model.decoder is not None else "encoder"
    if isinstance(model.head, MaskedLMHead):
        if _real(model.head.norm):
            return "head/norm", None
    elif _real(stack.final_norm):
        return f"{name}/final_norm", None
    elif stack.final_norm is None:
        *_, (path, block) = _blocks(name, stack)
        section = stack.sections[-1]
        residual = block.ffn_residual or block.residual if isinstance(block, BlockConfig) else None
        single = section.stacked or section.repeats == 1  # not one that all layers share
        if single and isinstance(residual, PostNorm) and _real(residual.norm):
            return f"{path}/ffn_norm", section.repeats - 1 if section.stacked else None
    raise UserError(
        "muP of a tied head scales the norm before it, and this model has none of its own there; "
        "give the model a final_norm, or a head with tied=False."
    )


def _offset_norms(model: ModelConfig) -> set[str]:
    """Paths of scales that 1 is added to, of those that may have a gain."""
    norms: dict[str, NormConfig | None] = {}
    for path, attention, _ in _attentions(model, model):
        norms[f"{path}/query_norm/scale"] = getattr(attention, "qk_norm", None)
    for name in ("encoder", "decoder"):
        stack = getattr(model, name)
        if stack is not None:
            norms[f"{name}/final_norm/scale"] = stack.final_norm
            for path, block in _blocks(name, stack):
                if isinstance(block, BlockConfig):
                    norms[f"{path}/ffn_norm/scale"] = (block.ffn_residual or block.residual).norm
    norms["head/norm/scale"] = getattr(model.head, "norm", None)
    return {path for path, norm in norms.items() if isinstance(norm, OffsetRMSNorm)}


def _real(norm: NormConfig | None) -> bool:
    return norm is not None and not isinstance(norm, Identity)


def _ratio(config: Any, base: Any) -> float:
    """Of the scales of two heads or embedders; those that have none multiply by 1."""
    return getattr(config, "scale", 1.0) / getattr(base, "scale", 1.0)


def _head_dim(attention) -> int:
    """Of what query and key are multiplied along."""
    return getattr(attention, "content_dim", 0) + attention.head_dim


def _embedders(model: ModelConfig, base: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    yield "embedder", model.embedder, base.embedder
    for name in ("encoder", "decoder"):
        stack, its = getattr(model, name), getattr(base, name)
        if stack is not None and stack.embedder is not None:
            yield f"{name}_embedder", stack.embedder, its.embedder


def _blocks(name: str, stack: StackConfig) -> Iterator[tuple[str, Any]]:
    """Path and config of every block that has parameters of its own."""
    for section in stack.sections:
        if isinstance(section.block, Round):
            for number, block in enumerate(section.blocks):
                yield f"{name}/{section.name}/block_{number}", block
        else:
            yield f"{name}/{section.name}", section.block


def _attentions(model: ModelConfig, base: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Path, config and the base's config of every attention."""
    for name in ("encoder", "decoder"):
        stack, its = getattr(model, name), getattr(base, name)
        if stack is None:
            continue
        pairs = zip(_blocks(name, stack), _blocks(name, its), strict=True)
        for (path, block), (_, same) in pairs:
            for kind in ("attention", "cross_attention"):
                attention = getattr(block, kind)
                if attention is not None:
                    yield f"{path}/{kind}", attention, getattr(same, kind)
