"""The verbs `convert from-hf` and `convert to-hf`."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from rich.console import Console

from t5x_lite.checkpoint import Checkpointer
from t5x_lite.errors import UserError
from t5x_lite.hub import weights
from t5x_lite.hub.families import Family, family_of, read_config, write_config
from t5x_lite.hub.gin_text import gin_text
from t5x_lite.hub.source import Tensors, find, read_json, write_tensors
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.train.identity import model_identity
from t5x_lite.train.restore import FOLDER, restore_params

# In a converted run's folder: what stood beside the weights, to go out again with them.
PUBLISHED = "published"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"),
    *("merges.txt", "source.spm", "target.spm", "chat_template.jinja", "generation_config.json"),
)
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
TASKS = {"decoder-only": "causal_lm", "encoder-only": "masked_lm",
         "encoder-decoder": "span_corruption"}  # fmt: skip
# A safetensors file holds tensors up to the largest one's size, or this much.
SHARD_BYTES = 256 << 20


def from_hf(source: str, destination: str, console: Console | None = None) -> ModelConfig:
    """Writes a run's folder, at step 0, from a published model.

    `generate` and `eval` take the folder as it is; `train` starts from it.

    Args:
        source: a folder with config.json and safetensors, or a hub name.
        destination: a folder that doesn't exist yet, or is empty.
        console: where to say what was done.

    Raises:
        UserError: what the source lacks or what isn't known of it; nothing is written then.
    """
    console = console or Console()
    folder = find(source)
    config = read_json(folder / "config.json")
    family = family_of(str(config.get("model_type")))
    with _beside(destination) as target, Tensors(folder) as tensors:
        model = read_config(config, tensors.names)
        dtypes = {tensors.dtype(name) for name in tensors.names}
        params = weights.load(model, family, tensors)
        stored = next((_STORED[d] for d in dtypes if d in _STORED), "float32")
        meta = {
            "model": model_identity(model),
            "params_only": True,
            "published": {"model_type": config["model_type"], "dtype": stored},
        }
        with Checkpointer(target / FOLDER) as checkpoints:
            checkpoints.save(0, {"params": params}, meta)
        _keep_files(folder, target / PUBLISHED)
        _write_gin(model, target, Path(destination).absolute(), str(config["model_type"]))
    total = parameters.count(model)
    console.print(
        f"{destination}: {model.kind} {config['model_type']}, {total:,} parameters, from {source}",
        highlight=False,
    )
    return model


def to_hf(
    model: ModelConfig,
    model_dir: str,
    destination: str,
    step: int | None = None,
    dtype: str | None = None,
    console: Console | None = None,
) -> None:
    """Writes a folder that `transformers` loads, from a run's checkpoint.

    Args:
        model: the run's model.
        model_dir: the run's folder.
        destination: a folder that doesn't exist yet, or is empty.
        step: a checkpoint; None for the newest good one.
        dtype: of the tensors; None: as they were published, or float32.
        console: where to say what was done.

    Raises:
        UserError: no family has such a model, or the folder can't be written.
    """
    console = console or Console()
    config, stored = _config(model, Path(model_dir) / PUBLISHED / "config.json")
    dtype = dtype or stored or "float32"
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    family = family_of(config["model_type"])
    model = parameters.scanned(model)
    with _beside(destination) as target:
        params, step = restore_params(model, model_dir, step)
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        write_tensors(target, _cast(model, family, params, dtype), max(SHARD_BYTES, largest))
        config |= {"dtype": dtype}
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name in TOKENIZER_FILES:
            file = Path(model_dir) / PUBLISHED / name
            if file.is_file():
                shutil.copyfile(file, target / name)
    console.print(f"{destination}: {config['architectures'][0]}, step {step}, {dtype}",
                  highlight=False)  # fmt: skip


def _cast(model: ModelConfig, family: Family, params: Any, dtype: str):
    for name, value in weights.save(model, family, params):
        yield name, value.astype(DTYPES[dtype])


def _config(model: ModelConfig, published: Path) -> tuple[dict[str, Any], str | None]:
    """The config.json to write, and the dtype that the tensors were published in, if they were."""
    if not published.is_file():
        return write_config(model), None
    config = read_json(published)
    stored = config.get("dtype") or config.get("torch_dtype")
    config.pop("torch_dtype", None)
    return config, stored


def _write_gin(model: ModelConfig, target: Path, final: Path, model_type: str) -> None:
    """model.gin: the model, for runs on it; config.gin: all that a verb needs."""
    plain = dataclasses.replace(model, dtype="float32")
    (target / "model.gin").write_text(
        f"# A {model_type} model, as its config.json describes it.\n"
        "from __gin__ import dynamic_registration\n\n" + gin_text("MODEL", plain)
    )
    (target / "config.gin").write_text(
        "from __gin__ import dynamic_registration\n\n"
        "include 'gin_configs/runs/verbs.gin'\n"
        f"include 'gin_configs/tasks/{TASKS[model.kind]}.gin'\n"
        f"include '{final / 'model.gin'}'\n"
    )


def _keep_files(folder: Path, kept: Path) -> None:
    kept.mkdir()
    for name in ("config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, kept / name)


@contextlib.contextmanager
def _beside(destination: str) -> Iterator[Path]:
    """A folder beside `destination` that takes its place when all is written, or is removed.

    Raises:
        UserError: something is there already, or can't be written.
    """
    final = Path(destination).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{destination} is there already; give another folder or remove it.")
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            if final.exists():
                final.rmdir()
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror or error}.") from error
