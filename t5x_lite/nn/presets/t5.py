"""T5 1.0 (Raffel et al. 2020), T5 1.1 (Shazeer 2020; google-research/text-to-text-transfer), heirs.

1.1 differs in a gated GELU for ReLU, in embeddings that the head doesn't share, and in sizes. Its
form is that of Flan-T5 (Chung et al. 2022), mT5 (Xue et al. 2021), ByT5 (Xue et al. 2022) and, with
a bias of its own in every layer, umT5 (Chung et al. 2023).
"""

import dataclasses

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


def _multilingual(vocab_size):
    """T5 1.1's sizes with a vocabulary for many languages."""
    return {
        size: row if size == "tiny" else {**row, "vocab_size": vocab_size}
        for size, row in SIZES_1_1.items()
    }


MT5_SIZES = _multilingual(250_112)
UMT5_SIZES = _multilingual(256_384)
del UMT5_SIZES["large"]  # never trained
# Bytes are easy to embed and many to read: the encoder is three times as deep as the decoder
# (ByT5, §3.1).
BYT5_SIZES = {
    "tiny": {**_size(128, 3, 4, 32, 256, 4096), "decoder_layers": 1},
    "small": {**_size(1472, 12, 6, 64, 3584, 384), "decoder_layers": 4},
    "base": {**_size(1536, 18, 12, 64, 3968, 384), "decoder_layers": 6},
    "large": {**_size(1536, 36, 16, 64, 3840, 384), "decoder_layers": 12},
    "xl": {**_size(2560, 36, 32, 64, 6720, 384), "decoder_layers": 12},
    "xxl": {**_size(4672, 36, 64, 64, 12_352, 384), "decoder_layers": 12},
}
_FORM_1_1 = {"activation": "gelu_tanh", "gated": True, "tied": False, "scaled": False}


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
    return t5(**row, dropout=dropout, dtype=dtype, scan=scan, remat=remat)


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
    return t5(**row, **_FORM_1_1, dropout=dropout, dtype=dtype, scan=scan, remat=remat)


def flan_t5(size: str = "small", dropout: float | int = 0.05, **overrides) -> ModelConfig:
    """Flan-T5: T5 1.1, fine-tuned on instructions with a little dropout (§E, table 22)."""
    return t5_1_1(size, dropout=dropout, **overrides)


def mt5(
    size: str = "small",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """mT5: T5 1.1 with a vocabulary for 101 languages."""
    row = published(MT5_SIZES, "mt5", size, **shape)
    return t5(**row, **_FORM_1_1, dropout=dropout, dtype=dtype, scan=scan, remat=remat)


def byt5(
    size: str = "small",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """ByT5: T5 1.1 over bytes, with a deep encoder and a shallow decoder."""
    row = published(BYT5_SIZES, "byt5", size, **shape)
    return t5(**row, **_FORM_1_1, dropout=dropout, dtype=dtype, scan=scan, remat=remat)


def umt5(
    size: str = "small",
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """umT5: mT5 with a relative bias of its own in every layer."""
    row = published(UMT5_SIZES, "umt5", size, **shape)
    model = t5(**row, **_FORM_1_1, dropout=dropout, dtype=dtype, scan=scan, remat=remat)
    return bias_per_layer(model)


def bias_per_layer(model: ModelConfig) -> ModelConfig:
    """The model of `t5` with the relative bias of each stack moved into its every layer."""

    def moved(stack):
        attention = dataclasses.replace(stack.block.attention, positions=stack.positions)
        block = dataclasses.replace(stack.block, attention=attention)
        return dataclasses.replace(stack, positions=None, block=block)

    return dataclasses.replace(model, encoder=moved(model.encoder), decoder=moved(model.decoder))


def t5(
    *,
    width: int,
    layers: int,
    heads: int,
    head_dim: int,
    hidden: int,
    vocab_size: int,
    decoder_layers: int | None = None,
    activation: str = "relu",
    gated: bool = False,
    tied: bool = True,
    scaled: bool = True,
    buckets: int = 32,
    max_distance: int = 128,
    epsilon: float | int = 1e-6,
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
) -> ModelConfig:
    """What all versions have in common, for other shapes; the defaults are T5 1.0's."""
    # No scale on the logits: the initialiser of the queries makes up for it.
    attention = AttentionConfig(heads, head_dim, scale=1.0, dropout=dropout)
    mlp = MLPConfig(hidden, activation, gated=gated, dropout=dropout)
    norm = RMSNorm(epsilon)

    def stack(count, causal):
        cross = attention if causal else None
        return StackConfig(
            layers=count,
            block=BlockConfig(attention, mlp, PreNorm(norm, dropout), cross),
            causal=causal,
            positions=RelativeBias(buckets, max_distance),
            input_dropout=dropout,
            final_norm=norm,
            final_dropout=dropout,
        )

    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        embedder=TokenEmbedder(standard_deviation=1.0),
        head=LMHead(tied=tied, scale=width**-0.5 if scaled else 1.0),
        encoder=stack(layers, causal=False),
        decoder=stack(decoder_layers or layers, causal=True),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
