"""The rule that moves routers' corrections: balance without an auxiliary loss.

A correction is added to an expert's score where experts are chosen. After each step it goes up by
the rate if its expert was picked less often than the mean, and down if more often (DeepSeek-AI
2024, DeepSeek-V3, §2.1.2: "bias update speed" γ). It counts the whole batch, whatever its parts.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from t5x_lite.errors import UserError
from t5x_lite.nn.blocks import Round, Section
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.loads import Loads
from t5x_lite.nn.moe import MoEConfig, SigmoidRouter
from t5x_lite.types import Params

Correct = Callable[[Params, Loads], Params]


@dataclasses.dataclass(frozen=True)
class _Place:
    """A correction among the parameters, and its layers among the loads of its stack."""

    path: tuple[str, ...]
    loads: str
    layers: tuple[int, ...]
    stacked: bool  # one a layer; else all its layers share it


def correction_rule(model: ModelConfig, rate: float | int = 1e-3) -> Correct | None:
    """`correct(params, loads)`: the parameters with each correction moved by `rate`, or none.

    None for a model whose routers have no corrections, and for a rate of 0.

    Raises:
        UserError: a negative rate; at the first call, a loss that reports no loads.
    """
    if rate < 0:
        raise UserError(f"correction_rate={rate} must not be negative; 0 leaves corrections alone.")
    places = [*_places(model)] if rate else []

    def correct(params: Params, loads: Loads) -> Params:
        for place in places:
            if place.loads not in loads:
                raise UserError(
                    "the loss reports no loads of experts, by which routers' corrections move: it "
                    "must return Sums(…, loads=loads.of(output.aux)); or set CORRECTION_RATE=0."
                )
            picks_LE = loads[place.loads][np.asarray(place.layers)]
            picks = picks_LE if place.stacked else jnp.sum(picks_LE, axis=0)
            move = rate * jnp.sign(jnp.mean(picks, axis=-1, keepdims=True) - picks)
            params = _added(params, place.path, move)
        return params

    return correct if places else None


def _added(tree: Mapping, path: tuple[str, ...], move: Array):
    name, *rest = path
    inner = _added(tree[name], tuple(rest), move) if rest else tree[name] + move
    return {**tree, name: inner}


def _places(model: ModelConfig) -> Iterator[_Place]:
    for name in ("encoder", "decoder"):
        stack = getattr(model, name)
        if stack is None:
            continue
        prefix = "encoder_" if name == "encoder" and model.decoder is not None else ""
        start = 0
        for section in stack.sections:
            routed = [n for n, block in enumerate(section.blocks) if _has_experts(block)]
            for order, n in enumerate(routed):
                numbers = range(start + order, start + len(routed) * section.repeats, len(routed))
                if isinstance(section.blocks[n].ffn.router, SigmoidRouter):
                    yield from _in_section(
                        section, n, name, f"{prefix}picks_LE", tuple(numbers), model.scan
                    )
            start += len(routed) * section.repeats


def _has_experts(block) -> bool:
    return isinstance(block.ffn, MoEConfig)


def _in_section(
    section: Section, n: int, stack: str, loads: str, layers: tuple[int, ...], scan: bool
) -> Iterator[_Place]:
    """The corrections of block `n` of a section's rounds."""
    inner = (f"block_{n}",) if isinstance(section.block, Round) else ()
    end = (*inner, "ffn", "router", "correction")
    if section.stacked and not scan:
        for number, layer in enumerate(layers):
            yield _Place((stack, f"{section.name}_{number}", *end), loads, (layer,), False)
    else:
        yield _Place((stack, section.name, *end), loads, layers, section.stacked)
