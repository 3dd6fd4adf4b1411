"""The `compile` verb: a run's program compiled for TPUs that aren't there, and what it would cost.

What the compiler says of its program is exact: memory, collectives, whether it fits. Times are
modelled (roofline.py), never measured.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from t5x_lite.aot import figures, remedies
from t5x_lite.aot import topology as topologies
from t5x_lite.aot.programs import eval_program, generate_program
from t5x_lite.aot.report import show
from t5x_lite.aot.topology import Topology
from t5x_lite.data.converters import Shapes
from t5x_lite.data.pipeline import Batches
from t5x_lite.data.tasks import Trainable
from t5x_lite.errors import UserError
from t5x_lite.losses import CrossEntropy, Loss
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.quantized import QuantizedTraining
from t5x_lite.optim import Optimizer
from t5x_lite.partitioning import MeshConfig, Rules, Sharding
from t5x_lite.train import executable as stored
from t5x_lite.train.layout import check_layout, lengths_of
from t5x_lite.train.loop import check_shapes
from t5x_lite.train.meter import batch_tokens, model_flops
from t5x_lite.train.program import Program, train_program
from t5x_lite.train.step import check_batch

VERBS = ("train", "eval", "generate")
HERE = "here"  # instead of a topology: this process's own devices


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a program is compiled from: a run's arguments, on a topology's mesh."""

    model: ModelConfig
    optimizer: Optimizer
    loss: Loss
    shapes: Shapes
    length: int
    mesh: MeshConfig
    sharding: Sharding
    microbatches: int
    ema_decay: float | int | None
    quantized: QuantizedTraining | None
    correction_rate: float | int
    max_tokens: int

    @property
    def rows(self) -> int:
        """Of a batch."""
        return next(iter(self.shapes.values()))[0][0]

    def program(self, verb: str) -> Program:
        """The one that `verb` runs."""
        if verb == "generate":
            sizes = (self.rows, self.length, self.max_tokens)
            return generate_program(self.model, self.sharding, *sizes)
        if verb == "eval":
            return eval_program(self.model, self.loss, self.sharding, self.shapes)
        return train_program(
            *(self.model, self.optimizer, self.loss, self.sharding, self.shapes),
            microbatches=self.microbatches,
            ema_decay=self.ema_decay,
            quantized=self.quantized,
            correction_rate=self.correction_rate,
        )


def compile_step(
    *,
    model: ModelConfig,
    task: Trainable,
    batch_size: int,
    length: int,
    optimizer: Optimizer,
    topology: str,
    verb: str = "train",
    loss: Loss = CrossEntropy(),  # noqa: B008 - frozen
    microbatches: int = 1,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 - frozen
    rules: str | Rules = "fsdp",
    pipeline_microbatches: int | None = None,
    ema_decay: float | int | None = None,
    quantized: QuantizedTraining | None = None,
    correction_rate: float | int = 1e-3,
    max_tokens: int = 64,
    json_file: str | None = None,
    save: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compiles the program that a verb runs for a TPU topology, and prints what it would cost.

    Needs neither a TPU nor data.

    Args:
        model: as in `train`, like all that isn't said here.
        task: what gives the batches their entries.
        batch_size: rows a batch; with verb "generate", prompts at once.
        length: tokens a row; with verb "generate", of prompt and answer together.
        optimizer: whose step is compiled.
        topology: the cloud's name of the TPU slice, such as v5p-128, or of several, 2xv5e-256; or
            "here", the devices of this process, of which only memory is known: to `save`.
        verb: whose program: "train", "eval" or "generate".
        loss: the training loss.
        microbatches: parts of a batch.
        mesh: devices along each mesh axis.
        rules: which mesh axes split what.
        pipeline_microbatches: parts that follow each other through stages.
        ema_decay: of an average of the parameters.
        quantized: which products are of small integers.
        correction_rate: of routers' corrections.
        max_tokens: with verb "generate", how many a row is given.
        json_file: where to write what is printed, as JSON.
        save: where to write the executable of a training step, for `train --executable`.
        console: where to print.

    Returns:
        What `json_file` would hold: see docs/compile.md.

    Raises:
        UserError: an unknown topology, no TPU compiler, a mesh, model or batch that don't fit the
            topology, or a program that doesn't fit its chips' memory.
    """
    if verb not in VERBS:
        raise UserError(f"no program of verb {verb!r}; there are {', '.join(VERBS)}.")
    if save is not None and verb != "train":
        raise UserError(f"--save stores training steps, not --verb {verb}.")
    console = console or Console(width=None if Console().is_terminal else 200)
    target = None if topology == HERE else topologies.find(topology)
    if target is not None and mesh.slices != target.slices:
        raise UserError(
            f"mesh {mesh} has {mesh.slices} parts across slices, and {topology} has "
            f"{target.slices}; set dcn_replica={target.slices} or another dcn_… axis."
        )
    devices = None if target is None else target.devices()
    sharding = Sharding(mesh.build(devices), rules, pipeline_microbatches)
    check_batch(batch_size, microbatches, sharding)
    task = task.for_family(model.kind)
    batches = task.batches("train", batch_size=batch_size, length=length, seed=0)
    check_shapes(model, task, batches, loss)
    check_layout(model, sharding, batch_size // microbatches, lengths_of(batches.shapes))
    setting = Setting(
        *(model, optimizer, loss, batches.shapes, length, mesh, sharding),
        *(microbatches, ema_decay, quantized, correction_rate, max_tokens),
    )
    if target is None:
        return _store_here(setting.program(verb), save, console)
    report = {
        **{"verb": verb, "topology": topology, "chip": target.kind, "chips": target.chips},
        **{"mesh": dict(sharding.mesh.shape), "slices": target.slices},
        "rules": str(sharding.table),
    }
    what = f"compiling {verb} of {parameters.count(model):,} parameters for {topology}"
    with console.status(f"{what}, {target.chips} chips"), uncached():
        report |= compiled(setting, batches, verb, target, save)
    if json_file is not None:
        _write(json_file, report)
    if not report["fits"]:
        raise UserError(_refusal(report, setting, verb))
    show(report, console)
    if save is not None:
        console.print(_stored(save), highlight=False, soft_wrap=True)
    return report


def _store_here(program: Program, save: str | None, console: Console) -> dict[str, Any]:
    """Compiles for the devices of this process, and stores what it gets."""
    if save is None:
        raise UserError("--topology here needs --save FILE: without a TPU's figures there is "
                        "nothing to model.")  # fmt: skip
    began = time.perf_counter()
    with uncached():
        lowered = program.lower()
        executable = lowered.compile()
    seconds = time.perf_counter() - began
    stored.save(save, program, lowered, executable)
    console.print(f"compiled in {seconds:.1f} s", _stored(save), sep="\n", highlight=False)
    return {"topology": HERE, "compile_seconds": seconds}


def _stored(file: str) -> str:
    size = Path(file).stat().st_size
    return f"stored {file}, {size / 2**20:.1f} MiB: the same run with `train --executable {file}`"


def compiled(
    setting: Setting, batches: Batches, verb: str, target: Topology, save: str | None = None
) -> dict[str, Any]:
    """The report's figures; of a program that doesn't fit, only those of its memory.

    One that fits is stored in `save`.
    """
    program = setting.program(verb)
    began = time.perf_counter()
    traced = program.function.trace(*program.inputs)
    lowered = traced.lower()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(
                f"the compiler fails on this program, a fault of its own: "
                f"{str(error).splitlines()[0]}; other RULES, mesh or MICROBATCHES may avoid it."
            ) from error
        return {
            "hbm": figures.refused(str(error), target.chip),
            "fits": False,
            "compile_seconds": time.perf_counter() - began,
        }
    seconds = time.perf_counter() - began
    memory = figures.memory(executable, target.chip)
    if verb == "train":
        memory["activations"] = remedies.held(setting)[1]
    if save is not None and memory["total"] <= memory["capacity"]:
        stored.save(save, program, lowered, executable)
    turns = setting.max_tokens - 1 if verb == "generate" else None
    costs = figures.costs(
        *(executable.as_text(), traced.jaxpr, turns, setting.mesh, setting.sharding),
        *(target, setting.model.dtype),
    )
    written = setting.rows * setting.max_tokens
    work = _model_flops(setting, verb, costs["matmul_flops"])
    peak = target.chips * target.chip.peak["bfloat16"]
    return {
        **{"hbm": memory, "fits": memory["total"] <= memory["capacity"], **costs},
        "model_flops": work,
        "tokens": written if verb == "generate" else batch_tokens(batches),
        "mfu": work / peak / costs["step_seconds"],
        "compile_seconds": seconds,
    }


def _model_flops(setting: Setting, verb: str, counted: int) -> int:
    """FLOPs that the step is for: without what is computed twice, or for padding."""
    if verb == "generate":
        return counted
    whole = model_flops(setting.model, setting.loss, setting.shapes)
    return whole if verb == "train" else whole // 3


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Without the compilation cache, which can't load a TPU's program again and says so."""
    from jax.experimental.compilation_cache import compilation_cache

    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether there is one is asked only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()


def _write(file: str, report: dict[str, Any]) -> None:
    try:
        Path(file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; give another --json.") from error


def _refusal(report: dict[str, Any], setting: Setting, verb: str) -> str:
    """By how much it doesn't fit, and what would."""
    hbm, gib = report["hbm"], 2**30
    over = hbm["total"] - hbm["capacity"]
    said = (
        f"{verb} doesn't fit {report['topology']}: a chip needs {hbm['total'] / gib:.2f} GiB and "
        f"has {hbm['capacity'] / gib:.2f}, {over / gib:.2f} too few"
    )
    if verb == "train":
        return f"{said}; {remedies.nearest(setting, over)}."
    return f"{said}; lower BATCH_SIZE={setting.rows}, or split the model, by RULES='fsdp_tp'."
