"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434) and DeepSeek-V3 (2024, arXiv 2412.19437)."""

from typing import Any

from t5x_lite.nn.config import BlockConfig, ModelConfig, Pattern
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.layers import RMSNorm
from t5x_lite.nn.mla import MLAConfig
from t5x_lite.nn.moe import GroupLimit, MoEConfig, RouterConfig, SigmoidRouter, SoftmaxRouter
from t5x_lite.nn.positions import Rotary, YarnRotary
from t5x_lite.nn.presets import decoder_only, published
from t5x_lite.nn.residual import PreNorm


def _size(width, layers, heads, hidden, **others):
    # hidden: of the first layers' dense FFN; expert_hidden: of each expert.
    return {
        "width": width, "layers": layers, "heads": heads, "hidden": hidden,
        "content_dim": 128, "rotary_dim": 64, "value_dim": 128, "kv_rank": 512, "query_rank": 1536,
        "expert_hidden": None, "experts": None, "top_k": 6, "shared": 2, "dense_layers": 1,
        "groups": None, "scale": 1.0, "normalized": False, "positions": Rotary(),
        "vocab_size": 102_400, "epsilon": 1e-6, "bias": False, "mlp_bias": False, "tied": False,
        "capacity_factor": None,
        **others,
    }  # fmt: skip


_YARN = YarnRotary(mscale=0.707, mscale_all=0.707)
_TINY = {
    "content_dim": 32, "rotary_dim": 16, "value_dim": 32, "kv_rank": 64, "query_rank": 96,
    "expert_hidden": 64, "experts": 8, "top_k": 2, "vocab_size": 4096,
}  # fmt: skip
SIZES_V2 = {
    "tiny": _size(128, 2, 4, 256, **_TINY, groups=GroupLimit(4, 2)),
    "lite": _size(
        2048, 27, 16, 10_944, query_rank=None, expert_hidden=1408, experts=64, positions=_YARN
    ),
    "236b": _size(
        5120, 60, 128, 12_288, expert_hidden=1536, experts=160, groups=GroupLimit(8, 3),
        scale=16.0, positions=_YARN,
    ),
}  # fmt: skip
_V3 = {"shared": 1, "scale": 2.5, "normalized": True}
SIZES_V3 = {
    "tiny": _size(128, 2, 4, 256, **_TINY, **_V3, groups=GroupLimit(4, 2, best=2)),
    "671b": _size(
        7168, 61, 128, 18_432, **_V3, expert_hidden=2048, experts=256, top_k=8, dense_layers=3,
        groups=GroupLimit(8, 4, best=2), positions=YarnRotary(mscale=1.0, mscale_all=1.0),
        vocab_size=129_280,
    ),
}  # fmt: skip


def deepseek_v2(
    size: str = "lite",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """DeepSeek-V2: latent attention, and experts of which some are shared."""
    row = published(SIZES_V2, "deepseek_v2", size, **shape)
    return _deepseek(row, SoftmaxRouter, dropout, dtype=dtype, scan=scan, remat=remat)


def deepseek_v3(
    size: str = "671b",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """DeepSeek-V3, without the layers that predict several tokens (R1 has the same shape)."""
    row = published(SIZES_V3, "deepseek_v3", size, **shape)
    return _deepseek(row, SigmoidRouter, dropout, dtype=dtype, scan=scan, remat=remat)


def _deepseek(
    row: dict[str, Any], router: type[RouterConfig], dropout: float | int, **compiled: Any
) -> ModelConfig:
    positions, norm = row["positions"], RMSNorm(row["epsilon"])
    content, rotary = row["content_dim"], row["rotary_dim"]
    gain = positions.logit_gain if isinstance(positions, YarnRotary) else 1.0
    attention = MLAConfig(
        row["heads"], content, rotary, row["value_dim"], row["kv_rank"],
        row["query_rank"] or None,  # 0, too, is none: queries straight from the input
        scale=None if gain == 1.0 else gain * (content + rotary) ** -0.5,
        bias=row["bias"], dropout=dropout,
    )  # fmt: skip

    def mlp(hidden, bias=False):
        return MLPConfig(hidden, "silu", gated=True, bias=bias)

    moe = MoEConfig(
        row["experts"],
        mlp(row["expert_hidden"]),
        router(row["top_k"], row["normalized"], row["scale"], row["groups"]),
        mlp(row["shared"] * row["expert_hidden"], row["mlp_bias"]) if row["shared"] else None,
        row["capacity_factor"],
    )
    residual, dense = PreNorm(norm, dropout), mlp(row["hidden"], row["mlp_bias"])
    first = (BlockConfig(attention, dense, residual),) * row["dense_layers"]
    pattern = Pattern((BlockConfig(attention, moe, residual),), first)
    return decoder_only(row, pattern, norm, **compiled)
