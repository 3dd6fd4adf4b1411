"""One file a family: how its config.json is read and written, and its key map."""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rules import Rule
from t5x_lite.nn.config import ModelConfig

# model_type of a config.json → the file here that knows it.
FILES: Mapping[str, str] = {
    "bert": "bert",
    "gpt2": "gpt2",
    "llama": "llama",
    "t5": "t5",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the bridge knows of one model_type.

    Attributes:
        read: a model from config.json; reads every field that it handles.
        write: the fields of a model, with `model_type` and `architectures`; raises `UserError`
            where the family has no such model.
        rules: the key map of a model.
        ignored_fields: of config.json, each with the reason.
        ignored_tensors: regular expressions of tensors that hold nothing, each with the reason.
        tied: names of tensors that repeat another one, which some checkpoints store as well.
        old_names: endings of tensors' names in older checkpoints, by today's.
        base_prefix: what the names of tensors begin with except in a checkpoint of the bare model.
    """

    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Sequence[Rule]]
    ignored_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored_tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    old_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base_prefix: str = ""


@functools.cache
def family_of(model_type: str) -> Family:
    """The family of a model_type.

    Raises:
        UserError: none here knows it.
    """
    if model_type not in FILES:
        raise UserError(f"model_type {model_type!r} is unknown; there are {', '.join(FILES)}.")
    module = importlib.import_module(f"t5x_lite.hub.families.{FILES[model_type]}")
    return module.FAMILIES[model_type]


def read_config(config: Mapping[str, Any], tensors: Collection[str] | None = None) -> ModelConfig:
    """The model that a config.json describes; `tensors` are the names of those beside it, if known.

    Raises:
        UserError: an unknown model_type, or a field that changes the model in an unknown way.
    """
    family = family_of(str(config.get("model_type")))
    fields = Fields(config, family.ignored_fields, tensors)
    model = family.read(fields)
    fields.finish()
    return model


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model: of the first family that reads it back as the same model.

    Raises:
        UserError: no family has such a model.
    """
    plain = dataclasses.replace(model, dtype="float32", scan=True, remat="none", vocab_multiple=128)
    for model_type in FILES:
        try:
            config = json.loads(json.dumps(family_of(model_type).write(plain)))
            if without_training(read_config(config)) == without_training(plain):
                return config
        except (UserError, AttributeError, TypeError, KeyError, IndexError):
            continue
    raise UserError(
        f"no family of {', '.join(FILES)} has such a model; only models that its presets make can "
        "be exported."
    )


def without_training(config: Any) -> Any:
    """A config without what acts on training alone: dropout and initial values."""
    if not dataclasses.is_dataclass(config):
        return tuple(map(without_training, config)) if isinstance(config, tuple) else config
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.endswith("dropout"):
            changes[field.name] = 0.0
        elif field.name == "standard_deviation":
            changes[field.name] = 1.0
        elif field.name == "init":
            changes[field.name] = field.default_factory()
        else:
            changes[field.name] = without_training(value)
    return dataclasses.replace(config, **changes)
