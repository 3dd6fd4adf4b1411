"""What makes two runs the same run: stored in every checkpoint, compared on resume."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from t5x_lite.errors import UserError
from t5x_lite.nn import mup
from t5x_lite.nn.config import ModelConfig
from t5x_lite.optim import MuP, Optimizer

# How a model is compiled, not what it computes: these may change between a run and its resumption.
_COMPILATION = {"scan": True, "remat": "none"}
_LATER = ("attention_kernel",)  # the same, but of no checkpoint of format 1: left out
_PACKAGES = (
    *("t5x_lite", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("grain", "array_record", "tensorflow-datasets", "sentencepiece", "gin-config"),
)


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """The model's config as JSON, without what only changes how it is compiled."""
    known = plain(dataclasses.replace(model, **_COMPILATION))
    return {name: value for name, value in known.items() if name not in _LATER}


def mup_identity(optimizer: Optimizer) -> str | None:
    """The base that muP's initial values and rates are relative to; None: the standard ones."""
    if not isinstance(optimizer, MuP):
        return None
    base = mup.like(optimizer.base, optimizer.model)
    digest = hashlib.sha256(json.dumps(model_identity(base), sort_keys=True).encode()).hexdigest()
    return f"base of width {base.width} ({digest[:8]})"


def plain(config: Any) -> Any:
    """A config of dataclasses as JSON; unions stay apart by their types' names."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    return [plain(part) for part in config] if isinstance(config, tuple) else config


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Every leaf that differs, `decoder.layers: 12 → 24`."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        names = [*saved, *(name for name in now if name not in saved)]
        return [
            line
            for name in names
            for line in differences(
                saved.get(name), now.get(name), f"{path}.{name}" if path else name
            )
        ]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        pairs = enumerate(zip(saved, now, strict=True))
        return [line for n, (a, b) in pairs for line in differences(a, b, f"{path}[{n}]")]
    return [] if saved == now else [f"{path}: {saved} → {now}"]


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Raises `UserError` where a checkpoint's model, data or seed isn't this run's.

    Only the parts that `now` names are compared, so that `eval` can leave out the seed.
    """
    if changed := differences_of(saved, now):
        raise UserError(
            f"{directory} holds another run ({shown(changed)}): undo the change or give another "
            f"--model_dir."
        )


def differences_of(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`differences` of the parts that `now` names."""
    # Compared as JSON, which is what the checkpoint holds: tuples are lists there.
    now = json.loads(json.dumps(now))
    return [line for part in now for line in differences(saved.get(part), now[part], part)]


def shown(changed: list[str]) -> str:
    """The first few differences, on one line."""
    return "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if changed[4:] else "")


def environment() -> dict[str, Any]:
    """Versions and devices, for the record beside the checkpoints."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": len(jax.devices()),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
