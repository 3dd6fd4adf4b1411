"""Packages of the extra `hub`."""

import importlib
from typing import Any

from t5x_lite.errors import UserError


def require(name: str) -> Any:
    """Imports a package, or says which extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is missing; install it: pip install 't5x_lite[hub]'.") from error
