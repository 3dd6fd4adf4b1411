"""sentence-transformers' folders: what becomes of the last layer stands beside config.json.

modules.json lists steps: the transformer, how its tokens are pooled (1_Pooling/config.json),
whether the result is normalised. The other files say how text is cut, as a tokenizer's do.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from t5x_lite.errors import UserError
from t5x_lite.hub.source import read_json
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import SentenceEmbedding

MODULES = "modules.json"
OTHERS = ("config_sentence_transformers.json", "sentence_bert_config.json")
# Their name of a pooling, what it was called as a flag, ours.
MODES = {
    "cls": ("pooling_mode_cls_token", "first"),
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "lasttoken": ("pooling_mode_lasttoken", "last"),
    "max": ("pooling_mode_max_tokens", None),
    "mean_sqrt_len_tokens": ("pooling_mode_mean_sqrt_len_tokens", None),
    "weightedmean": ("pooling_mode_weightedmean_tokens", None),
}
_WIDTH = ("embedding_dimension", "word_embedding_dimension")  # now and before
_PACKAGE = "sentence_transformers.models"  # every version reads these names


def with_head(model: ModelConfig, folder: Path) -> ModelConfig:
    """The model with the head that a folder's modules.json describes; unchanged without that file.

    Raises:
        UserError: a step or a pooling that t5x_lite doesn't compute.
    """
    steps = _steps(folder)
    if not steps:
        return model
    names = [name for name, _ in steps]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder / MODULES} has the steps {', '.join(names)}; t5x_lite knows Transformer, "
            "Pooling and, if it is there, Normalize."
        )
    (_, body), (_, pooling), *rest = steps
    if body:
        raise UserError(f"the model of {folder / MODULES} stands in {body}; move it beside that "
                        "file.")  # fmt: skip
    mode = _pooling(folder / pooling / "config.json", model.width)
    return dataclasses.replace(model, head=SentenceEmbedding(mode, normalized=bool(rest)))


def files(folder: Path) -> list[str]:
    """Paths, relative to the folder, of the files that describe such a model; empty without any."""
    steps = _steps(folder)
    if not steps:
        return []
    inner = [f"{place}/config.json" for _, place in steps if place]
    return [name for name in (MODULES, *OTHERS, *inner) if (folder / name).is_file()]


def write(model: ModelConfig, folder: Path) -> None:
    """Writes the files of a `SentenceEmbedding`; for every other head, none."""
    head = model.head
    if not isinstance(head, SentenceEmbedding):
        return
    steps = {"Transformer": "", "Pooling": "1_Pooling"}
    steps |= {"Normalize": "2_Normalize"} if head.normalized else {}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_PACKAGE}.{name}"}
        for number, (name, path) in enumerate(steps.items())
    ]
    pooling = {flag: ours == head.pooling for flag, ours in MODES.values()}
    for path in steps.values():
        (folder / path).mkdir(exist_ok=True)
    _write_json(folder / MODULES, modules)
    _write_json(folder / "1_Pooling" / "config.json", {_WIDTH[1]: model.width, **pooling})


def _steps(folder: Path) -> list[tuple[str, str]]:
    """(class, folder) of each step; empty where there is no modules.json."""
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        steps = [(m["type"].rpartition(".")[2], m["path"]) for m in modules]
        plain = all(place == PurePosixPath(place).name != ".." for _, place in steps)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} isn't a list of steps with a type and a path: {error}.") from error
    if not plain:  # it also names what is copied
        raise UserError(f"{path} has a path that isn't a folder beside it.")
    return steps


def _pooling(path: Path, width: int) -> str:
    config = read_json(path)
    flags = {flag: mode for mode, (flag, _) in MODES.items()}
    known = {*flags, *_WIDTH, "pooling_mode", "include_prompt"}
    if set(config) - known:
        raise UserError(f"{path} has fields that t5x_lite doesn't know: "
                        f"{', '.join(sorted(set(config) - known))}.")  # fmt: skip
    if not config.get("include_prompt", True):
        raise UserError(f"{path} leaves a prompt's tokens out, which t5x_lite doesn't.")
    size = next((config[name] for name in _WIDTH if name in config), width)
    if size != width:
        raise UserError(f"{path} pools {size} numbers, but the model's width is {width}.")
    return _mode(path, config, flags)


def _mode(path: Path, config: Mapping[str, Any], flags: Mapping[str, str]) -> str:
    modes = config.get("pooling_mode", [mode for flag, mode in flags.items() if config.get(flag)])
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    ours = [MODES.get(mode, (None, None))[1] for mode in modes]
    if len(ours) != 1 or ours[0] is None:
        known = ", ".join(mode for mode, (_, pooling) in MODES.items() if pooling)
        raise UserError(f"{path} pools by {' and '.join(modes)}; t5x_lite knows one of {known}.")
    return ours[0]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
