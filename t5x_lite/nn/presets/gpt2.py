"""GPT-2 (Radford et al. 2019)."""

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.layers import LayerNorm, Normal
from t5x_lite.nn.positions import LearnedPositions
from t5x_lite.nn.presets import head_dim, published
from t5x_lite.nn.residual import PreNorm

SIZES = {
    "tiny": {"width": 128, "layers": 2, "heads": 4, "vocab_size": 4096},
    "small": {"width": 768, "layers": 12, "heads": 12, "vocab_size": 50_257},
    "medium": {"width": 1024, "layers": 24, "heads": 16, "vocab_size": 50_257},
    "large": {"width": 1280, "layers": 36, "heads": 20, "vocab_size": 50_257},
    "xl": {"width": 1600, "layers": 48, "heads": 25, "vocab_size": 50_257},
}


def gpt2(
    size: str = "small",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """GPT-2: pre-norm, learned positions, a tied head."""
    row = published(SIZES, "gpt2", size, **shape)
    width, heads, norm = row["width"], row["heads"], LayerNorm(1e-5)
    attention = AttentionConfig(
        heads, head_dim(width, heads), bias=True, out_bias=True, dropout=dropout
    )
    mlp = MLPConfig(4 * width, "gelu_tanh", bias=True)
    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=width,
        embedder=TokenEmbedder(),
        head=LMHead(tied=True),
        decoder=StackConfig(
            layers=row["layers"],
            block=BlockConfig(attention, mlp, PreNorm(norm, dropout)),
            causal=True,
            positions=LearnedPositions(1024),
            input_dropout=dropout,
            final_norm=norm,
        ),
        init=Normal(0.02, depth_scaled=True),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
