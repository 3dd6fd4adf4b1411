"""Qwen 3, the dense models (Yang et al. 2025)."""

from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.layers import RMSNorm
from t5x_lite.nn.positions import Rotary
from t5x_lite.nn.presets import decoder_only, published
from t5x_lite.nn.residual import PreNorm


def _size(width, layers, heads, kv_heads, hidden, head_dim=128, vocab_size=151_936, tied=False):
    return {
        "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "hidden": hidden, "vocab_size": vocab_size,
        "positions": Rotary(1_000_000.0), "epsilon": 1e-6, "tied": tied,
    }  # fmt: skip


# Heads have 128 dimensions whatever the width: those of 0.6B and 4B are wider than the model.
SIZES = {
    "tiny": _size(128, 2, 4, 2, 344, 32, 4096, tied=True),
    "0.6b": _size(1024, 28, 16, 8, 3072, tied=True),
    "1.7b": _size(2048, 28, 16, 8, 6144, tied=True),
    "4b": _size(2560, 36, 32, 8, 9728, tied=True),
    "8b": _size(4096, 36, 32, 8, 12_288),
    "14b": _size(5120, 40, 40, 8, 17_408),
    "32b": _size(5120, 64, 64, 8, 25_600),
}


def qwen3(
    size: str = "0.6b",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """Llama's layer with RMS norms of each head's query and key in place of Qwen 2's biases."""
    row = published(SIZES, "qwen3", size, **shape)
    norm = RMSNorm(row["epsilon"])
    attention = AttentionConfig(
        row["heads"], row["head_dim"], row["kv_heads"], dropout=dropout, qk_norm=norm
    )
    mlp = MLPConfig(row["hidden"], "silu", gated=True)
    block = BlockConfig(attention, mlp, PreNorm(norm, dropout))
    return decoder_only(row, block, norm, dtype=dtype, scan=scan, remat=remat)
