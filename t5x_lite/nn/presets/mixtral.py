"""Mixtral (Jiang et al. 2024): Llama's block with experts in the FFN's place."""

from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.layers import RMSNorm
from t5x_lite.nn.moe import MoEConfig, SoftmaxRouter
from t5x_lite.nn.positions import Rotary
from t5x_lite.nn.presets import decoder_only, head_dim, published
from t5x_lite.nn.residual import PreNorm


def _size(width, layers, heads, kv_heads, hidden, vocab_size=32_000, experts=8):
    return {
        "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": None, "hidden": hidden, "experts": experts, "top_k": 2,
        "vocab_size": vocab_size, "positions": Rotary(1_000_000.0), "epsilon": 1e-5,
        "window": None, "tied": False, "capacity_factor": None,
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 2, 256, 4096, experts=4),
    "8x7b": _size(4096, 32, 32, 8, 14_336),
    "8x22b": _size(6144, 56, 48, 8, 16_384),
}


def mixtral(
    size: str = "8x7b",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """Mixtral: two of eight experts for each token."""
    row = published(SIZES, "mixtral", size, **shape)
    heads, norm = row["heads"], RMSNorm(row["epsilon"])
    attention = AttentionConfig(
        heads,
        row["head_dim"] or head_dim(row["width"], heads),
        row["kv_heads"],
        dropout=dropout,
        window=row["window"],
    )
    expert = MLPConfig(row["hidden"], "silu", gated=True)
    router, factor = SoftmaxRouter(row["top_k"]), row["capacity_factor"]
    experts = MoEConfig(row["experts"], expert, router, capacity_factor=factor)
    block = BlockConfig(attention, experts, PreNorm(norm, dropout))
    return decoder_only(row, block, norm, dtype=dtype, scan=scan, remat=remat)
