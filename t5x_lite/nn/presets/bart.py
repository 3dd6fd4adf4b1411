"""BART (Lewis et al. 2020): the transformer of 2017 with learned positions, GELU and more norms."""

from typing import Any

from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import FixedBiasLMHead
from t5x_lite.nn.layers import LayerNorm, Normal
from t5x_lite.nn.positions import LearnedPositions
from t5x_lite.nn.presets import published
from t5x_lite.nn.presets.transformer import encoder_decoder


def _size(width, layers, heads, hidden, vocab_size=50_265):
    return {
        "width": width, "layers": layers, "heads": heads, "hidden": hidden,
        "decoder_layers": None, "decoder_heads": None, "decoder_hidden": None,
        "vocab_size": vocab_size, "positions": 1024, "activation": "gelu", "scaled": False,
        "head": FixedBiasLMHead(tied=True),
    }  # fmt: skip


SIZES = {
    "tiny": _size(128, 2, 4, 512, 4096),
    "base": _size(768, 6, 12, 3072),
    "large": _size(1024, 12, 16, 4096),
}


def bart(
    size: str = "base",
    dropout: float | int = 0.1,
    dtype: str = "float32",
    scan: bool = True,
    remat: str = "none",
    **shape: Any,
) -> ModelConfig:
    """BART, which was pre-trained to restore a text in full."""
    row = published(SIZES, "bart", size, **shape)
    # Two rows before the first place's: fairseq counts positions from its padding's id, 1.
    positions = LearnedPositions(row.pop("positions"), offset=2)
    return encoder_decoder(
        **row,
        attention_bias=True,
        positions=positions,
        input_norm=LayerNorm(1e-5),
        init=Normal(0.02),
        dropout=dropout,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )
