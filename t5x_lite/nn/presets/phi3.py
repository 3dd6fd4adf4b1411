"""Phi-3 Mini (Abdin et al. 2024)."""

from typing import Any

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.layers import RMSNorm
from t5x_lite.nn.positions import LongRotary, Rotary
from t5x_lite.nn.presets import decoder_only, head_dim, published
from t5x_lite.nn.residual import PreNorm

# From mini-128k's published config.json as of June 2024 (the release of April had others): what
# LongRoPE's search found for each of the 48 pairs of a head's dimensions.
# fmt: off
_SHORT = (
    1.1, 1.1, 1.1, 1.3000000000000003, 1.3500000000000003, 1.3500000000000003, 1.4000000000000004,
    1.5500000000000005, *(2.000000000000001,) * 17, *(2.0500000000000007,) * 6,
    *(2.1000000000000005,) * 2, 2.1500000000000004, *(2.25,) * 5, 2.3999999999999995,
    2.4499999999999993, 2.499999999999999, 2.6999999999999984, 2.6999999999999984,
    2.7499999999999982, 2.799999999999998, 2.8999999999999977, 3.049999999999997,
)
_LONG = (
    1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558,
    1.5699999332427979, 1.7999999523162842, 2.129999876022339, 2.129999876022339,
    3.009999990463257, 5.910000324249268, 6.950000286102295, 9.070000648498535, 9.930000305175781,
    10.710000038146973, 11.130000114440918, 14.609999656677246, 15.409998893737793,
    19.809999465942383, 37.279998779296875, 38.279998779296875, 38.599998474121094,
    40.12000274658203, 46.20000457763672, 50.940006256103516, 53.66000747680664, 54.9373893737793,
    56.89738845825195, 57.28738784790039, 59.98738479614258, 60.86738586425781, 60.887386322021484,
    61.71739196777344, 62.91739273071289, 62.957393646240234, 63.41739273071289, 63.8173942565918,
    63.83739471435547, 63.897396087646484, 63.93739700317383, 64.06739807128906, 64.11434936523438,
    64.12435150146484, 64.15435028076172, 64.19435119628906, 64.24435424804688, 64.57435607910156,
    64.69000244140625, 64.76000213623047,
)
# fmt: on


def _size(width=3072, layers=32, heads=32, hidden=8192, vocab_size=32_064, **others):
    return {
        "width": width, "layers": layers, "heads": heads, "kv_heads": heads, "hidden": hidden,
        "vocab_size": vocab_size, "positions": Rotary(), "window": 2047, "epsilon": 1e-5,
        "tied": False, **others,
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 344, 4096, window=None),
    "mini-4k": _size(),
    "mini-128k": _size(
        positions=LongRotary(short=_SHORT, long=_LONG, original_length=4096, factor=32.0),
        window=262_144,
    ),
}


def phi3(
    size: str = "mini-4k",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """Llama's layer, looking at `window` keys; None looks everywhere."""
    row = published(SIZES, "phi3", size, **shape)
    heads, norm = row["heads"], RMSNorm(row["epsilon"])
    attention = AttentionConfig(
        heads, head_dim(row["width"], heads), row["kv_heads"], dropout=dropout, window=row["window"]
    )
    mlp = MLPConfig(row["hidden"], "silu", gated=True)
    block = BlockConfig(attention, mlp, PreNorm(norm, dropout))
    return decoder_only(row, block, norm, dtype=dtype, scan=scan, remat=remat)
