"""ModernBERT (Warner et al. 2024): rotary positions, gated FFNs, local and global attention."""

import dataclasses
from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig, Pattern, StackConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import MaskedLMHead, NoHead
from t5x_lite.nn.layers import Identity, Normal, UnbiasedLayerNorm
from t5x_lite.nn.positions import Rotary
from t5x_lite.nn.presets import head_dim, published
from t5x_lite.nn.residual import PreNorm


def _size(width, layers, heads, hidden, vocab_size=50_368, local=128):
    # Every third layer looks everywhere, the first one included; the others at `local` keys.
    return {
        "width": width, "layers": layers, "heads": heads, "hidden": hidden,
        "vocab_size": vocab_size, "every": 3, "local": local, "positions": Rotary(160_000.0),
        "local_positions": Rotary(10_000.0), "epsilon": 1e-5,
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 192, 4096, local=16),
    "base": _size(768, 22, 12, 1152),
    "large": _size(1024, 28, 16, 2624),
}


def modernbert(
    size: str = "base",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """ModernBERT with its masked-language-model head."""
    row = published(SIZES, "modernbert", size, **shape)
    width, heads, norm = row["width"], row["heads"], UnbiasedLayerNorm(row["epsilon"])
    everywhere = AttentionConfig(
        heads, head_dim(width, heads), dropout=dropout, positions=row["positions"]
    )
    # Half of the window lies on either side.
    near = dataclasses.replace(
        everywhere, positions=row["local_positions"], window=row["local"] // 2 + 1
    )
    mlp = MLPConfig(row["hidden"], "gelu", gated=True, dropout=dropout)

    def block(attention, attention_norm):
        return BlockConfig(
            attention, mlp, PreNorm(attention_norm, dropout), ffn_residual=PreNorm(norm)
        )

    local = (block(near, norm),) * (row["every"] - 1)
    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=width,
        embedder=TokenEmbedder(),
        head=MaskedLMHead("gelu", norm, transform_bias=False),
        encoder=StackConfig(
            layers=row["layers"],
            # The input is normed already: the first layer's norm would do it again.
            block=Pattern((*local, block(everywhere, norm)), (block(everywhere, Identity()),)),
            causal=False,
            input_norm=norm,
            input_dropout=dropout,
            final_norm=norm,
        ),
        init=Normal(0.02, depth_scaled=True),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def modernbert_encoder(size: str = "base", **overrides) -> ModelConfig:
    """ModernBERT without a head, for fine-tuning."""
    return dataclasses.replace(modernbert(size, **overrides), head=NoHead())
