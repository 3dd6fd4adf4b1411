"""Shapes of models by size: how deep and wide a model of each family is, by one rule.

Loss depends on the number of parameters, and hardly on their shape within a factor of a few
(Kaplan et al. 2020, §3.1, fig. 5), so a sweep fixes the ratio of width to depth.
"""

import dataclasses
import math
from typing import Any

from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """The shapes of a family.

    Attributes:
      aspect: width over layers (of each stack); Kaplan's models had 16 to 128 without harm.
      head_dim: width of a head; widths are its multiples.
      hidden: of the feed-forward layer, over the width.
      least_layers: of the smallest.
      stacks: 1, or 2 for an encoder and a decoder with attention to it.
    """

    aspect: float | int = 64.0
    head_dim: int = 64
    hidden: float | int = 8 / 3
    least_layers: int = 1
    stacks: int = 1


# The gated layers of 8/3 have as many parameters as plain ones of 4 (Shazeer 2020, §3). The first
# layer of an encoder of ModernBERT's form looks everywhere: from the second on they look nearby.
RULES = {
    "decoder-only": Rule(),
    "encoder-only": Rule(least_layers=2),
    "encoder-decoder": Rule(stacks=2),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model's; `values` are macros of `gin_configs/sweeps/shapes/`."""

    width: int
    layers: int
    heads: int
    hidden: int
    estimate: float  # of the parameters that a token meets, the output's table among them

    @property
    def values(self) -> dict[str, Any]:
        """WIDTH, LAYERS, HEADS, HIDDEN."""
        names = ("width", "layers", "heads", "hidden")
        return {name.upper(): getattr(self, name) for name in names}


def ladder(
    rule: Rule, low: float, high: float, vocab_size: int, ratio: float = 1.12
) -> list[Shape]:
    """Shapes of rising size from about `low` to about `high` parameters.

    Args:
      rule: of the family.
      low: the smallest size wanted; half of it is included.
      high: the largest; twice is included.
      vocab_size: ids.
      ratio: between neighbours' sizes at least; of several shapes that are nearer, the one whose
        aspect is nearest the rule's stays.

    Raises:
      UserError: no shape is that small.
    """
    found = []
    width = rule.head_dim
    while True:
        shapes = [_shape(rule, width, layers, vocab_size) for layers in _layers(rule, width)]
        if min(shape.estimate for shape in shapes) > 2 * high:
            break
        found += [shape for shape in shapes if low / 2 <= shape.estimate <= 2 * high]
        width += rule.head_dim * max(1, width // (16 * rule.head_dim))
    if not found:
        least = _shape(rule, rule.head_dim, rule.least_layers, vocab_size).estimate
        raise UserError(
            f"no shape with heads of {rule.head_dim} has {low:.3g} to {high:.3g} parameters (the "
            f"smallest has {least:.3g}); lower --head_dim or VOCAB_SIZE, or raise the budgets."
        )
    return _thinned(found, rule, ratio)


def _layers(rule: Rule, width: int) -> range:
    """Depths within a factor of 1.6 of the rule's, or the fewest layers."""
    middle, least = width / rule.aspect, rule.least_layers
    return range(max(least, math.ceil(middle / 1.6)), max(least, math.floor(middle * 1.6)) + 1)


def _shape(rule: Rule, width: int, layers: int, vocab_size: int) -> Shape:
    step = 8 if width < 512 else 64
    hidden = max(step, round(rule.hidden * width / step) * step)
    ffn = 3 * width * hidden
    attention = 4 * width**2
    blocks = layers * (rule.stacks * (attention + ffn) + (rule.stacks - 1) * attention)
    # A token of an encoder-decoder passes one of the stacks.
    estimate = blocks / rule.stacks + width * vocab_size / rule.stacks
    return Shape(width, layers, width // rule.head_dim, hidden, float(estimate))


def _thinned(shapes: list[Shape], rule: Rule, ratio: float) -> list[Shape]:
    kept: list[Shape] = []
    for shape in sorted(shapes, key=lambda s: s.estimate):
        if not kept or shape.estimate >= kept[-1].estimate * ratio:
            kept.append(shape)
        elif _off(shape, rule) < _off(kept[-1], rule):
            kept[-1] = shape
    return kept


def _off(shape: Shape, rule: Rule) -> float:
    return abs(math.log(shape.width / shape.layers / rule.aspect))
