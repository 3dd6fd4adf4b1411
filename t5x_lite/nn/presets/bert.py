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
from t5x_lite.nn.presets.paired import paired
from t5x_lite.nn.residual import PostNorm


def _size(width, layers, heads, vocab_size=30_522):
    return {
        "width": width, "layers": layers, "heads": heads, "vocab_size": vocab_size,
        "hidden": None, "positions": 512, "types": 2, "epsilon": 1e-12,
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 4096),
    "base": _size(768, 12, 12),
    "large": _size(1024, 24, 16),
}


def bert(
    size: str = "base",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: float | int | None,
) -> ModelConfig:
    """BERT with its masked-language-model head."""
    row = published(SIZES, "bert", size, **shape)
    width, heads, norm = row["width"], row["heads"], LayerNorm(row["epsilon"])
    attention = AttentionConfig(
        heads, head_dim(width, heads), bias=True, out_bias=True, dropout=dropout
    )
    mlp = MLPConfig(row["hidden"] or 4 * width, "gelu", bias=True)
    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=width,
        embedder=TokenEmbedder(types=row["types"]),
        head=MaskedLMHead("gelu", norm),
        encoder=StackConfig(
            layers=row["layers"],
            block=BlockConfig(attention, mlp, PostNorm(norm, dropout)),
            causal=False,
            positions=LearnedPositions(row["positions"]),
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


def bert_pretraining(size: str = "base", **overrides) -> ModelConfig:
    """BERT with the next-sentence head too that it was pre-trained with."""
    return paired(bert(size, **overrides))
