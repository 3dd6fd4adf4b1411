"""RoBERTa (Liu et al. 2019): BERT's form, with other words, one token type and other positions."""

import dataclasses

from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import Pooler
from t5x_lite.nn.positions import LearnedPositions
from t5x_lite.nn.presets import published
from t5x_lite.nn.presets.bert import bert


def _size(width, layers, heads, vocab_size=50_265):
    # Positions count from the padding token's number, 1, plus 1: rows 0 and 1 are never read.
    return {
        "width": width, "layers": layers, "heads": heads, "vocab_size": vocab_size,
        "hidden": None, "positions": 512, "types": 1, "epsilon": 1e-5, "offset": 2,
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 4096),
    "base": _size(768, 12, 12),
    "large": _size(1024, 24, 16),
}


def roberta(
    size: str = "base",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: float | int | None,
) -> ModelConfig:
    """RoBERTa with its masked-language-model head."""
    row = published(SIZES, "roberta", size, **shape)
    positions = LearnedPositions(row["positions"], offset=row.pop("offset"))
    model = bert("base", dropout, dtype, scan, remat, **row)
    encoder = dataclasses.replace(model.encoder, positions=positions)
    return dataclasses.replace(model, encoder=encoder)


def roberta_encoder(size: str = "base", **overrides) -> ModelConfig:
    """RoBERTa with its pooler and without a language-model head, for fine-tuning."""
    return dataclasses.replace(roberta(size, **overrides), head=Pooler())
