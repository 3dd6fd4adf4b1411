"""Tiny models of `transformers` to compare with: a file of cases for each kind of family."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of `transformers` by the names of its class and the fields of its config.

    Attributes:
        name: of the case.
        model: the class of `transformers`.
        config: fields of its config.
        golden: kept as a file too, for the tests that have no torch; one a family.
        quick: part of the slice that CI runs.
        length: tokens of the longest row; longer than every window.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    golden: bool = False
    quick: bool = False
    length: int = 13


def all_cases() -> list[Case]:
    """Of every file here."""
    modules = [m.name for m in pkgutil.iter_modules(__path__)]
    return [
        case for name in modules for case in importlib.import_module(f"{__name__}.{name}").CASES
    ]
