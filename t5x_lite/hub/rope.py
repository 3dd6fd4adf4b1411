"""Rotary positions as config.json writes them, in versions 4 and 5 of `transformers`."""

from collections.abc import Mapping
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.hub.fields import Fields
from t5x_lite.nn.positions import (
    LinearRotary,
    Llama3Rotary,
    LongRotary,
    Rotary,
    RotaryConfig,
    YarnRotary,
)

# Llama3Rotary's fields by their names in config.json.
LLAMA3 = {
    "factor": "factor",
    "low_factor": "low_freq_factor",
    "high_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
# YarnRotary's.
YARN = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "fast": "beta_fast",
    "slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
# And LongRotary's; "su" is what Phi-3's first config.json called it.
LONG_KINDS = ("longrope", "su")
LONG = {
    "short": "short_factor",
    "long": "long_factor",
    "original_length": "original_max_position_embeddings",
    "factor": "factor",
    "attention_factor": "attention_factor",
}


def read_rotary(
    fields: Fields, theta: float | int, stretched: tuple[int, int] | None = None
) -> RotaryConfig:
    """The rotary positions of a config.json; `theta` where it says none.

    Args:
        fields: of a config.json.
        theta: where there is none.
        stretched: the lengths before and after, where LongRoPE's stand beside its parameters.

    Raises:
        UserError: a scaling that isn't known.
    """
    theta = fields.take("rope_theta", theta)
    scaling = fields.take("rope_scaling", {})
    values = dict(fields.take("rope_parameters", {}) or scaling)
    if stretched and values.get("rope_type", values.get("type")) in LONG_KINDS:
        original, extended = stretched
        values["original_max_position_embeddings"] = original
        values.setdefault("factor", extended / original)
    return rotary_of(values, theta)


def read_layer_rotary(
    fields: Fields, thetas: Mapping[str, tuple[str, float | int]]
) -> dict[str, RotaryConfig]:
    """The rotary positions of each kind of layer that `layer_types` names.

    Args:
        fields: of a config.json.
        thetas: kind of layer → its theta's field in version 4, and its value where there is none.
            Version 4 scales `full_attention` alone.

    Raises:
        UserError: a kind of layer or a scaling that isn't known.
    """
    given, scaling = fields.take("rope_parameters", {}), fields.take("rope_scaling", {})
    if set(given) - set(thetas):
        raise UserError(
            f"config.json has rope_parameters of {', '.join(map(str, given))}; t5x_lite knows "
            f"those of {', '.join(thetas)}."
        )
    result = {}
    for kind, (name, theta) in thetas.items():
        values = dict(scaling if kind == "full_attention" else {}) | dict(given.get(kind) or {})
        result[kind] = rotary_of(values, fields.take(name, theta))
    return result


def rotary_of(values: dict[str, Any], theta: float | int) -> RotaryConfig:
    """The rotary positions that one set of parameters describes.

    Raises:
        UserError: a scaling that isn't known.
    """
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    theta = values.pop("rope_theta", theta)
    if values.get("partial_rotary_factor") == 1.0:
        del values["partial_rotary_factor"]
    if kind == "default" and not values:
        return Rotary(theta)
    if kind == "llama3" and set(values) == set(LLAMA3.values()):
        return Llama3Rotary(theta, **{ours: values[theirs] for ours, theirs in LLAMA3.items()})
    needed = {YARN[name] for name in ("factor", "original_length")}
    if kind == "yarn" and needed <= set(values) <= set(YARN.values()):
        given = {ours: values.get(theirs) for ours, theirs in YARN.items()}
        return YarnRotary(theta, **{n: value for n, value in given.items() if value is not None})
    if kind == "linear" and set(values) == {"factor"}:
        return LinearRotary(theta, **values)
    needed = set(LONG.values()) - {"attention_factor"}
    if kind in LONG_KINDS and needed <= set(values) <= set(LONG.values()):
        known = {ours: values[theirs] for ours, theirs in LONG.items() if theirs in values}
        known |= {name: tuple(known[name]) for name in ("short", "long")}
        return LongRotary(theta, **known)
    raise UserError(
        f"config.json scales rotary positions by {kind!r} with {values}, which t5x_lite doesn't "
        "know here."
    )


def write_rotary(positions: RotaryConfig) -> dict[str, Any]:
    """The field of config.json, as version 5 has it."""
    return {"rope_parameters": parameters_of(positions)}


def write_layer_rotary(kinds: Mapping[str, RotaryConfig]) -> dict[str, Any]:
    """The field of a model whose kinds of layers turn differently, by `layer_types`' names."""
    return {"rope_parameters": {kind: parameters_of(p) for kind, p in kinds.items()}}


def parameters_of(positions: RotaryConfig) -> dict[str, Any]:
    """One set of parameters; the inverse of `rotary_of`."""
    values = {"rope_type": "default", "rope_theta": positions.theta}
    if isinstance(positions, Llama3Rotary):
        values |= {"rope_type": "llama3"}
        values |= {theirs: getattr(positions, ours) for ours, theirs in LLAMA3.items()}
    if isinstance(positions, YarnRotary):
        known = {theirs: getattr(positions, ours) for ours, theirs in YARN.items()}
        values |= {"rope_type": "yarn"}
        values |= {name: value for name, value in known.items() if value is not None}
    if isinstance(positions, LinearRotary):
        values |= {"rope_type": "linear", "factor": positions.factor}
    if isinstance(positions, LongRotary):
        known = {theirs: getattr(positions, ours) for ours, theirs in LONG.items()}
        values |= {"rope_type": "longrope"}
        values |= {name: value for name, value in known.items() if value is not None}
    return values
