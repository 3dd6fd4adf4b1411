"""The verbs `convert from-hf` and `convert to-hf`."""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from t5x_lite.checkpoint import write_one_by_one
from t5x_lite.data import imported
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError
from t5x_lite.hub import sentence, weights
from t5x_lite.hub.families import family_of, read_config, write_config
from t5x_lite.hub.gin_text import gin_text
from t5x_lite.hub.source import Tensors, find, read_json, write_tensors
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.train.identity import model_identity
from t5x_lite.train.restore import FOLDER, Stored

# In a converted run's folder: what stood beside the weights, to go out again with them.
PUBLISHED = "published"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"),
    *("merges.txt", "source.spm", "target.spm", "chat_template.jinja", "generation_config.json"),
)
CHATS = "additional_chat_templates"
DTYPES_FILE = "dtypes.json"
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
TASKS = {"decoder-only": "causal_lm", "encoder-only": "masked_lm",
         "encoder-decoder": "span_corruption"}  # fmt: skip
T = TypeVar("T")
EVAL_ROWS, EVAL_LENGTH = 8, 512  # what eval does with a converted model, if nothing else is said
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
        model = sentence.with_head(read_config(config, tensors.names), folder)
        vocabulary = _vocabulary(model, folder)
        params = _shown(weights.load(model, family, tensors), "tensors read", console)
        leaves = ((f"params/{path}", jax.device_put(leaf)) for path, leaf in params)
        meta = {
            "model": model_identity(model),
            "params_only": True,
            "published": {"model_type": config["model_type"]},
        }
        if vocabulary is not None:
            meta["vocabulary"] = vocabulary.fingerprint
        write_one_by_one(target / FOLDER, 0, leaves, meta)
        _keep_files(folder, target / PUBLISHED)
        (target / PUBLISHED / DTYPES_FILE).write_text(json.dumps(_dtypes(tensors)) + "\n")
        final = Path(destination).absolute()
        _write_gin(model, vocabulary, target, final, str(config["model_type"]))
    total = parameters.count(model)
    console.print(
        f"{destination}: {model.kind} {config['model_type']}, {total:,} parameters, from {source}",
        highlight=False,
        soft_wrap=True,
    )
    if vocabulary is None:
        console.print(
            f"{source} has no tokenizer.json or sentencepiece model; bind VOCABULARY to use the "
            "model on text.",
            highlight=False,
            soft_wrap=True,
        )
    return model


def _vocabulary(model: ModelConfig, folder: Path) -> Vocabulary | None:
    """The vocabulary that stands beside the weights, if one does.

    Raises:
        UserError: it can't be read, or the model has no row for some of its ids.
    """
    if imported.tokenizer_file(folder) is None:
        return None
    vocabulary = imported.load(folder)
    # More rows than ids are padding, which most published models have.
    if vocabulary.size > model.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {vocabulary.size} ids and the model's embedding "
            f"{model.vocab_size} rows; they aren't of one release: take the tokenizer's files from "
            "the model's own."
        )
    return vocabulary


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
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    published = Path(model_dir) / PUBLISHED
    file = published / "config.json"
    config = read_json(file) if file.is_file() else write_config(model)
    file = published / DTYPES_FILE
    if dtype is None and file.is_file():
        dtypes = read_json(file)
    else:
        dtypes = {"most": dtype or "float32", "others": {}}
    family = family_of(config["model_type"])
    model = parameters.scanned(model)
    with _beside(destination) as target, Stored(model, model_dir, step) as stored:
        tensors = weights.save(model, family, lambda path: np.asarray(stored.read(path)))
        tensors = _shown(tensors, "tensors written", console)
        most, others = dtypes["most"], dtypes["others"]
        cast = ((n, value.astype(DTYPES[others.get(n, most)])) for n, value in tensors)
        write_tensors(target, cast, SHARD_BYTES)
        config.pop("torch_dtype", None)  # what "dtype" was called before
        config |= {"dtype": most}
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        sentence.write(model, target)  # what was published takes its place
        _copy(Path(model_dir) / PUBLISHED, target, TOKENIZER_FILES)
    console.print(f"{destination}: {config['architectures'][0]}, step {stored.step}, {most}",
                  highlight=False, soft_wrap=True)  # fmt: skip


def _shown(items: Iterable[T], what: str, console: Console) -> Iterable[T]:
    """Counts on a terminal what goes by: many GB take minutes."""
    columns = (SpinnerColumn(), TextColumn("{task.completed} {task.description}"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        yield from p.track(items, description=what)


def _dtypes(tensors: Tensors) -> dict[str, Any]:
    """Of the published tensors: what most have, and which have another one, such as biases of
    routers, which stay float32 beside bfloat16."""
    dtypes = {name: _STORED.get(tensors.dtype(name), "float32") for name in tensors.names}
    most = collections.Counter(dtypes.values()).most_common(1)[0][0]
    return {"most": most, "others": {name: d for name, d in dtypes.items() if d != most}}


def _write_gin(
    model: ModelConfig, vocabulary: Vocabulary | None, target: Path, final: Path, model_type: str
) -> None:
    """model.gin: the model and its vocabulary, for runs on it; config.gin: all a verb needs."""
    plain = dataclasses.replace(model, dtype="float32")
    text = gin_text("MODEL", plain)
    if vocabulary is not None:
        text += (
            "\nfrom t5x_lite.data import vocabularies\n\n"
            "VOCABULARY = @vocabularies.Imported()\n"
            f"vocabularies.Imported.path = {str(final / PUBLISHED)!r}\n"
        )
    (target / "model.gin").write_text(
        f"# A {model_type} model, as its config.json describes it.\n"
        "from __gin__ import dynamic_registration\n\n" + text
    )
    known = getattr(model.main.positions, "max_length", EVAL_LENGTH)
    (target / "config.gin").write_text(
        "from __gin__ import dynamic_registration\n\n"
        "include 'gin_configs/runs/verbs.gin'\n"
        f"include 'gin_configs/tasks/{TASKS[model.kind]}.gin'\n"
        f"include '{final / 'model.gin'}'\n\n"
        f"BATCH_SIZE = {EVAL_ROWS}  # of eval\n"
        f"LENGTH = {min(EVAL_LENGTH, known)}\n"
    )


def _keep_files(folder: Path, kept: Path) -> None:
    kept.mkdir()
    _copy(folder, kept, ("config.json", *TOKENIZER_FILES))


def _copy(folder: Path, target: Path, names: Sequence[str]) -> None:
    """Those that are there, and those that describe a sentence embedding or further chats."""
    chats = [f"{CHATS}/{path.name}" for path in (folder / CHATS).glob("*.jinja")]
    for name in (*names, *chats, *sentence.files(folder)):
        if (folder / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)


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
