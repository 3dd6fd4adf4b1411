"""The training loop: restore or begin, then step, log, evaluate and save until it is done."""

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from t5x_lite import distributed, flops
from t5x_lite.checkpoint import Checkpointer
from t5x_lite.data.pipeline import Batches, iterate
from t5x_lite.data.tasks import Trainable
from t5x_lite.errors import UserError
from t5x_lite.losses import CrossEntropy, Loss
from t5x_lite.metrics import MetricsLog, NoLog
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.quantized import QuantizedTraining
from t5x_lite.optim import Optimizer
from t5x_lite.partitioning import MeshConfig, Rules, Sharding
from t5x_lite.train import identity, profile
from t5x_lite.train.describe import mup_lines, print_parameters
from t5x_lite.train.evaluation import make_evaluate, on_mesh, rows_here
from t5x_lite.train.first_step import FirstStep
from t5x_lite.train.layout import check_layout, lengths_of, mesh_lines
from t5x_lite.train.meter import Meter, batch_tokens, model_flops
from t5x_lite.train.program import train_program
from t5x_lite.train.progress import Progress
from t5x_lite.train.restore import FOLDER, restore_or_init, resumed
from t5x_lite.train.state import to_tree
from t5x_lite.train.step import check_batch, model_apply


def train(
    *,
    model: ModelConfig,
    task: Trainable,
    model_dir: str,
    steps: int,
    batch_size: int,
    length: int,
    optimizer: Optimizer,
    seed: int = 0,
    loss: Loss = CrossEntropy(),  # noqa: B008 - frozen
    microbatches: int = 1,
    eval_period: int | None = None,
    eval_batches: int | None = None,
    checkpoint_period: int | None = None,
    log_period: int = 10,
    keep_last: int = 3,
    keep_every: int | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 - frozen
    rules: str | Rules = "fsdp",
    pipeline_microbatches: int | None = None,
    ema_decay: float | int | None = None,
    quantized: QuantizedTraining | None = None,
    correction_rate: float | int = 1e-3,
    peak_flops: float | int | None = None,
    init_from: str | None = None,
    allow_data_change: bool = False,
    config_text: str = "",
    profile_steps: str | None = None,
    executable: str | None = None,
) -> None:
    """Trains `model` on `task` for `steps` updates, from the newest good checkpoint on.

    A run that is killed and started again is bitwise the run that was not. Ctrl-C and SIGTERM
    finish the step, save and stop.

    Args:
        model: the model's config.
        task: what it learns from which text, a task or a mixture; prepared by `data prepare`.
        model_dir: for checkpoints, metrics.jsonl and the record of the run.
        steps: updates in all.
        batch_size: rows a batch, over all devices and microbatches.
        length: tokens a row; of an encoder-decoder, the encoder's.
        optimizer: AdamW or Adafactor with a schedule, or either under MuP.
        seed: of parameters, data order, noise and dropout.
        loss: the training loss.
        microbatches: parts of a batch that are computed one after the other to save memory.
        eval_period: updates between evaluations on the validation split; None for none.
        eval_batches: batches of each evaluation; None for the whole split.
        checkpoint_period: updates between checkpoints; None for the last step's only.
        log_period: updates between lines of metrics.jsonl.
        keep_last: newest checkpoints to keep.
        keep_every: checkpoints at multiples of it are kept for ever.
        mesh: devices along each mesh axis.
        rules: which mesh axes split what: parts of `partitioning.PARTS`, joined by "_".
        pipeline_microbatches: parts of a microbatch that follow each other through the stages of
            rules with "pp", a multiple of the stages; None: two for each stage, or one.
        ema_decay: of an exponential moving average of the parameters, which then is what is
            evaluated and served; None for none.
        quantized: which products of the training step are of small integers; evaluation's are not.
        correction_rate: how far a step moves the corrections of routers that have some
            (`train.corrections`); 0 leaves them alone.
        peak_flops: of all devices together, FLOP/s, for the MFU; None: known or measured.
        init_from: the folder of another run, or of a converted model, whose parameters this one
            begins with. A converted model's own folder can be trained in as well.
        allow_data_change: go on where the data, its order or the vocabulary changed since the
            checkpoint: each task from as far into its epoch as it was.
        config_text: the gin configuration, kept beside and in the checkpoints.
        profile_steps: "A:B", the first and the last step to trace, into model_dir/profile.
        executable: a file of `compile --save`, whose step is run if it is this run's.

    Raises:
        UserError: sizes that don't fit, a checkpoint of another run, a loss that isn't finite.
    """
    first = FirstStep(executable)
    # --- check everything that needs no computation, before anything is written
    periods = {"eval_period": eval_period, "checkpoint_period": checkpoint_period}
    _check_positive(steps=steps, log_period=log_period, **periods)
    profiled = profile.steps_of(profile_steps, steps)
    sharding = Sharding(mesh.build(), rules, pipeline_microbatches)
    check_batch(batch_size, microbatches, sharding)
    task = task.for_family(model.kind)
    make_batches = functools.partial(
        task.batches, "train", batch_size=batch_size, length=length, seed=seed
    )
    batches = make_batches()
    check_fit(model, task, batches, loss)
    passes = check_layout(model, sharding, batch_size // microbatches, lengths_of(batches.shapes))
    program = train_program(
        *(model, optimizer, loss, sharding, batches.shapes),
        microbatches=microbatches,
        ema_decay=ema_decay,
        quantized=quantized,
        correction_rate=correction_rate,
    )
    held_out = eval_period and task.evaluations(
        batch_size=batch_size, length=length, batches=eval_batches
    )

    # --- restore or begin
    directory, console = Path(model_dir), Console(quiet=not distributed.is_first())
    with (
        Checkpointer(directory / FOLDER, keep_last=keep_last, keep_every=keep_every) as checkpoints,
        (MetricsLog if distributed.is_first() else NoLog)(directory) as log,
    ):
        meta = _meta(model, optimizer, seed, ema_decay, config_text)
        saved = checkpoints.read_meta()
        if saved is not None and saved.get("params_only"):  # written by `convert`, not by a run
            saved, init_from = None, model_dir
        elif saved is not None:
            init_from = None
            same = {part: meta[part] for part in ("model", "seed", "ema", "mup")}
            identity.require_same(saved, same, directory)
        state = restore_or_init(
            checkpoints, model, optimizer, sharding, seed, ema_decay is not None, init_from
        )
        start = int(state.step)
        if saved is not None:
            # Of the step that was restored, which may be older than the newest one.
            saved = checkpoints.read_meta(start)
            batches = resumed(make_batches, task, saved, start, directory, allow_data_change)
        data = {"data": batches.fingerprint, "vocabulary": task.load_vocabulary().fingerprint}
        distributed.require_same("data", json.dumps(data, indent=0, sort_keys=True))
        meta |= data
        log.cut_back(start)
        if start >= steps:
            console.print(f"done: {directory} is at step {start} of {steps}.", highlight=False)
            return
        if distributed.is_first():
            _write_record(directory, model, sharding, optimizer, config_text)

        # --- build what measures the step
        plain = model_apply(model, sharding)
        evaluate = held_out and make_evaluate(plain, loss, held_out, sharding)
        work = batch_tokens(batches), model_flops(model, loss, batches.shapes)
        peak, source = (peak_flops, "as given") if peak_flops else flops.peak_flops(jax.devices())
        meter = Meter(start, *work, peak)
        base_rng = jax.random.key(seed)

        # --- run
        lines = [
            f"{model.kind} model, {parameters.count(model):,} parameters, {model.dtype}",
            *mesh_lines(mesh, sharding),
            *distributed.notes(),
            *([passes] if passes else []),
            *mup_lines(optimizer),
            f"batch {batch_size} rows, {work[0]:,} tokens, {work[1] / 1e9:,.1f} GFLOP; "
            f"{batches.rows_per_epoch:,} rows an epoch",
            f"peak {peak / 1e9:,.0f} GFLOP/s ({source})",
            *batches.notes,
            f"{f'resuming at step {start}' if start else 'starting'}, {steps} steps in all",
        ]
        console.print(*lines, sep="\n", highlight=False)
        progress = Progress(steps, start, console, peak_flops=peak)
        rows = rows_here(sharding, batch_size)
        data = on_mesh(iterate(batches, start, rows=rows), sharding, rows, batch_size)
        agreement = distributed.StopAgreement(sharding.mesh)
        traces = profile.Profile(profiled, directory, meter.paused, progress.log)
        with progress, _finish_on_signal() as stopped, contextlib.closing(data), traces:
            train_step = first.ready(program, progress.log)
            for step in range(start + 1, steps + 1):
                batch = meter.wait_for(data)
                state, metrics = traces.run(step, train_step, state, batch, base_rng)
                if step == start + 1:
                    progress.log(first.done(metrics))
                meter.dispatched(metrics)
                # The row of the step before is read while this one runs.
                meter.flush(log, progress)
                asked = agreement(stopped())
                last = step == steps or asked
                if step % log_period == 0 or step == start + 1 or last:
                    meter.hold(step, metrics)
                if evaluate and (step % eval_period == 0 or step == steps):
                    meter.flush(log, progress)
                    with meter.paused():
                        row = evaluate(state.ema or state.params)
                    log.write(step, **row)
                    progress.update({"step": step, **row})
                if last or (checkpoint_period and step % checkpoint_period == 0):
                    # What a checkpoint's step has logged is on the disk before the checkpoint is.
                    meter.flush(log, progress)
                    with meter.paused():
                        position = {"cursors": batches.cursors(step)}
                        checkpoints.save(step, to_tree(state), meta | position)
                if last:
                    break
        checkpoints.wait()
        if step < steps:
            console.print(f"stopped and saved at step {step}; the same command resumes.")
            sys.exit(128 + asked)


def check_fit(model: ModelConfig, task: Trainable, batches: Batches, loss: Loss) -> None:
    """Raises `UserError` where the model can't learn the task, its lengths or its vocabulary."""
    check_shapes(model, task, batches, loss)
    vocabulary = task.load_vocabulary()
    if vocabulary.size > model.vocab_size:
        raise UserError(
            f"the vocabulary has {vocabulary.size} ids and the model {model.vocab_size}; set the "
            f"model's vocab_size to {vocabulary.size} or train a smaller tokenizer."
        )


def check_shapes(model: ModelConfig, task: Trainable, batches: Batches, loss: Loss) -> None:
    """`check_fit`, as far as it needs no data: all but the vocabulary."""
    _check_head(model, task, batches, loss)
    lengths = lengths_of(batches.shapes)
    model.check_lengths(lengths[0], lengths[-1])


def _check_head(model: ModelConfig, task: Trainable, batches: Batches, loss: Loss) -> None:
    name, head = type(loss).__name__, type(model.head).__name__
    heads = getattr(loss, "heads", (model.predicts,))
    if model.predicts not in heads:
        raise UserError(
            f"loss {name} is for a head that predicts {' or '.join(heads)}, and the model's {head} "
            f"predicts {model.predicts}; give the model another head or bind LOSS."
        )
    if hasattr(loss, "check_model"):
        loss.check_model(model)
    missing = [entry for entry in getattr(loss, "reads", ()) if entry not in batches.shapes]
    if missing:
        raise UserError(
            f"loss {name} reads {missing[0]}, which task {task.name} doesn't give; bind LOSS, or "
            f"choose another task."
        )
    for own in task.tasks():
        outputs = getattr(own.objective, "outputs", None)
        if outputs is not None and model.head.labels != outputs:
            raise UserError(
                f"task {own.name} has {outputs} labels and the model's {head} {model.head.labels}; "
                f"bind {head}.labels={outputs}."
            )


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name.upper()}={number} must be at least 1.")


def _meta(model, optimizer, seed, ema_decay, config_text) -> dict[str, Any]:
    """What a checkpoint says of its run, besides its data."""
    return {
        "model": identity.model_identity(model),
        "seed": seed,
        "ema": ema_decay is not None,
        "mup": identity.mup_identity(optimizer),
        "config": config_text,
    }


def _write_record(directory: Path, model, sharding, optimizer, config_text: str) -> None:
    """The configuration, the parameter table and the versions, beside the checkpoints."""
    versions = identity.environment()
    try:
        (directory / "config.gin").write_text(config_text, encoding="utf-8")
        with (directory / "parameters.txt").open("w", encoding="utf-8") as file:
            print_parameters(model, sharding, Console(file=file, width=200), (), optimizer)
        (directory / "environment.json").write_text(json.dumps(versions, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror}): give another model_dir."
        ) from error


@contextlib.contextmanager
def _finish_on_signal() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the number of a signal that asked to stop, or 0.

    A second Ctrl-C stops at once.
    """
    asked = [0]

    def handler(number, _):
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = number

    previous = {}
    # Python delivers signals to the main thread alone.
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    try:
        yield lambda: asked[0]
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
