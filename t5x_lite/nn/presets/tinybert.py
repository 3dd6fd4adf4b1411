"""TinyBERT (Jiao et al. 2020): BERT's form at the two sizes that its authors distilled."""

import dataclasses

from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import Pooler
from t5x_lite.nn.presets import published
from t5x_lite.nn.presets.bert import bert


def _size(width, layers, heads, hidden, vocab_size=30_522):
    return {
        "width": width, "layers": layers, "heads": heads, "vocab_size": vocab_size,
        "hidden": hidden, "positions": 512, "types": 2, "epsilon": 1e-12,
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 512, 4096),
    "4-312": _size(312, 4, 12, 1200),
    "6-768": _size(768, 6, 12, 3072),
}


def tinybert(
    size: str = "4-312",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: float | int | None,
) -> ModelConfig:
    """TinyBERT with BERT's masked-language-model head; a size is its layers and its width."""
    row = published(SIZES, "tinybert", size, **shape)
    return bert("base", dropout, dtype, scan, remat, **row)


def tinybert_encoder(size: str = "4-312", **overrides) -> ModelConfig:
    """TinyBERT with its pooler and without a language-model head, for fine-tuning."""
    return dataclasses.replace(tinybert(size, **overrides), head=Pooler())
