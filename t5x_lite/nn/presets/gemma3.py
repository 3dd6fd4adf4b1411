"""Gemma 3's language model (Gemma Team 2025)."""

from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.blocks import BlockConfig, Pattern
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.layers import OffsetRMSNorm
from t5x_lite.nn.positions import LinearRotary, Rotary
from t5x_lite.nn.presets import decoder_only, published
from t5x_lite.nn.residual import SandwichNorm


def _size(width, layers, heads, kv_heads, head_dim, hidden, scalar=256, **others):
    return {
        "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "hidden": hidden, "vocab_size": 262_208,
        "positions": LinearRotary(1_000_000.0, factor=8.0), "local_positions": Rotary(10_000.0),
        "query_scalar": scalar, "window": 1024, "period": 6, "logit_caps": (None, None),
        "epsilon": 1e-6, **others,
    }  # fmt: skip


# The small ones read text only: 64 words less, those of images, and no stretched rotations.
_TEXT = {"vocab_size": 262_144, "positions": Rotary(1_000_000.0), "window": 512}
_TINY = {**_TEXT, "vocab_size": 4096, "window": 64, "period": 2}
SIZES = {
    "tiny": _size(128, 2, 4, 2, 32, 512, 32, **_TINY),
    "270m": _size(640, 18, 4, 1, 256, 2048, **_TEXT),
    "1b": _size(1152, 26, 4, 1, 256, 6912, **_TEXT),
    "4b": _size(2560, 34, 8, 4, 256, 10_240),
    "12b": _size(3840, 48, 16, 8, 256, 15_360),
    "27b": _size(5376, 62, 32, 16, 128, 21_504, 168),
}


def gemma3(
    size: str = "1b",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """Gemma 2 with norms of queries and keys, mostly without soft caps; 5 local layers, 1 global.

    Of every `period` layers, the last one looks everywhere and turns by `positions`; the others
    look at `window` keys and turn faster, by `local_positions`.
    """
    row = published(SIZES, "gemma3", size, **shape)
    norm, (attention_cap, head_cap) = OffsetRMSNorm(row["epsilon"]), row["logit_caps"]
    mlp = MLPConfig(row["hidden"], "gelu_tanh", gated=True)

    def block(window: int | None, positions: Rotary | None) -> BlockConfig:
        attention = AttentionConfig(
            row["heads"], row["head_dim"], row["kv_heads"], scale=row["query_scalar"] ** -0.5,
            dropout=dropout, positions=positions, window=window, soft_cap=attention_cap,
            qk_norm=norm,
        )  # fmt: skip
        return BlockConfig(attention, mlp, SandwichNorm(norm, dropout))

    local = block(row["window"], row["local_positions"])
    return decoder_only(
        row, Pattern((local,) * (row["period"] - 1) + (block(None, None),)), norm,
        head=LMHead(tied=True, soft_cap=head_cap),
        embedder=TokenEmbedder(scale=row["width"] ** 0.5),
        dtype=dtype, scan=scan, remat=remat,
    )  # fmt: skip
