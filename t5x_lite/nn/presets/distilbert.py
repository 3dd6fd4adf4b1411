"""DistilBERT (Sanh et al. 2019): every other layer of BERT, without token types and pooler."""

import dataclasses

from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import NoHead
from t5x_lite.nn.presets import published
from t5x_lite.nn.presets.bert import bert


def _size(width, layers, heads, vocab_size=30_522):
    return {
        "width": width, "layers": layers, "heads": heads, "vocab_size": vocab_size,
        "hidden": None, "positions": 512,
    }  # fmt: skip


SIZES = {"tiny": _size(128, 2, 4, 4096), "base": _size(768, 6, 12)}


def distilbert(
    size: str = "base",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """DistilBERT with its masked-language-model head."""
    row = published(SIZES, "distilbert", size, **shape)
    return bert("base", dropout, dtype, scan, remat, types=0, epsilon=1e-12, **row)


def distilbert_encoder(size: str = "base", **overrides) -> ModelConfig:
    """DistilBERT without a head, for fine-tuning."""
    return dataclasses.replace(distilbert(size, **overrides), head=NoHead())
