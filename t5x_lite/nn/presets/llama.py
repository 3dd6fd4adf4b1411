"""Llama 2 (Touvron et al. 2023) and Llama 3 (Dubey et al. 2024)."""

from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.layers import RMSNorm
from t5x_lite.nn.positions import Llama3Rotary, Rotary
from t5x_lite.nn.presets import decoder_only, head_dim, published
from t5x_lite.nn.residual import PreNorm


def _size(width, layers, heads, kv_heads, hidden, vocab_size=32_000, **others):
    return {
        "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": None, "hidden": hidden, "vocab_size": vocab_size,
        "positions": Rotary(), "epsilon": 1e-5, "tied": False, **others,
    }  # fmt: skip


# Llama 3 turns slower and has more words; from 3.1 on, rotations are stretched for 128 k tokens.
_V3 = {"vocab_size": 128_256, "positions": Rotary(500_000.0)}
_V3_1 = {"vocab_size": 128_256, "positions": Llama3Rotary(500_000.0, factor=8.0)}
_V3_2 = {"vocab_size": 128_256, "positions": Llama3Rotary(500_000.0, factor=32.0), "tied": True}
SIZES = {
    "tiny": _size(256, 4, 8, 4, 688, 4096),
    "7b": _size(4096, 32, 32, 32, 11_008),
    "13b": _size(5120, 40, 40, 40, 13_824),
    "70b": _size(8192, 80, 64, 8, 28_672),
    "3-8b": _size(4096, 32, 32, 8, 14_336, **_V3),
    "3-70b": _size(8192, 80, 64, 8, 28_672, **_V3),
    "3.1-8b": _size(4096, 32, 32, 8, 14_336, **_V3_1),
    "3.1-70b": _size(8192, 80, 64, 8, 28_672, **_V3_1),
    "3.1-405b": _size(16_384, 126, 128, 8, 53_248, **_V3_1),
    "3.2-1b": _size(2048, 16, 32, 8, 8192, **_V3_2),
    "3.2-3b": _size(3072, 28, 24, 8, 8192, **_V3_2),
}


def llama(
    size: str = "7b",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """Llama 2 where the size has no version before it; RMS norm, rotary positions, gated SiLU."""
    row = published(SIZES, "llama", size, **shape)
    heads, norm = row["heads"], RMSNorm(row["epsilon"])
    size = row["head_dim"] or head_dim(row["width"], heads)
    attention = AttentionConfig(heads, size, row["kv_heads"], dropout=dropout)
    mlp = MLPConfig(row["hidden"], "silu", gated=True)
    block = BlockConfig(attention, mlp, PreNorm(norm, dropout))
    return decoder_only(row, block, norm, dtype=dtype, scan=scan, remat=remat)
