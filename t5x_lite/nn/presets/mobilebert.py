"""MobileBERT, uncased (Sun et al. 2020)."""

import dataclasses
from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.bottleneck import BottleneckConfig
from t5x_lite.nn.config import ModelConfig, StackConfig
from t5x_lite.nn.embedders import TrigramEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import ExtendedMaskedLMHead, Pooler
from t5x_lite.nn.layers import LayerNorm, NoNorm, Normal
from t5x_lite.nn.positions import LearnedPositions
from t5x_lite.nn.presets import head_dim, published
from t5x_lite.nn.residual import PostNorm


def _size(width, layers, heads, hidden, embedding, bottleneck, vocab_size=30_522):
    return {
        "width": width, "layers": layers, "heads": heads, "hidden": hidden,
        "vocab_size": vocab_size, "embedding": embedding, "bottleneck": bottleneck, "ffns": 4,
        "positions": 512, "types": 2, "epsilon": 1e-12, "activation": "relu",
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 128, 32, 32, 4096),
    "base": _size(512, 24, 4, 512, 128, 128),
}


def mobilebert(
    size: str = "base",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """MobileBERT with its masked-language-model head."""
    row = published(SIZES, "mobilebert", size, **shape)
    heads, bottleneck = row["heads"], row["bottleneck"]
    attention = AttentionConfig(
        heads, head_dim(bottleneck, heads), bias=True, out_bias=True, dropout=dropout
    )
    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=row["width"],
        embedder=TrigramEmbedder(row["embedding"], types=row["types"]),
        head=ExtendedMaskedLMHead(row["activation"], LayerNorm(row["epsilon"])),
        encoder=StackConfig(
            layers=row["layers"],
            block=BottleneckConfig(
                attention,
                MLPConfig(row["hidden"], row["activation"], bias=True),
                width=bottleneck,
                norm=NoNorm(),
                inner=PostNorm(NoNorm()),
                residual=PostNorm(NoNorm(), dropout),
                ffns=row["ffns"],
            ),
            causal=False,
            positions=LearnedPositions(row["positions"]),
            input_norm=NoNorm(),
            input_dropout=dropout,
        ),
        init=Normal(0.02),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def mobilebert_encoder(size: str = "base", pooler: str | None = None, **overrides) -> ModelConfig:
    """MobileBERT without a language-model head; as published, its pooler is the first token."""
    return dataclasses.replace(mobilebert(size, **overrides), head=Pooler(pooler))
