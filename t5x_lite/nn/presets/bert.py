"""BERT, uncased (Devlin et al. 2019)."""

import dataclasses

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import MaskedLMHead, Pooler
from t5x_lite.nn.layers import LayerNorm, Normal
from t5x_lite.nn.positions import LearnedPositions
from t5x_lite.nn.presets import head_dim, published
from t5x_lite.nn.residual import PostNorm

SIZES = {
    "tiny": {"width": 128, "layers": 2, "heads": 4, "vocab_size": 4096},
    "base": {"width": 768, "layers": 12, "heads": 12, "vocab_size": 30_522},
    "large": {"width": 1024, "layers": 24, "heads": 16, "vocab_size": 30_522},
}


def bert(
    size: str = "base",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """BERT with its masked-language-model head."""
    row = published(SIZES, "bert", size, **shape)
    width, heads, norm = row["width"], row["heads"], LayerNorm(1e-12)
    attention = AttentionConfig(
        heads, head_dim(width, heads), bias=True, out_bias=True, dropout=dropout
    )
    mlp = MLPConfig(4 * width, "gelu", bias=True)
    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=width,
        embedder=TokenEmbedder(types=2),
        head=MaskedLMHead("gelu", norm),
        encoder=StackConfig(
            layers=row["layers"],
            block=BlockConfig(attention, mlp, PostNorm(norm, dropout)),
            causal=False,
            positions=LearnedPositions(512),
            input_norm=norm,
            input_dropout=dropout,
        ),
        init=Normal(0.02),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def bert_encoder(size: str = "base", **overrides) -> ModelConfig:
    """BERT with its pooler and without a language-model head, for fine-tuning."""
    return dataclasses.replace(bert(size, **overrides), head=Pooler())
