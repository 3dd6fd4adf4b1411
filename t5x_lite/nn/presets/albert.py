"""ALBERT, version 2 (Lan et al. 2020): one layer's parameters for all, and narrow embeddings."""

import dataclasses
from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig, Shared, StackConfig
from t5x_lite.nn.embedders import InputProjection, TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import MaskedLMHead, Pooler
from t5x_lite.nn.layers import LayerNorm, Normal
from t5x_lite.nn.positions import LearnedPositions
from t5x_lite.nn.presets import head_dim, published
from t5x_lite.nn.presets.paired import paired
from t5x_lite.nn.residual import PostNorm


def _size(width, layers, heads, embedding=128, vocab_size=30_000):
    return {
        "width": width, "layers": layers, "heads": heads, "vocab_size": vocab_size,
        "hidden": None, "embedding": embedding, "positions": 512, "types": 2, "epsilon": 1e-12,
        "activation": "gelu_tanh",
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 32, 4096),
    "base": _size(768, 12, 12),
    "large": _size(1024, 24, 16),
    "xlarge": _size(2048, 24, 16),
    "xxlarge": _size(4096, 12, 64),
}


def albert(
    size: str = "base",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """ALBERT with its masked-language-model head; version 2 was trained without dropout."""
    row = published(SIZES, "albert", size, **shape)
    width, heads, norm = row["width"], row["heads"], LayerNorm(row["epsilon"])
    attention = AttentionConfig(
        heads, head_dim(width, heads), bias=True, out_bias=True, dropout=dropout
    )
    mlp = MLPConfig(row["hidden"] or 4 * width, row["activation"], bias=True)
    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=width,
        embedder=TokenEmbedder(types=row["types"], width=row["embedding"]),
        head=MaskedLMHead(row["activation"], norm),
        encoder=StackConfig(
            layers=row["layers"],
            block=Shared(BlockConfig(attention, mlp, PostNorm(norm, dropout))),
            causal=False,
            positions=LearnedPositions(row["positions"]),
            input_norm=norm,
            input_dropout=dropout,
            input_projection=InputProjection(),
        ),
        init=Normal(0.02),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def albert_encoder(size: str = "base", **overrides) -> ModelConfig:
    """ALBERT with its pooler and without a language-model head, for fine-tuning."""
    return dataclasses.replace(albert(size, **overrides), head=Pooler())


def albert_pretraining(size: str = "base", **overrides) -> ModelConfig:
    """ALBERT with the sentence-order head too that it was pre-trained with."""
    return paired(albert(size, **overrides))
