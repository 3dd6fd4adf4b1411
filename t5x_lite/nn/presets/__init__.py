"""One file a family; each preset is a function that returns a ModelConfig.

`size` names a row of the family's table; any entry of the row can be given besides, such as
`llama("7b", layers=16)`, to try another shape.
"""

from collections.abc import Mapping
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.nn.config import BlockConfig, ModelConfig, Pattern, StackConfig
from t5x_lite.nn.embedders import TokenEmbedder
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.layers import Initializer, Normal, NormConfig
from t5x_lite.nn.positions import PositionsConfig


def published(
    sizes: Mapping[str, Mapping[str, Any]], family: str, size: str, **shape: Any
) -> dict[str, Any]:
    """The row of a family's table of sizes, with those entries replaced that `shape` gives.

    Raises:
        UserError: no such size, or an entry that the table lacks.
    """
    if size not in sizes:
        raise UserError(f"{family} has no size {size!r}; there are {', '.join(sizes)}.")
    row = dict(sizes[size])
    for name, value in shape.items():
        if name not in row:
            raise UserError(f"{family} has no {name!r}; its shape is {', '.join(row)}.")
        row[name] = row[name] if value is None else value
    return row


def head_dim(width: int, heads: int) -> int:
    """Width a head, for families whose heads divide the model's width.

    Raises:
        UserError: they don't.
    """
    if heads < 1 or width % heads:
        raise UserError(f"width={width} must be a multiple of heads={heads}.")
    return width // heads


def decoder_only(
    row: Mapping[str, Any],
    block: BlockConfig | Pattern,
    norm: NormConfig,
    positions: PositionsConfig | None = None,
    head: LMHead | None = None,
    embedder: TokenEmbedder | None = None,
    init: Initializer | None = None,
    input_dropout: float | int = 0.0,
    **compiled: Any,
) -> ModelConfig:
    """A decoder of the row's layers, width and vocabulary, with `norm` after the last layer.

    Where none are given, positions are the row's, its `tied` makes the head, and the initialiser is
    Normal(0.02). `compiled` is how the model is computed: dtype, scan, remat.
    """
    return ModelConfig(
        vocab_size=row["vocab_size"],
        width=row["width"],
        embedder=embedder or TokenEmbedder(),
        head=head or LMHead(tied=row["tied"]),
        decoder=StackConfig(
            layers=row["layers"],
            block=block,
            causal=True,
            positions=positions or row["positions"],
            input_dropout=input_dropout,
            final_norm=norm,
        ),
        init=init or Normal(0.02),
        **compiled,
    )
