"""The `flops` verb: a model's parameters, FLOPs and memory, counted before anything runs.

FLOPs are those of the very program, traced from shapes alone and read product by product
(`aot.count`), so that they are right for every family; each product is filed under the module that
it stands in. Beside them stand the conventions that scaling laws are written in. Seconds, whatever
the size; no data, no vocabulary, no accelerator.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from t5x_lite import losses, optim, schedules
from t5x_lite.aot.chips import named
from t5x_lite.data.tasks import Trainable
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.attention import AttentionConfig
from t5x_lite.nn.config import ModelConfig, StackConfig, compiled
from t5x_lite.nn.mla import MLAConfig
from t5x_lite.optim import Optimizer, path_name
from t5x_lite.scaling import counted
from t5x_lite.scaling.work import count_work, lengths_of, row_cache, row_shapes
from t5x_lite.types import Batch, PyTree


def count_model(
    model: ModelConfig,
    *,
    task: Trainable | None = None,
    length: int | None = None,
    target_length: int | None = None,
    loss: losses.Loss | None = None,
    optimizer: Optimizer | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    tokens: float | int | None = None,
    chip: str | None = None,
    chips: int = 1,
    mfu: float | int = 0.4,
    json_file: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Counts a model, prints the tables, and returns what they say.

    Args:
        model: its config.
        task: what gives the batches their entries, and a decoder's length beside an encoder; needs
            no data.
        length: tokens a row, of an encoder-decoder's encoder; None: as many as the model has
            learned positions, or `work.LENGTH`.
        target_length: of an encoder-decoder's decoder; None: the task's, or `length`.
        loss: whose program is counted; None: cross-entropy where the head predicts tokens.
        optimizer: whose state is counted beside those of AdamW and Adafactor.
        steps: of the training.
        batch_size: rows of a step.
        tokens: D, of the whole training, on both sides; None: of `steps` times `batch_size` rows.
        chip: the name of one in `aot.chips`.
        chips: how many of it.
        mfu: the share of their peak that the training's FLOPs are done at.
        json_file: where to write the numbers, too.
        console: where to print.

    Returns:
        Every number that is printed, as docs/counting.md lists them.

    Raises:
        UserError: a length that the model doesn't take, FLOPs that can't be counted, an unknown
            chip, or a number out of its range.
    """
    _check(length=length, target_length=target_length, tokens=tokens, chips=chips, mfu=mfu)
    if mfu > 1:
        raise UserError(f"mfu={mfu} is a share of the chips' peak; give one of at most 1.")
    if target_length is not None and model.kind != "encoder-decoder":
        raise UserError(f"target_length={target_length} is of a decoder beside an encoder, but the "
                        f"model is {model.kind}; leave it out.")  # fmt: skip
    speed = None if chip is None else chips * mfu * named(chip).peak["bfloat16"]
    # Scanned layers are traced once; the plain kernel is the one whose every product shows.
    plain = compiled(parameters.scanned(model), "plain")
    if loss is None and model.predicts in losses.CrossEntropy.heads:
        loss = losses.CrossEntropy()
    batch = row_shapes(plain, task, length, target_length)
    work = count_work(plain, loss, batch)
    sizes = parameter_counts(model)
    report = {
        "family": model.kind,
        "tokens": _tokens(model, batch),
        "parameters": sizes,
        "flops": work,
        "conventions": _conventions(model, sizes, work, batch),
        "memory": _memory(model, optimizer, lengths_of(model, batch)),
    }
    if tokens is None and steps is not None and batch_size is not None:
        tokens = steps * batch_size * report["tokens"]["row"]
    if tokens is not None or speed is not None:
        where = {} if chip is None else {"chip": chip, "chips": chips, "mfu": mfu}
        per_token = report["conventions"]["exact"]["per_token"]
        report["training"] = where | _training(per_token, tokens, speed)
    counted.show(report, console or Console(width=None if Console().is_terminal else 120))
    if json_file is not None:
        _write(json_file, report)
    return report


def _check(**numbers: float | int | None) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value} must be above 0 and finite.")


def _write(file: str, report: Mapping[str, Any]) -> None:
    try:
        Path(file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; give another --json.") from error


def _tokens(model: ModelConfig, batch: Batch) -> dict[str, int]:
    lengths = lengths_of(model, batch)
    return {**lengths, "row": sum(lengths.values())}


# --- parameters


def parameter_counts(model: ModelConfig) -> dict[str, Any]:
    """Parameters in all, and by class; `active`: those that one token meets.

    Rows that pad the vocabulary don't count, nor do buffers, as in `parameters.count`.
    `non_embedding`: without tables of the vocabulary, of positions and of segments (Kaplan et al.
    2020, §2.1); a head of its own is one of the vocabulary's.
    """
    classes: dict[str, dict[str, int]] = {}
    outside = 0
    for path, names, size in _leaves(model):
        share = _share_of_experts(model) if "expert" in names else 1.0
        found = classes.setdefault(_class(path), {"total": 0, "active": 0})
        found["total"] += size
        found["active"] += round(size * share)
        outside += 0 if _TABLES & set(names) else size
    return {
        **{key: sum(each[key] for each in classes.values()) for key in ("total", "active")},
        "non_embedding": outside,
        "by_class": classes,
    }


def _leaves(model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Each trainable parameter's path, logical axes and size as published."""
    shapes, axes = parameters.abstract(parameters.scanned(model))
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(shapes),
        jax.tree.leaves(axes, is_leaf=parameters.is_axes),
        strict=True,
    ):
        if path[-1].key not in parameters.BUFFERS:
            size = math.prod(parameters.published_shape(model, leaf.shape, names))
            yield path_name(path), names, size


_TABLES = {"vocab", "positions", "token_types"}
_CLASSES = (  # of a parameter, by the first that its path holds
    (r"norm/", "norms"),
    (r"(^|/)embedder/|positions/|input_projection/", "embedding"),
    (r"^head/", "head"),
    (r"/cross_attention/", "cross-attention"),
    (r"/attention/", "attention"),
    (r"/router/", "router"),
    (r"/experts/", "experts"),
    (r"/(ffn|shared)(_\d+)?/", "feed-forward"),
)


def _class(path: str) -> str:
    return next((name for pattern, name in _CLASSES if re.search(pattern, path)), "other")


def _share_of_experts(model: ModelConfig) -> float:
    mixtures = (getattr(block, "ffn", None) for block in model.main.blocks)
    mixture = next(ffn for ffn in mixtures if hasattr(ffn, "router"))
    return mixture.router.top_k / mixture.experts


# --- conventions


def _conventions(
    model: ModelConfig, sizes: Mapping[str, Any], work: Mapping[str, Any], batch: Batch
) -> dict[str, Any]:
    """Training FLOPs a token as others count them, and how many times that the program's are.

    `6n`: 6 · all parameters (Brown et al. 2020, appendix D; Hoffmann et al. 2022, appendix F).
    `6n_active`: of those that a token meets. `kaplan`: 3 · (2N + 2 · n_layer · n_ctx · d_attn), N
    without embeddings (Kaplan et al. 2020, table 1). `by_side`, of encoder-decoders: 6 · (D_enc ·
    N_enc + D_dec · N_dec), the vocabulary's kernel being the decoder's, and the encoder's what
    makes keys and values of its outputs.
    """
    lengths = lengths_of(model, batch)
    row = sum(lengths.values())
    idle = sizes["total"] - sizes["active"]
    attended = sum(n**2 * _width(getattr(model, name)) for name, n in lengths.items())
    if len(lengths) == 2:
        attended += math.prod(lengths.values()) * _width(model.decoder, "cross_attention")
    found = {
        "6n": 6.0 * sizes["total"],
        "6n_active": 6.0 * sizes["active"],
        "kaplan": 6.0 * (sizes["non_embedding"] - idle + attended / row),
    }
    if len(lengths) == 2:
        found["by_side"] = 6.0 * _met(model, lengths) / row
    exact = work["training"] / row
    return {
        name: {"per_token": value, "exact_is": exact / value} for name, value in found.items()
    } | {"exact": {"per_token": exact, "exact_is": 1.0}}


def _width(stack: StackConfig, kind: str = "attention") -> float:
    """n_layer · d_attn: all layers' heads times their size, of queries and values on average."""
    found = filter(None, (getattr(block, kind, None) for block in stack.blocks))
    return sum(each.heads * sum(_head_dims(each)) / 2 for each in found)


def _head_dims(attention: AttentionConfig | MLAConfig) -> tuple[int, int]:
    """Of queries and keys, and of values."""
    if isinstance(attention, MLAConfig):
        return attention.content_dim + attention.rotary_dim, attention.value_dim
    return attention.head_dim, attention.head_dim


def _met(model: ModelConfig, lengths: Mapping[str, int]) -> int:
    """Parameters times the tokens of a row that meet them, in an encoder-decoder."""
    total = lengths["decoder"] * model.vocab_size * model.width
    for path, names, size in _leaves(model):
        of_encoder = path.startswith("encoder/") or re.search("/cross_attention/(key|value)/", path)
        if not _TABLES & set(names):
            total += size * lengths["encoder" if of_encoder else "decoder"]
    return total


# --- memory and time


def _memory(
    model: ModelConfig, optimizer: Optimizer | None, lengths: Mapping[str, int]
) -> dict[str, Any]:
    """Bytes, on all devices together: of parameters and gradients, by dtype, and of states."""
    shapes, axes = parameters.abstract(parameters.scanned(model))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    rate = schedules.constant(1e-3)
    found = {
        "AdamW": optim.AdamW(rate),
        "AdamW, moments in bfloat16": optim.AdamW(rate, moment_dtype="bfloat16"),
        "Adafactor": optim.Adafactor(rate),
    } | ({} if optimizer is None else {"this run's": optimizer})
    states = {
        name: _bytes(jax.eval_shape(each.build(axes).init, shapes)) for name, each in found.items()
    }
    memory = {
        "parameters": {"float32": 4 * count, "bfloat16": 2 * count},
        "gradients": {"float32": 4 * count, "bfloat16": 2 * count},
        "optimizer_state": states,
    }
    if model.decoder is not None:
        memory["cache_of_a_row"] = _bytes(row_cache(model, lengths).layers)
    return memory


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _training(
    per_token: float, tokens: float | int | None, speed: float | None
) -> dict[str, float | int]:
    """FLOPs of a training of so many tokens, and how long it takes."""
    found = {} if tokens is None else {"tokens": tokens, "flops": tokens * per_token}
    if speed is not None:
        found |= {"flops_per_second": speed, "tokens_per_day": 86400 * speed / per_token}
    if tokens is not None and speed is not None:
        found["hours"] = tokens * per_token / speed / 3600
    return found
