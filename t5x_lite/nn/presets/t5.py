"""T5 1.0 (Raffel et al. 2020) and T5 1.1 (Shazeer 2020; google-research/text-to-text-transfer).

1.1 differs in a gated GELU for ReLU, in embeddings that the head doesn't share, and in sizes.
"""

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.layers import RMSNorm
from t5x_lite.nn.positions import RelativeBias
from t5x_lite.nn.presets import published
from t5x_lite.nn.residual import PreNorm


def _size(width, layers, heads, head_dim, hidden, vocab_size=32_128):
    return {
        "width": width, "layers": layers, "heads": heads, "head_dim": head_dim, "hidden": hidden,
        "vocab_size": vocab_size,
    }  # fmt: skip


SIZES_1_0 = {
    "tiny": _size(128, 2, 4, 32, 512, 4096),
    "small": _size(512, 6, 8, 64, 2048),
    "base": _size(768, 12, 12, 64, 3072),
    "large": _size(1024, 24, 16, 64, 4096),
    "3b": _size(1024, 24, 32, 128, 16_384),
    "11b": _size(1024, 24, 128, 128, 65_536),
}
SIZES_1_1 = {
    "tiny": _size(128, 2, 4, 32, 256, 4096),
    "small": _size(512, 8, 6, 64, 1024),
    "base": _size(768, 12, 12, 64, 2048),
    "large": _size(1024, 24, 16, 64, 2816),
    "xl": _size(2048, 24, 32, 64, 5120),
    "xxl": _size(4096, 24, 64, 64, 10_240),
}


def t5_1_0(
    size: str = "small",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """T5 1.0: ReLU, and a head that shares the embeddings, scaled by width^-0.5."""
    row = published(SIZES_1_0, "t5_1_0", size, **shape)
    head = LMHead(tied=True, scale=row["width"] ** -0.5)
    mlp = MLPConfig(row["hidden"], "relu", dropout=dropout)
    return _t5(row, head, mlp, dropout, dtype, scan, remat)


def t5_1_1(
    size: str = "small",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """T5 1.1: gated GELU, a head of its own; pre-trained without dropout."""
    row = published(SIZES_1_1, "t5_1_1", size, **shape)
    mlp = MLPConfig(row["hidden"], "gelu_tanh", gated=True, dropout=dropout)
    return _t5(row, LMHead(tied=False), mlp, dropout, dtype, scan, remat)


def _t5(row, head, mlp, dropout, dtype, scan, remat):
    # No scale on the logits: the initialiser of the queries makes up for it.
    attention = AttentionConfig(row["heads"], row["head_dim"], scale=1.0, dropout=dropout)

    def stack(causal):
        cross = attention if causal else None
        return StackConfig(
            layers=row["layers"],
            block=BlockConfig(attention, mlp, PreNorm(RMSNorm(), dropout), cross),
            causal=causal,
            positions=RelativeBias(),
            input_dropout=dropout,
            final_norm=RMSNorm(),
            final_dropout=dropout,
        )

    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=row["width"],
        embedder=TokenEmbedder(standard_deviation=1.0),
        head=head,
        encoder=stack(causal=False),
        decoder=stack(causal=True),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
