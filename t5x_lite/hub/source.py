"""A published model's folder: config.json and safetensors, sharded or not. No pickle is loaded."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.hub.extra import require

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("float32", "float16", "bfloat16", "float64")


def find(source: str) -> Path:
    """The folder of a model: `source` itself, or a hub name's, downloaded or cached.

    Raises:
        UserError: neither a folder nor a name that the hub has or that is cached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source} isn't a folder with config.json and safetensors.")
    hub = require("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(
                source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:  # the hub's errors have no common class besides OSError, ValueError
        why = str(error).strip().splitlines()[0]
        raise UserError(f"{source} is no folder here, and the hub didn't give it: {why}") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        UserError: no such file, or no object in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} isn't JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object.")
    return value


class Tensors(contextlib.AbstractContextManager):
    """The tensors of a folder by name, read one at a time from mapped files.

    Raises:
        UserError: no safetensors, a missing shard, a file that is truncated or corrupt.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = contextlib.ExitStack()
        safetensors = require("safetensors")
        self._error = safetensors.SafetensorError
        self._open, self._where = {}, {}
        for name in _shards(folder):
            try:
                file = self._files.enter_context(
                    # Read, not mapped: pages of a mapped file stay in memory until it is closed.
                    safetensors.safe_open(str(folder / name), framework="numpy", backend="pread")
                )
            except (self._error, OSError) as error:
                self._files.close()
                raise UserError(f"{folder / name} is truncated or corrupt: {error}") from error
            for tensor in file.keys():  # noqa: SIM118 - not a dict
                self._where[tensor], self._open[tensor] = name, file

    def __exit__(self, *_):
        self._files.close()

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; reads nothing else."""
        return tuple(self._open[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype in safetensors' words, such as F32 or BF16; reads nothing else."""
        return self._open[name].get_slice(name).get_dtype()

    def place(self, name: str) -> str:
        """The tensor and its file, for messages."""
        return f"{name} in {self.folder / self._where[name]}"

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored.

        Raises:
            UserError: it isn't of a float dtype, or can't be read.
        """
        try:
            value = self._open[name].get_tensor(name)
        except (self._error, TypeError, AttributeError) as error:
            raise UserError(f"{self.place(name)} cannot be read: {error}") from error
        if value.dtype.name not in FLOATS:
            raise UserError(
                f"{self.place(name)} is {value.dtype.name}; weights must be {', '.join(FLOATS)}: "
                "dequantise the checkpoint first."
            )
        return value


def _shards(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{folder} has only {', '.join(pickles)}, which is a pickle and could run code: "
                'never loaded here. Convert it where you trust it: python -c "from transformers '
                "import AutoModel; AutoModel.from_pretrained('SRC').save_pretrained('DST')\", with "
                "the class that config.json names."
            )
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}.")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, Mapping):
        raise UserError(f"{folder / INDEX} has no weight_map.")
    shards = sorted(set(names.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        tensor = next(t for t, name in names.items() if name == missing[0])
        raise UserError(
            f"{folder} lacks {', '.join(missing)}, which holds {tensor}; download it again."
        )
    return shards


def write_tensors(
    folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Writes tensors as safetensors, in files of at most `shard_bytes` (or one tensor).

    Holds the tensors of one file at a time.
    """
    numpy = require("safetensors.numpy")
    shards: list[tuple[list[str], int]] = []
    held: dict[str, np.ndarray] = {}

    def flush():
        number = len(shards)
        size = sum(value.nbytes for value in held.values())
        numpy.save_file(held, folder / f"{number}.part", metadata={"format": "pt"})
        shards.append((list(held), size))
        held.clear()

    for name, value in tensors:
        if held and sum(v.nbytes for v in held.values()) + value.nbytes > shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(value)
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for number, (names, _) in enumerate(shards):
        final = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.part").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    total = sum(size for _, size in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
