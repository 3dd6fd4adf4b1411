"""GPT-2 (Radford et al. 2019)."""

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.layers import LayerNorm, Normal
from t5x_lite.nn.positions import LearnedPositions
from t5x_lite.nn.presets import decoder_only, head_dim, published
from t5x_lite.nn.residual import PreNorm


def _size(width, layers, heads, vocab_size=50_257):
    return {
        "width": width, "layers": layers, "heads": heads, "vocab_size": vocab_size,
        "hidden": None, "positions": 1024, "epsilon": 1e-5,
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 4096),
    "small": _size(768, 12, 12),
    "medium": _size(1024, 24, 16),
    "large": _size(1280, 36, 20),
    "xl": _size(1600, 48, 25),
}


def gpt2(
    size: str = "small",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: float | int | None,
) -> ModelConfig:
    """GPT-2: pre-norm, learned positions, a tied head."""
    row = published(SIZES, "gpt2", size, **shape)
    width, heads, norm = row["width"], row["heads"], LayerNorm(row["epsilon"])
    attention = AttentionConfig(
        heads, head_dim(width, heads), bias=True, out_bias=True, dropout=dropout
    )
    mlp = MLPConfig(row["hidden"] or 4 * width, "gelu_tanh", bias=True)
    block = BlockConfig(attention, mlp, PreNorm(norm, dropout))
    return decoder_only(
        row, block, norm, LearnedPositions(row["positions"]), LMHead(tied=True),
        init=Normal(0.02, depth_scaled=True), input_dropout=dropout,
        dtype=dtype, scan=scan, remat=remat,
    )  # fmt: skip
