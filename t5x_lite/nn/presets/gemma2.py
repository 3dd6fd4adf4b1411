"""Gemma 2 (Gemma Team 2024)."""

from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.blocks import BlockConfig, Pattern
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.layers import OffsetRMSNorm
from t5x_lite.nn.positions import Rotary
from t5x_lite.nn.presets import decoder_only, published
from t5x_lite.nn.residual import SandwichNorm


def _size(width, layers, heads, kv_heads, head_dim, hidden, scalar=256, window=4096, **others):
    return {
        "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "hidden": hidden, "vocab_size": 256_000, "positions": Rotary(),
        "query_scalar": scalar, "window": window, "logit_caps": (50.0, 30.0), "epsilon": 1e-6,
        **others,
    }  # fmt: skip


# Queries are scaled by query_scalar^-0.5: the head's dimension, but at 27B width / heads.
SIZES = {
    "tiny": _size(128, 2, 4, 2, 32, 512, 32, window=64, vocab_size=4096),
    "2b": _size(2304, 26, 8, 4, 256, 9216),
    "9b": _size(3584, 42, 16, 8, 256, 14_336),
    "27b": _size(4608, 46, 32, 16, 128, 36_864, 144),
}


def gemma2(
    size: str = "2b",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """Every other layer looks at a window, from the first on; norms around each sublayer.

    `logit_caps` are those of attention and of the vocabulary, each None for no cap.
    """
    row = published(SIZES, "gemma2", size, **shape)
    norm, (attention_cap, head_cap) = OffsetRMSNorm(row["epsilon"]), row["logit_caps"]
    mlp = MLPConfig(row["hidden"], "gelu_tanh", gated=True)

    def block(window: int | None) -> BlockConfig:
        attention = AttentionConfig(
            row["heads"], row["head_dim"], row["kv_heads"], scale=row["query_scalar"] ** -0.5,
            dropout=dropout, window=window, soft_cap=attention_cap,
        )  # fmt: skip
        return BlockConfig(attention, mlp, SandwichNorm(norm, dropout))

    return decoder_only(
        row, Pattern((block(row["window"]), block(None))), norm,
        head=LMHead(tied=True, soft_cap=head_cap),
        embedder=TokenEmbedder(scale=row["width"] ** 0.5),
        dtype=dtype, scan=scan, remat=remat,
    )  # fmt: skip
