"""One file a family; each preset is a function that returns a ModelConfig.

`size` names a row of the family's table; any entry of the row can be given besides, such as
`llama("7b", layers=16)`, to try another shape.
"""

from collections.abc import Mapping
from typing import Any

from t5x_lite.errors import UserError


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
