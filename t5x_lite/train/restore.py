"""From a run's checkpoints to a state: for resuming, and parameters alone for evaluating."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from t5x_lite import distributed
from t5x_lite.checkpoint import Checkpointer, Restored
from t5x_lite.data.pipeline import Batches, Origin
from t5x_lite.data.tasks import Trainable
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.optim import MuP, Optimizer
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.tensors import difference, flatten, signature, unflatten
from t5x_lite.train.identity import differences_of, model_identity, require_same, shown
from t5x_lite.train.state import TrainState, from_tree, init_state, state_shardings, stored_shapes
from t5x_lite.types import Params, PyTree

FOLDER = "checkpoints"


def restore_or_init(
    checkpoints: Checkpointer,
    model: ModelConfig,
    optimizer: Optimizer,
    sharding: Sharding,
    seed: int,
    ema: bool,
    init_from: str | None = None,
) -> TrainState:
    """The newest good checkpoint's state, or a fresh one, laid out over the mesh.

    A fresh state's parameters are drawn from `seed`, or are those of the run in `init_from`; what
    another head there lacks is drawn.
    """
    shapes, shardings = state_shardings(model, optimizer, sharding, ema)
    if init_from is None:
        restored = _restored(checkpoints, stored_shapes(model, optimizer, sharding, ema))
        if restored is not None:
            state = from_tree(restored.tree, shapes)
            return jax.device_put(state, shardings)
    transform = optimizer.build(parameters.abstract(model)[1])
    # The seed is an argument: as a constant it would make every seed compile anew.
    base = optimizer.base if isinstance(optimizer, MuP) else None
    init = jax.jit(
        lambda seed: init_state(model, transform, seed, ema, base), out_shardings=shardings
    )
    state = init(jax.numpy.uint32(seed))
    if init_from is not None:
        params = _begun_with(state.params, model, init_from, sharding)
        average = jax.tree.map(jax.numpy.copy, params) if ema else {}
        state = state.replace(params=params, ema=average)
    return state


def _restored(checkpoints: Checkpointer, like: PyTree) -> Restored | None:
    """The newest good checkpoint; of one whose optimizer alone is another, what to do about it."""
    try:
        return checkpoints.restore(like)
    except UserError:
        there, wanted = checkpoints.read_signatures(), flatten(like)
        both = there, wanted
        state, wanted_state = (
            {path: leaf for path, leaf in each.items() if "opt_state/" in path} for each in both
        )
        other = state.keys() | wanted_state.keys()
        rest = [{path: each[path] for path in each.keys() - other} for each in both]
        if difference(*rest, partial=False) or not difference(state, wanted_state, partial=False):
            raise
        first = difference(state, wanted_state, partial=False).split(", opt_state/")[0]
        directory = checkpoints.directory
        raise UserError(
            f"{directory} holds another optimizer's state, or an earlier version's ({first}): "
            f"train as it was, or from its parameters into another --model_dir with "
            f"--gin.INIT_FROM=\"'{directory.parent}'\"."
        ) from None


def _begun_with(fresh: Params, model: ModelConfig, model_dir: str, sharding: Sharding) -> Params:
    """The parameters of another run; of a head that it hasn't, the fresh ones."""
    head = flatten({"head": fresh.get("head", {})})
    with Stored(model, model_dir, sharding=sharding, any_head=True) as stored:
        params = stored.read_all_but(head)
    if stored.lacks:
        drawn = ", ".join(stored.lacks)
        distributed.report(f"{model_dir} has another head than this model; drawn anew: {drawn}")
    return params if model.scan else parameters.unstack_layers(params)


def resumed(
    make_batches: Callable[..., Batches],
    task: Trainable,
    saved: Mapping[str, Any],
    step: int,
    directory: Path,
    allow_change: bool,
) -> Batches:
    """The batches that a checkpoint's run goes on with.

    Raises:
        UserError: they aren't those that it was trained on, and that isn't allowed.
    """
    begun = saved["data"].get("origin")
    batches = make_batches(origin=Origin(**begun) if begun else Origin())
    now = {"data": batches.fingerprint, "vocabulary": task.load_vocabulary().fingerprint}
    changed = differences_of(saved, now)
    if not changed:
        return batches
    if not allow_change:
        raise UserError(
            f"{directory} was trained on other data ({shown(changed)}): undo the change, go on "
            f"with it by --allow_data_change, or give another --model_dir."
        )
    batches = make_batches()
    distributed.report(f"the data changed ({shown(changed)}); going on as allowed.")
    return make_batches(origin=batches.origin_at(step, saved.get("cursors", {})))


def restore_params(
    model: ModelConfig,
    model_dir: str,
    step: int | None = None,
    sharding: Sharding | None = None,
    vocabulary: str | None = None,
) -> tuple[Params, int]:
    """The parameters to evaluate or serve, and their step: the average's where the run keeps one.

    The optimizer's state isn't read.

    Args:
        model: the run's model.
        model_dir: the run's directory.
        step: a checkpoint; None for the newest good one.
        sharding: how to lay the parameters out; None for one device.
        vocabulary: fingerprint of the vocabulary in use, to be the one trained with.

    Raises:
        UserError: no checkpoint there, or one of another model or vocabulary.
    """
    with Stored(model, model_dir, step, sharding, vocabulary) as stored:
        params, step = stored.read_all()
    return (params if model.scan else parameters.unstack_layers(params)), step


class Stored(contextlib.AbstractContextManager):
    """The parameters of a run's checkpoint, layers stacked; arguments as of `restore_params`.

    With `any_head` the checkpoint's model may have another head; `lacks` then names the parameters
    that it hasn't.
    """

    def __init__(
        self,
        model: ModelConfig,
        model_dir: str,
        step: int | None = None,
        sharding: Sharding | None = None,
        vocabulary: str | None = None,
        any_head: bool = False,
    ):
        sharding = sharding or Sharding(MeshConfig().build(jax.devices()[:1]))
        directory = Path(model_dir) / FOLDER
        self._checkpoints = Checkpointer(directory, read_only=True)
        saved = self._checkpoints.read_meta(step)
        if saved is None:
            raise UserError(f"no checkpoint in {directory}; train into {model_dir} first.")
        now = model_identity(model)
        if any_head:
            saved = {**saved, "model": {**saved["model"], "head": None}}
            now = {**now, "head": None}
        require_same(saved, {"model": now}, directory)
        if vocabulary is not None and "vocabulary" in saved:  # an imported model may lack one
            require_same(saved, {"vocabulary": vocabulary}, directory)
        self._slot = "ema" if saved.get("ema") else "params"
        self._shapes, self.step = _stored_params(model, sharding), step
        self.lacks = self._missing_of_head() if any_head else ()

    def _missing_of_head(self) -> tuple[str, ...]:
        there = self._checkpoints.read_signatures(self.step)
        head = flatten({"head": self._shapes.get("head", {})})
        return tuple(
            path
            for path, leaf in head.items()
            if there.get(f"{self._slot}/{path}") != signature(leaf)
        )

    def __exit__(self, *_):
        self._checkpoints.close()

    def read_all(self) -> tuple[Params, int]:
        """All of them, and their step."""
        restored = self._checkpoints.restore({self._slot: self._shapes}, self.step, partial=True)
        self.step = restored.step
        return restored.tree[self._slot], restored.step

    def read_all_but(self, others: Mapping[str, jax.Array]) -> Params:
        """All of them; those that the checkpoint lacks are taken from `others`, by path."""
        paths = [path for path in flatten(self._shapes) if path not in self.lacks]
        like = flatten({self._slot: self._shapes})
        wanted = {f"{self._slot}/{path}": like[f"{self._slot}/{path}"] for path in paths}
        tree = self._checkpoints.restore(wanted, self.step, partial=True).tree
        found = {path: tree[f"{self._slot}/{path}"] for path in paths}
        return unflatten(self._shapes, {**found, **{path: others[path] for path in self.lacks}})

    def read(self, path: str) -> jax.Array:
        """The one at a path, such as `decoder/final_norm/scale`, and no other."""
        path = f"{self._slot}/{path}"
        like = flatten({self._slot: self._shapes})[path]
        restored = self._checkpoints.restore({path: like}, self.step, partial=True)
        self.step = restored.step  # the rest comes from the same checkpoint
        return restored.tree[path]


def _stored_params(model: ModelConfig, sharding: Sharding):
    shapes, axes = parameters.abstract(parameters.scanned(model))
    return jax.tree.map(
        lambda leaf, names: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding.named(names, leaf.shape)
        ),
        shapes,
        axes,
    )
