"""The heads of `transformers` that don't predict words, the same for every family.

A family's file names its classes in a table, `Family.heads`:

    heads={"BertForSequenceClassification": Head(first_token("tanh"), {...}),
           "BertForTokenClassification": TOKENS}
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rules import Rule, linear_rules, norm_rules
from t5x_lite.nn.heads import (
    Dense,
    HeadConfig,
    QuestionAnswering,
    Reward,
    SequenceClassifier,
    TokenClassifier,
)


@dataclasses.dataclass(frozen=True)
class Head:
    """What a class puts on its family's body.

    Attributes:
        config: ours; how many labels it has is config.json's to say.
        tensors: a part of ours ("classifier", "pooler", "pooler_norm") → what the names of its
            tensors begin with.
    """

    config: HeadConfig
    tensors: Mapping[str, str]

    def read(self, fields: Fields) -> HeadConfig:
        """With config.json's labels."""
        labels = _labels(fields)
        if self.config == _LAST_TOKEN and labels == 1:
            return Reward()
        if isinstance(self.config, QuestionAnswering) and labels != 2:
            raise UserError(f"config.json has {labels} labels; an answer has a start and an end.")
        return _with_labels(self.config, labels)

    def rules(self) -> list[Rule]:
        """The key map; a part that the model lacks gives nothing."""
        return [
            rule
            for part, theirs in self.tensors.items()
            for rule in (norm_rules if part.endswith("norm") else linear_rules)(
                f"head/{part}", theirs
            )
        ]


def first_token(
    activation: str, dropout: float = 0.1, input_dropout: float = 0.0
) -> SequenceClassifier:
    """A dense layer on the first token, then the labels."""
    return SequenceClassifier(dense=Dense(activation, input_dropout=input_dropout), dropout=dropout)


_LAST_TOKEN = SequenceClassifier(pooling="last", bias=False)
SCORE = Head(_LAST_TOKEN, {"classifier": "score"})  # of every decoder; one label: a reward
TOKENS = Head(TokenClassifier(dropout=0.1), {"classifier": "classifier"})
ANSWERS = Head(QuestionAnswering(), {"classifier": "qa_outputs"})


def without_pairs(fields: Fields, tensor: str) -> bool:
    """Whether a checkpoint of a class for pre-training lacks the head for pairs of texts."""
    is_named = fields.architecture.endswith("ForPreTraining")
    return is_named and fields.tensors is not None and tensor not in fields.tensors


def find_head(heads: Mapping[str, Head], config: HeadConfig) -> str | None:
    """The class whose head this is, whatever its labels and dropout; None: a family's own head."""
    if isinstance(config, Reward):
        config = _LAST_TOKEN
    for name, head in heads.items():
        if _form(head.config) == _form(config):
            return name
    return None


def label_fields(config: HeadConfig) -> dict[str, Any]:
    """The labels of config.json, under the names that `transformers` gives where it knows none."""
    count = getattr(config, "labels", 1 if isinstance(config, Reward) else 2)
    names = [f"LABEL_{number}" for number in range(count)]
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _labels(fields: Fields) -> int:
    """How many; where neither field is there, `transformers` takes two."""
    count, names = fields.take("num_labels", None), fields.take("id2label", None)
    if None not in (count, names) and count != len(names):
        raise UserError(f"config.json has num_labels={count}, but {len(names)} of id2label.")
    return count or len(names or "01")


def _form(config: HeadConfig) -> HeadConfig:
    """Without what may differ among models of one class."""
    changes = {"dropout": 0.0} if hasattr(config, "dropout") else {}
    dense = getattr(config, "dense", None)
    if dense is not None:
        changes["dense"] = dataclasses.replace(dense, input_dropout=0.0)
    return _with_labels(dataclasses.replace(config, **changes), 2)


def _with_labels(config: HeadConfig, labels: int) -> HeadConfig:
    return dataclasses.replace(config, labels=labels) if hasattr(config, "labels") else config
