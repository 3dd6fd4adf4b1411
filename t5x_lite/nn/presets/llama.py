"""Llama 2 (Touvron et al. 2023)."""

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.layers import Normal, RMSNorm
from t5x_lite.nn.positions import Rotary
from t5x_lite.nn.presets import head_dim, published
from t5x_lite.nn.residual import PreNorm


def _size(width, layers, heads, kv_heads, hidden, vocab_size=32_000):
    return {
        "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "hidden": hidden,
        "vocab_size": vocab_size,
    }  # fmt: skip


SIZES = {
    "tiny": _size(256, 4, 8, 4, 688, 4096),
    "7b": _size(4096, 32, 32, 32, 11_008),
    "13b": _size(5120, 40, 40, 40, 13_824),
    "70b": _size(8192, 80, 64, 8, 28_672),
}


def llama(
    size: str = "7b",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """Llama 2: RMS norm, rotary positions, gated SiLU; grouped keys and values from 70B on."""
    row = published(SIZES, "llama", size, **shape)
    heads, norm = row["heads"], RMSNorm(1e-5)
    attention = AttentionConfig(
        heads, head_dim(row["width"], heads), row["kv_heads"], dropout=dropout
    )
    mlp = MLPConfig(row["hidden"], "silu", gated=True)
    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=row["width"],
        embedder=TokenEmbedder(),
        head=LMHead(tied=False),
        decoder=StackConfig(
            layers=row["layers"],
            block=BlockConfig(attention, mlp, PreNorm(norm, dropout)),
            causal=True,
            positions=Rotary(),
            final_norm=norm,
        ),
        init=Normal(0.02),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
