"""Checkpoints: saved in the background, committed whole, proved bit by bit before they are used.

A checkpoint directory holds one folder per step, written by Orbax beside its place and renamed when
it is complete (so a killed process leaves at most a `*.orbax-checkpoint-tmp` folder):

    100/state/          the tensors, in Orbax's OCDBT store, each named by its path in the state
                        joined by "/": `params/decoder/layers/attention/query`
    100/meta/metadata   JSON: `format`, `step`, the caller's `meta`, and for each tensor its dtype,
                        its shape and a digest of its bits
    100/meta/files      JSON: size of every other file, and CRC-32 of the small ones
    100.bad, 100.superseded   set aside by a later save (see `Checkpointer.save`); never deleted

`FORMAT` is the number of this layout. A reader refuses a newer one; an older one must keep loading.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_lite import distributed, folders
from t5x_lite.errors import UserError
from t5x_lite.tensors import (
    Tree,
    UnusableError,
    difference,
    digest,
    flatten,
    gist,
    read,
    signature,
    unflatten,
    write,
)

FORMAT = 1  # the layout above


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held: its step, the tensors in the tree asked for, the caller's `meta`."""

    step: int
    tree: dict[str, Any]
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run: saves in the background, restores the newest good one.

    Args:
      directory: a local (or mounted) path; created unless `read_only`.
      keep_last: how many of the newest checkpoints stay.
      keep_every: checkpoints at multiples of this step stay for ever; None keeps none of them so.
      read_only: create, move and write nothing, for evaluation and generation.
      report: gets one line per unusable checkpoint and per folder set aside; stderr by default.

    Raises:
      UserError: the path is a file, another kind of directory, or cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        read_only: bool = False,
        report: Callable[[str], None] | None = None,
    ):
        for name, count in (("keep_last", keep_last), ("keep_every", keep_every)):
            if count is not None and count < 1:
                raise UserError(f"{name}={count} must be at least 1.")
        if "://" in os.fspath(directory):
            raise UserError(f"{directory} must be a local path; mount the bucket and name that.")
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_every, self._read_only = keep_last, keep_every, read_only
        self._report = report or distributed.report
        self._reported: set[str] = set()
        self._passed_over: set[int] = set()  # newer than the restored step, and unusable
        self._current: int | None = None  # the step that was restored or saved last
        self._in_flight: int | None = None
        self._writer = None  # Orbax's manager, made by the first save
        folders.check_directory(self.directory)
        if not read_only:
            folders.check_writable(self.directory)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            self._report(str(failure))  # the first error is the one to raise

    def all_steps(self) -> list[int]:
        """Steps whose files are complete, ascending. Their tensors have not been verified."""
        return [s for s in folders.steps(self.directory) if folders.fault(self._folder(s)) is None]

    def save(self, step: int, tree: Tree, meta: Mapping[str, Any]) -> None:
        """Starts to save `tree`; what it holds may be donated or changed as soon as this returns.

        Waits for the save before it. The step that was restored or saved last is not saved again.
        Folders at this step or beyond are in the way after an older step was restored: they are
        renamed to `<step>.bad` if they were found unusable and `<step>.superseded` if not.

        Args:
          step: number of updates done.
          tree: nested dict with str keys of jax arrays (no typed keys, no empty arrays).
          meta: JSON-able.

        Raises:
          UserError: this save, or the one before it in the background, could not be written.
        """
        if self._read_only:
            raise ValueError("a read-only Checkpointer cannot save")
        if step == self._current:
            return
        self.wait()
        leaves = flatten(tree)
        digests = digest(tree)
        tensors = {
            path: {**signature(leaf), "digest": digests[path]} for path, leaf in leaves.items()
        }
        record = {"format": FORMAT, "step": step, "meta": dict(meta), "tensors": tensors}
        json.dumps(record)  # a value that JSON lacks fails here, not in Orbax's thread
        self._in_flight = step
        with self._write_errors():
            self._start(step, leaves, record)
        self._current = step

    def wait(self) -> None:
        """Blocks until the save in the background is committed.

        Raises:
          UserError: it could not be written (a full disk); the checkpoints before it are intact.
        """
        if self._in_flight is not None:
            with self._write_errors():
                self._writer.wait_until_finished()
                self._writer.check_for_errors()
        self._in_flight = None

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads. Raises what `wait` raises."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def restore(
        self, like: Tree, step: int | None = None, *, partial: bool = False
    ) -> Restored | None:
        """The newest good checkpoint, or None where there is none at all.

        A checkpoint that is torn, damaged or of other tensors is reported in one line, left as it
        is, and the one before it is tried.

        Args:
          like: nested dict of `ShapeDtypeStruct` with shardings on any mesh.
          step: this step and no other.
          partial: accept tensors in the checkpoint that `like` doesn't name, and don't read them.

        Raises:
          UserError: no checkpoint (or not the one named) is usable, with each one's reason; or one
            was written in a newer format.
        """
        self.wait()
        self._drop_writer()
        steps = self._steps() if step is None else [self._existing(step)]
        faults: dict[int, str] = {}
        for candidate in reversed(steps):
            try:
                restored = self._load(candidate, like, partial)
            except UnusableError as error:
                faults[candidate] = str(error)
                continue
            self._report_faults(faults, candidate)
            self._passed_over, self._current = set(faults), candidate
            return restored
        self._refuse(faults)
        return None

    def read_meta(self, step: int | None = None) -> dict[str, Any] | None:
        """The caller's `meta` of one step, by default the newest complete one; None without any.

        Reads no tensors. Raises `UserError` as `restore` does.
        """
        record = self._newest_record(step)
        return None if record is None else record["meta"]

    def read_signatures(self, step: int | None = None) -> dict[str, dict[str, Any]]:
        """`tensors.signature` of every tensor of a step, by path; else as `read_meta`.

        {} without any step.
        """
        record = self._newest_record(step)
        names = ("shape", "dtype")
        tensors = {} if record is None else record["tensors"]
        return {path: {name: tensor[name] for name in names} for path, tensor in tensors.items()}

    def _newest_record(self, step: int | None) -> dict[str, Any] | None:
        self.wait()
        steps = self._steps() if step is None else [self._existing(step)]
        faults: dict[int, str] = {}
        for candidate in reversed(steps):
            try:
                record = _in_all_processes(functools.partial(self._record, candidate))
            except UnusableError as error:
                faults[candidate] = str(error)
                continue
            self._report_faults(faults, candidate)
            return record
        self._refuse(faults)
        return None

    # Reading.

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _steps(self) -> list[int]:
        """The steps that process 0 sees: a network file system may show others an older state."""
        return json.loads(distributed.exchange(json.dumps(folders.steps(self.directory)))[0])

    def _existing(self, step: int) -> int:
        if step not in self._steps():
            raise UserError(
                f"no checkpoint of step {step} in {self.directory}; there are {self.all_steps()}."
            )
        return step

    def _report_faults(self, faults: Mapping[int, str], used: int) -> None:
        for step, fault in faults.items():
            line = f"checkpoint {self._folder(step)}: {fault}; left as it is, using {used}"
            if line not in self._reported:
                self._reported.add(line)
                self._report(line)

    def _refuse(self, faults: Mapping[int, str]) -> None:
        if faults:
            by_fault: dict[str, list[str]] = {}
            for step, fault in faults.items():
                by_fault.setdefault(fault, []).append(str(step))
            why = "; ".join(f"step {', '.join(steps)}: {f}" for f, steps in by_fault.items())
            raise UserError(
                f"no usable checkpoint in {self.directory} ({why}): "
                "undo what changed the model or the files, or give another model_dir."
            )

    def _record(self, step: int) -> dict[str, Any]:
        fault = folders.fault(self._folder(step))
        if fault is not None:
            raise UnusableError(fault)
        try:
            record = json.loads((self._folder(step) / folders.RECORD).read_text("utf-8"))
            newer = record["format"] > FORMAT
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UnusableError(f"{folders.RECORD} cannot be read ({gist(error)})") from error
        if newer:
            raise UserError(
                f"checkpoint {self._folder(step)} has format {record['format']}, this version "
                f"reads up to {FORMAT}: update t5x_lite or give another model_dir."
            )
        return record

    def _load(self, step: int, like: Tree, partial: bool) -> Restored:
        wanted = flatten(like)

        def read_here() -> tuple[dict[str, Any], dict[str, jax.Array]]:
            record = self._record(step)
            mismatch = difference(record["tensors"], wanted, partial)
            if mismatch:
                raise UnusableError(mismatch)
            return record, dict(read(self._folder(step) / "state", wanted))

        # A digest takes the devices of all processes, so none may have given up before.
        record, arrays = _in_all_processes(read_here)
        for path, value in digest(arrays).items():
            if value != record["tensors"][path]["digest"]:
                raise UnusableError(f"{path} is not what was saved (its digest differs)")
        return Restored(step, unflatten(like, arrays), record["meta"])

    # Writing.

    def _start(self, step: int, leaves: dict[str, jax.Array], record: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        _quieten_orbax()
        if self._writer is None:
            self._clear_the_way(step)
            distributed.exchange("")  # no process writes before the way is clear
            self._writer = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep_last,
                    keep_period=self._keep_every,
                    lightweight_initialize=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
                ),
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(record)
        )
        self._writer.save(step, args=items, force=True)

    def _list_files(self) -> None:
        """Runs in Orbax's thread when all is written, just before the folder is committed."""
        if distributed.is_first():
            (folder,) = self.directory.glob(f"{self._in_flight}{folders.TEMPORARY}*")
            folders.list_files(folder)

    def _clear_the_way(self, step: int) -> None:
        """Sets aside what the first save would collide with; deletes what was never committed.

        A bad folder must not stay among the good ones: it would count as one of the last to keep.
        """
        if not distributed.is_first():
            return
        for path in folders.entries(self.directory):
            if folders.TEMPORARY in path.name:
                shutil.rmtree(path, ignore_errors=True)
        for other in folders.steps(self.directory):
            folder = self._folder(other)
            bad = other in self._passed_over or folders.fault(folder) is not None
            if bad or other >= step:
                moved = folders.set_aside(folder, "bad" if bad else "superseded")
                self._report(f"checkpoint {folder}: set aside as {moved.name}")

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        step = self._in_flight
        try:
            yield
        except Exception as error:
            # Whatever fails in Orbax's thread is raised here: nearly always a disk that is full.
            self._in_flight = self._current = None
            self._drop_writer()
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.directory}: "
                f"{gist(error)}; free space or give another model_dir (whole so far: "
                f"{self.all_steps()})."
            ) from error

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(Exception):
                writer.close()


def _in_all_processes(attempt: Callable[[], Any]) -> Any:
    """What `attempt` gives here; raises `UnusableError` where it did in any process."""
    result, fault = None, ""
    try:
        result = attempt()
    except UnusableError as error:
        fault = str(error)
    for found in distributed.exchange(fault):
        if found:
            raise UnusableError(found)
    return result


def write_one_by_one(
    directory: Path, step: int, leaves: Iterable[tuple[str, jax.Array]], meta: Mapping[str, Any]
) -> None:
    """Writes a checkpoint of tensors that needn't all be in memory at once.

    `Checkpointer.save` copies them all before it returns; this holds what `leaves` gives, one at a
    time. The result is a checkpoint like any other.

    Args:
      directory: of the checkpoints; without one of this step.
      step: its step.
      leaves: each tensor with its path, such as params/embedder/embedding.
      meta: JSON-able.
    """
    folder, final = directory / f"{step}{folders.TEMPORARY}", directory / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "meta").mkdir()
    tensors = {}
    for path, leaf in leaves:
        (value,) = digest({path: leaf}).values()
        tensors[path] = {**signature(leaf), "digest": value}
        write(folder / "state", path, np.asarray(leaf))
    record = {"format": FORMAT, "step": step, "meta": dict(meta), "tensors": tensors}
    (folder / folders.RECORD).write_text(json.dumps(record), "utf-8")
    folders.list_files(folder)
    for marker in folders.COMMIT_MARKERS:
        (folder / marker).write_text("{}", "utf-8")
    folder.rename(final)


@functools.cache
def _quieten_orbax() -> None:
    """Drops what Orbax prints of a failed save, once and for all: `wait` raises it as one line.

    Its tracebacks come from threads that outlive the failure, so a filter can't be taken off
    again. So does "Event loop is closed", from TensorStore telling a finished event loop of
    further writes.
    """
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno < logging.WARNING or "/orbax/" not in record.pathname
    )
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook
