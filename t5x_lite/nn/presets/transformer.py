"""The transformer of "Attention is all you need" (Vaswani et al. 2017), also Marian's form."""

from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.layers import FanIn, Initializer, LayerNorm, NormConfig
from t5x_lite.nn.positions import PositionsConfig, Sinusoidal
from t5x_lite.nn.presets import head_dim, published
from t5x_lite.nn.residual import PostNorm


def _size(width, layers, heads, hidden, vocab_size=37_000):
    return {
        "width": width, "layers": layers, "heads": heads, "hidden": hidden,
        "vocab_size": vocab_size,
    }  # fmt: skip


SIZES = {  # table 3; English and German share a vocabulary of about 37,000 (§5.1)
    "tiny": _size(128, 2, 4, 512, 4096),
    "base": _size(512, 6, 8, 2048),
    "big": _size(1024, 6, 16, 4096),
}


def transformer(
    size: str = "base",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: int | None,
) -> ModelConfig:
    """The paper's: ReLU, no bias in attention, one table for both inputs and the output (§3.4)."""
    row = published(SIZES, "transformer", size, **shape)
    return encoder_decoder(**row, dropout=dropout, dtype=dtype, scan=scan, remat=remat)


def encoder_decoder(
    *,
    width: int,
    layers: int,
    heads: int,
    hidden: int,
    vocab_size: int,
    decoder_layers: int | None = None,
    decoder_heads: int | None = None,
    decoder_hidden: int | None = None,
    activation: str = "relu",
    scaled: bool = True,
    attention_bias: bool = False,
    positions: PositionsConfig | None = None,
    input_norm: NormConfig | None = None,
    head: LMHead | None = None,
    init: Initializer | None = None,
    dropout: float | int = 0.0,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
) -> ModelConfig:
    """What the paper's, Marian's and BART's have in common: norms after, one table for all.

    `scaled` embeddings are multiplied by sqrt(width); positions are sinusoidal unless given.
    """
    norm = LayerNorm(1e-5)

    def stack(count, count_heads, units, causal):
        attention = AttentionConfig(
            count_heads, head_dim(width, count_heads), bias=attention_bias, out_bias=attention_bias
        )
        mlp = MLPConfig(units, activation, bias=True)
        cross = attention if causal else None
        return StackConfig(
            layers=count,
            block=BlockConfig(attention, mlp, PostNorm(norm, dropout), cross),
            causal=causal,
            positions=positions or Sinusoidal(),
            input_norm=input_norm,
            input_dropout=dropout,
        )

    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        # The same variance for tokens, once they are scaled, as for hidden units.
        embedder=TokenEmbedder(width**-0.5, scale=width**0.5) if scaled else TokenEmbedder(),
        head=head or LMHead(tied=True),
        encoder=stack(layers, heads, hidden, causal=False),
        decoder=stack(
            decoder_layers or layers, decoder_heads or heads, decoder_hidden or hidden, causal=True
        ),
        init=init or FanIn(),
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
