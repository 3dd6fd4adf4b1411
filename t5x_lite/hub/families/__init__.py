"""One file a family: how its config.json is read and written, and its key map."""

import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.heads import Head, find_head, label_fields
from t5x_lite.hub.rules import Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import HeadConfig, Pooler, SentenceEmbedding

# model_type of a config.json → the file here that knows it.
FILES: Mapping[str, str] = {
    "albert": "albert",
    "distilbert": "distilbert",  # before bert, whose config.json could say it too: no token types
    "bart": "bart",
    "bert": "bert",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "gpt2": "gpt2",
    "llama": "llama",
    "mixtral": "mixtral",
    "phi3": "phi3",
    "qwen3": "qwen3",
    "mobilebert": "mobilebert",
    "modernbert": "modernbert",
    "roberta": "roberta",
    "marian": "marian",
    "t5": "t5",
    "mt5": "t5",  # after t5, whose models its models are too
    "umt5": "t5",
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
        ignored_tensors: regular expressions of tensors that are left out, each with the reason:
            they are computed, or export does without them; or a function that gives them for a
            model.
        unread_tensors: regular expressions of trained tensors that some head doesn't read, each
            with the reason; they are kept as published, and exported again. With `base_prefix`.
        tied: names of tensors that repeat another one, which some checkpoints store as well.
        old_names: endings of tensors' names in older checkpoints, by today's.
        base_prefix: what the names of tensors begin with except in a checkpoint of the bare model.
        heads: classes whose heads predict no words, which are read, written and mapped here.
        base_head: any head that `write` knows, in place of one of those.
    """

    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Sequence[Rule]]
    ignored_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored_tensors: Mapping[str, str] | Callable[[ModelConfig], Mapping[str, str]] = (
        dataclasses.field(default_factory=dict)
    )
    unread_tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    old_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base_prefix: str = ""
    heads: Mapping[str, Head] = dataclasses.field(default_factory=dict)
    base_head: HeadConfig = dataclasses.field(default_factory=Pooler)

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """The fields of a model, whatever its head."""
        architecture = find_head(self.heads, model.head)
        if architecture is None:
            return self.write(model)
        fields = self.write(dataclasses.replace(model, head=self.base_head))
        return {**fields, "architectures": [architecture], **label_fields(model.head)}

    def key_map(self, model: ModelConfig) -> list[Rule]:
        """Every rule of a model, whatever its head."""
        architecture, rules = find_head(self.heads, model.head), self.rules(model)
        if architecture is None:
            return list(rules)
        body = [rule for rule in rules if not rule.paths[0].startswith("head/")]
        return [*body, *self.heads[architecture].rules()]


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
    head = family.heads.get(fields.architecture)
    if head is None:
        model = family.read(fields)
    else:
        # The family reads the body; it has no need to know the class.
        fields = Fields({**config, "architectures": None}, family.ignored_fields, tensors)
        model = dataclasses.replace(family.read(fields), head=head.read(fields))
    fields.finish()
    return model


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model: of the first family that reads it back as the same model.

    Raises:
        UserError: no family has such a model.
    """
    plain = dataclasses.replace(model, dtype="float32", scan=True, remat="none", vocab_multiple=128)
    embeds = isinstance(model.head, SentenceEmbedding)  # written beside, by hub/sentence.py
    for model_type in FILES:
        try:
            family = family_of(model_type)
            if embeds:
                plain = dataclasses.replace(plain, head=family.base_head)
            config = json.loads(json.dumps(family.config(plain)))
            if without_training(read_config(config)) == without_training(plain):
                return _of_the_bare_model(config) if embeds else config
        except (UserError, AttributeError, TypeError, LookupError, StopIteration):
            continue
    raise UserError(
        f"no family of {', '.join(FILES)} has such a model; only models that its presets make can "
        "be exported."
    )


def _of_the_bare_model(config: dict[str, Any]) -> dict[str, Any]:
    """Names the class without a head, in place of one that would miss it."""
    names = [re.sub("(ForCausalLM|LMHeadModel)$", "Model", n) for n in config["architectures"]]
    return {**config, "architectures": names}


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
