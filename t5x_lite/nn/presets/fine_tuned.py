"""A pre-trained model with the head of another task; its other parameters stay the same."""

import dataclasses

from t5x_lite.errors import UserError
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import Dense, QuestionAnswering, SequenceClassifier


def classifier(model: ModelConfig, labels: int, dropout: float | int = 0.1) -> ModelConfig:
    """With scores of labels for each row; one label is a number, for regression.

    An encoder's come from its first token by a dense layer with tanh (Devlin et al. 2019, §4.1), a
    decoder's from its last one by one product (Radford et al. 2018, §3.2).

    Raises:
        UserError: an encoder-decoder.
    """
    if model.kind == "encoder-decoder":
        raise UserError(
            "an encoder-decoder has no head for labels; let it write them (tasks/text_to_text.gin)."
        )
    head = SequenceClassifier(labels, dense=Dense("tanh"), dropout=dropout)
    if model.kind == "decoder-only":
        head = SequenceClassifier(labels, pooling="last", dropout=dropout, bias=False)
    return dataclasses.replace(model, head=head)


def answerer(model: ModelConfig) -> ModelConfig:
    """With scores of where an answer starts and ends (Devlin et al. 2019, §4.2)."""
    return dataclasses.replace(model, head=QuestionAnswering())
