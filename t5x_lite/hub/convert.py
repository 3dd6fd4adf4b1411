"""The verbs `convert from-hf` and `convert to-hf`."""

import collections
import contextlib
import dataclasses
import itertools
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
from t5x_lite.data.tasks import Trainable
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError
from t5x_lite.hub import sentence, weights
from t5x_lite.hub.families import Family, family_of, read_config, without_training, write_config
from t5x_lite.hub.gin_text import gin_text
from t5x_lite.hub.source import Tensors, find, read_json, write_tensors
from t5x_lite.hub.tokenizer import EXACT, NEAREST, UnlikeError, write_imported
from t5x_lite.hub.tokenizer import write as write_own
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.train.identity import differences, model_identity, plain
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
UNREAD = "unread"  # in PUBLISHED: trained tensors of heads that the model here doesn't have
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


def from_hf(
    source: str,
    destination: str,
    architecture: str | None = None,
    console: Console | None = None,
) -> ModelConfig:
    """Writes a run's folder, at step 0, from a published model.

    `generate` and `eval` take the folder as it is; `train` starts from it.

    Args:
        source: a folder with config.json and safetensors, or a hub name.
        destination: a folder that doesn't exist yet, or is empty.
        architecture: the class of `transformers` to read it as, of several whose tensors are there
            (bert-base-uncased, a BertForMaskedLM, is a BertForPreTraining too); None: its own.
        console: where to say what was done.

    Raises:
        UserError: what the source lacks or what isn't known of it; nothing is written then.
    """
    console = console or Console()
    folder = find(source)
    config = read_json(folder / "config.json")
    if architecture is not None:
        config["architectures"] = [architecture]
    family = family_of(str(config.get("model_type")))
    with _beside(destination) as target, Tensors(folder) as tensors:
        model = read_config(config, tensors.names)
        if architecture is None:
            model = sentence.with_head(model, folder)
        elif family.config(model)["architectures"] != [architecture]:
            raise UserError(f"{folder} lacks tensors of {architecture}; leave --architecture out.")
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
        if architecture is not None:
            (target / PUBLISHED / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _keep_unread(weights.unread(model, family, tensors), target / PUBLISHED / UNREAD)
        form = {**_dtypes(tensors), "prefix": weights.left_out(model, family, tensors)}
        (target / PUBLISHED / DTYPES_FILE).write_text(json.dumps(form) + "\n")
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
            f"{source} has no tokenizer that is known here; bind VOCABULARY to use the model on "
            "text.",
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
    task: Trainable | None = None,
    tokenizer: str = EXACT,
    console: Console | None = None,
) -> None:
    """Writes a folder that `transformers` loads, from a run's checkpoint.

    Args:
        model: the run's model.
        model_dir: the run's folder.
        destination: a folder that doesn't exist yet, or is empty.
        step: a checkpoint; None for the newest good one.
        dtype: of the tensors; None: as they were published, or float32.
        task: what the run was trained on, for the tokenizer of one that wasn't converted.
        tokenizer: "exact": one whose ids are the run's, or none; "nearest": see hub/tokenizer.py.
        console: where to say what was done.

    Raises:
        UserError: no family has such a model, the task's vocabulary isn't the one trained with, or
            the folder can't be written.
    """
    console = console or Console()
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    if tokenizer not in (EXACT, NEAREST):
        raise UserError(f"tokenizer={tokenizer!r} must be {EXACT} or {NEAREST}.")
    published = Path(model_dir) / PUBLISHED
    file = published / "config.json"
    given = file.is_file()
    config = read_json(file) if given else write_config(model)
    family = family_of(config["model_type"])
    form = _form(model, family, published, dtype)
    model = parameters.scanned(model)
    if given:
        _require_published(model, config, published)
    vocabulary, why = (None, None) if given or task is None else _trained_with(task)
    fingerprint = None if vocabulary is None else vocabulary.fingerprint
    with (
        _beside(destination) as target,
        Stored(model, model_dir, step, vocabulary=fingerprint) as stored,
    ):
        more = _read_unread(published / UNREAD) if given else weights.unread_zeros(model, family)
        if dtype is not None:
            more = ((name, value.astype(DTYPES[dtype])) for name, value in more)
        tensors = itertools.chain(_parameters(model, family, stored, form), more)
        tensors = ((name.removeprefix(form["prefix"]), value) for name, value in tensors)
        write_tensors(target, _shown(tensors, "tensors written", console), SHARD_BYTES)
        most = form["most"]
        config.pop("torch_dtype", None)  # what "dtype" was called before
        config |= {"dtype": most}
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        sentence.write(model, target)  # what was published takes its place
        _copy(Path(model_dir) / PUBLISHED, target, TOKENIZER_FILES)
        if vocabulary is not None:
            why = _write_tokenizer(vocabulary, model, target, tokenizer, config["model_type"])
    if why is not None:
        console.print(f"no tokenizer is written: {why.rstrip('.')}.",
                      highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    name = (config.get("architectures") or [config["model_type"]])[0]
    console.print(f"{destination}: {name}, step {stored.step}, {most}",
                  highlight=False, soft_wrap=True)  # fmt: skip


def _trained_with(task: Trainable) -> tuple[Vocabulary | None, str | None]:
    """The vocabulary of a task, or why it isn't there: the weights go out without it."""
    try:
        return task.load_vocabulary(), None
    except UserError as error:
        return None, str(error)


def _write_tokenizer(
    vocabulary: Vocabulary, model: ModelConfig, target: Path, how: str, model_type: str
) -> str | None:
    """Writes a vocabulary's tokenizer, or says why none has its ids."""
    try:
        if not isinstance(vocabulary, imported.ImportedVocabulary):
            write_own(vocabulary, model, target, how)
        elif write_imported(vocabulary, target, model_type):
            _copy(vocabulary.folder, target, ("chat_template.jinja",))
        else:
            _copy(vocabulary.folder, target, TOKENIZER_FILES)
    except UnlikeError as error:
        return str(error)
    return None


def _require_published(model: ModelConfig, config: dict[str, Any], published: Path) -> None:
    """Raises `UserError` where what was published, and goes out again, is of another model."""
    names = weights.tensor_names(model, family_of(config["model_type"]))
    was = sentence.with_head(read_config(config, names), published)
    same = {"dtype": model.dtype, "vocab_multiple": model.vocab_multiple, "remat": model.remat}
    before, now = (plain(without_training(dataclasses.replace(m, **same))) for m in (was, model))
    changes = differences(before, now)
    if changes:
        raise UserError(
            f"{published} is of another model than the run's: {'; '.join(changes)}. Its "
            "config.json and the tensors kept beside it don't fit; move the folder away to export "
            "the run without them."
        )


def _shown(items: Iterable[T], what: str, console: Console) -> Iterable[T]:
    """Counts on a terminal what goes by: many GB take minutes."""
    columns = (SpinnerColumn(), TextColumn("{task.completed} {task.description}"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        yield from p.track(items, description=what)


def _form(model: ModelConfig, family: Family, published: Path, dtype: str | None) -> dict[str, Any]:
    """Of the tensors to write: their dtypes, and what their names leave out."""
    form = {"most": "float32", "others": {}, "prefix": weights.left_out(model, family)}
    file = published / DTYPES_FILE
    form |= read_json(file) if file.is_file() else {}
    return form if dtype is None else {**form, "most": dtype, "others": {}}


def _parameters(
    model: ModelConfig, family: Family, stored: Stored, form: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that hold a checkpoint's parameters, by their full names."""
    tensors = weights.save(model, family, lambda path: np.asarray(stored.read(path)), prefix="")
    for name, value in tensors:
        dtype = form["others"].get(name.removeprefix(form["prefix"]), form["most"])
        yield name, value.astype(DTYPES[dtype])


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
    text = gin_text("MODEL", dataclasses.replace(model, dtype="float32"))
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


def _keep_unread(tensors: Iterator[tuple[str, np.ndarray]], kept: Path) -> None:
    """In a folder of their own, if there are any."""
    first = next(tensors, None)
    if first is not None:
        kept.mkdir()
        write_tensors(kept, itertools.chain([first], tensors), SHARD_BYTES)


def _read_unread(kept: Path) -> Iterator[tuple[str, np.ndarray]]:
    """What `_keep_unread` wrote, one tensor at a time."""
    if kept.is_dir():
        with Tensors(kept) as tensors:
            for name in tensors.names:
                yield name, tensors.read(name)


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
