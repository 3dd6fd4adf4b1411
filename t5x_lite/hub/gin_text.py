"""A config as the gin text that builds it."""

import dataclasses
from typing import Any


def gin_text(macro: str, config: Any) -> str:
    """Lines that set a macro to a frozen dataclass of frozen dataclasses; defaults are left out.

    Each part is bound in a scope named after the field that holds it first; equal parts are
    written once.
    """
    modules: dict[str, str] = {}
    scopes: dict[Any, str] = {}
    bindings: list[str] = []

    def reference(value: Any, scope: str) -> str:
        if isinstance(value, tuple):
            each = [reference(item, f"{scope}_{n}") for n, item in enumerate(value)]
            return f"({', '.join(each)}{',' if len(each) == 1 else ''})"
        if not dataclasses.is_dataclass(value):
            return repr(value)
        package, _, module = type(value).__module__.rpartition(".")
        modules[module] = package
        name = f"{module}.{type(value).__name__}"
        if value not in scopes:
            scopes[value] = scope
            for field in dataclasses.fields(value):
                part = getattr(value, field.name)
                if part == _default(field):
                    continue
                text = reference(part, f"{scope}_{field.name}")
                bindings.append(f"{scope}/{name}.{field.name} = {text}")
        return f"@{scopes[value]}/{name}()"

    line = f"{macro} = {reference(config, macro.lower())}"
    imports = [f"from {package} import {module}" for module, package in sorted(modules.items())]
    return "\n".join([*imports, "", line, *bindings, ""])


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
