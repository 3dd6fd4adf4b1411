"""Rotary positions as config.json writes them, in versions 4 and 5 of `transformers`."""

from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.hub.fields import Fields
from t5x_lite.nn.positions import Llama3Rotary, Rotary

RotaryConfig = Rotary | Llama3Rotary


def read_rotary(fields: Fields, theta: float) -> RotaryConfig:
    """The rotary positions of a config.json; `theta` where it says none.

    Raises:
        UserError: a scaling that isn't known.
    """
    theta = fields.take("rope_theta", theta)
    scaling = fields.take("rope_scaling", {})
    values = fields.take("rope_parameters", {}) or scaling
    return rotary_of(dict(values), theta)


def rotary_of(values: dict[str, Any], theta: float) -> RotaryConfig:
    """The rotary positions that one set of parameters describes.

    Raises:
        UserError: a scaling that isn't known.
    """
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    theta = values.pop("rope_theta", theta)
    if kind == "default" and not values:
        return Rotary(theta)
    if kind == "llama3":
        return Llama3Rotary(
            theta,
            factor=values.pop("factor"),
            low_factor=values.pop("low_freq_factor"),
            high_factor=values.pop("high_freq_factor"),
            original_length=values.pop("original_max_position_embeddings"),
        )
    raise UserError(
        f"config.json scales rotary positions by {kind!r} with {values}, which t5x_lite doesn't "
        "know here."
    )


def write_rotary(positions: RotaryConfig) -> dict[str, Any]:
    """The field of config.json, as version 5 has it."""
    values = {"rope_type": "default", "rope_theta": positions.theta}
    if isinstance(positions, Llama3Rotary):
        values |= {
            "rope_type": "llama3",
            "factor": positions.factor,
            "low_freq_factor": positions.low_factor,
            "high_freq_factor": positions.high_factor,
            "original_max_position_embeddings": positions.original_length,
        }
    return {"rope_parameters": values}
