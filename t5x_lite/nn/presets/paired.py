"""An encoder with the head of BERT's and ALBERT's pre-training."""

import dataclasses

from t5x_lite.errors import UserError
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import MaskedLMHead, PairedLMHead


def paired(model: ModelConfig, dropout: float | int = 0.0) -> ModelConfig:
    """With how two texts belong besides the masked words; its other parameters stay the same.

    Raises:
        UserError: the model's head isn't BERT's.
    """
    if type(model.head) not in (MaskedLMHead, PairedLMHead) or model.kind != "encoder-only":
        raise UserError(
            f"this {model.kind} model's head is {type(model.head).__name__}; pairs of texts are "
            f"learnt beside a MaskedLMHead, such as those of bert, albert and roberta."
        )
    words = {f.name: getattr(model.head, f.name) for f in dataclasses.fields(MaskedLMHead)}
    return dataclasses.replace(model, head=PairedLMHead(**words, dropout=dropout))
