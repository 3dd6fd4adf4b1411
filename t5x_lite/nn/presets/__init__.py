"""One file a family; each preset is a function that returns a ModelConfig."""

from collections.abc import Mapping
from typing import Any

from t5x_lite.errors import UserError


def published(sizes: Mapping[str, Mapping[str, Any]], family: str, size: str) -> Mapping[str, Any]:
    """The row of a family's table of sizes.

    Raises:
        UserError: no such size.
    """
    if size not in sizes:
        raise UserError(f"{family} has no size {size!r}; there are {', '.join(sizes)}.")
    return sizes[size]
