"""Settings of a run that `compile --search` may try, and those that arithmetic rules out."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from t5x_lite.aot.topology import Topology
from t5x_lite.errors import UserError
from t5x_lite.nn.remat import POLICIES
from t5x_lite.partitioning import MESH_AXES, MeshConfig, Rules, Sharding
from t5x_lite.train.activations import stored_bytes
from t5x_lite.train.layout import check_layout, lengths_of
from t5x_lite.train.state import state_shardings
from t5x_lite.train.step import check_batch

GIB = 2**30
# What waits in the host's memory has to come back, at a speed that the model doesn't know.
REMATS = tuple(name for name in POLICIES if name != "offload")
TABLES = ("fsdp", *(f"fsdp_tp:tensor={size}" for size in (2, 4, 8)))
# The estimate of what a forward pass keeps leaves out temporaries, but the compiler may also store
# less than is asked of it; only what is this far beyond the chip is left out untried.
MARGIN = 1.5


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is varied of a run; `mesh` has its rule table's name beside it."""

    batch_size: int
    remat: str
    rules: str | Rules
    mesh: MeshConfig
    microbatches: int

    def overrides(self, run: Mapping[str, Any]) -> list[str]:
        """NAME=VALUE of everything in which it differs from a run."""
        own = of_run(run)
        changed = {
            "BATCH_SIZE": (self.batch_size, own.batch_size),
            "MICROBATCHES": (self.microbatches, own.microbatches),
            "REMAT": (self.remat, own.remat),
            "RULES": (self.rules, own.rules),
        }
        for axis in MESH_AXES:
            changed[f"MeshConfig.{axis}"] = (getattr(self.mesh, axis), getattr(own.mesh, axis))
        return [f"{name}={new!r}" for name, (new, old) in changed.items() if new != old]


@dataclasses.dataclass
class Trial:
    """A candidate, and what is known of it.

    Attributes:
        candidate: the settings.
        report: of `compile`, once it has been compiled.
        why: why it isn't the best; "" while nothing speaks against it.
        compiled: whether a compiler has had its say.
    """

    candidate: Candidate
    report: Mapping[str, Any] | None = None
    why: str = ""
    compiled: bool = False

    @property
    def mfu(self) -> float:
        """Modelled; 0 of one that doesn't fit or isn't known."""
        return self.report["mfu"] if self.report and self.report["fits"] else 0.0


def of_run(run: Mapping[str, Any]) -> Candidate:
    """The run's own settings."""
    return Candidate(
        run["batch_size"], run["model"].remat, run["rules"], run["mesh"], run["microbatches"]
    )


def candidates(run, batches, remats, tables, microbatches) -> Iterator[Candidate]:
    """The likeliest first: what computes least twice, in the fewest parts."""
    own = of_run(run)
    rows = batches or sorted({own.batch_size, 2 * own.batch_size, own.batch_size // 2} - {0})
    policies = remats or sorted({*REMATS, own.remat}, key=list(POLICIES).index)
    if unknown := [name for name in policies if name not in POLICIES]:
        raise UserError(f"--remats {unknown[0]}: there are {', '.join(POLICIES)}.")
    meshes = [_table(text, own.mesh) for text in tables or TABLES]
    if tables is None and (own.rules, own.mesh) not in meshes:
        meshes.insert(0, (own.rules, own.mesh))
    parts = microbatches or [2**power for power in range(max(rows).bit_length())]
    for remat, count, (rules, mesh), size in itertools.product(policies, parts, meshes, rows):
        yield Candidate(size, remat, rules, mesh, count)


def _table(text: str, own: MeshConfig) -> tuple[str, MeshConfig]:
    """The rules and the mesh of "fsdp_tp:tensor=4"; what crosses slices stays as it is."""
    rules, _, axes = text.partition(":")
    sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": -1}
    for part in axes.split("+") if axes else ():
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES or not size.lstrip("-").isdigit():
            raise UserError(f"--tables {text}: write RULES or RULES:AXIS=SIZE+AXIS=SIZE, such as "
                            f"fsdp_tp:tensor=4; axes are {', '.join(MESH_AXES)}.")  # fmt: skip
        sizes[axis] = int(size)
    Rules(rules)  # refuses an unknown one
    return rules, dataclasses.replace(own, **sizes)


class Arithmetic:
    """What is known of candidates without a compiler.

    Args:
        run: arguments of `compile_step`.
        target: the topology.
    """

    def __init__(self, run: Mapping[str, Any], target: Topology):
        self._run, self._target = run, target
        task = run["task"].for_family(run["model"].kind)
        self._batches = functools.cache(
            lambda size: task.batches("train", batch_size=size, length=run["length"], seed=0)
        )
        self._stored = functools.cache(self._stored_a_row)
        self._state = functools.cache(self._state_bytes)

    def __call__(self, candidate: Candidate, trials: Sequence[Trial]) -> str:
        """Why it can't be the best, given what is known of others; "" if it could.

        Args:
            candidate: the settings.
            trials: all of them, some compiled.
        """
        return (
            self._misfit(candidate) or self._outdone(candidate, trials) or self._too_big(candidate)
        )

    def _misfit(self, candidate: Candidate) -> str:
        """The first size that doesn't divide."""
        try:
            sharding = self._sharding(candidate.rules, candidate.mesh)
            check_batch(candidate.batch_size, candidate.microbatches, sharding)
            lengths = lengths_of(self._batches(candidate.batch_size).shapes)
            rows = candidate.batch_size // candidate.microbatches
            check_layout(self._run["model"], sharding, rows, lengths)
        except UserError as error:
            return str(error).splitlines()[0]
        return ""

    def _outdone(self, candidate: Candidate, trials: Sequence[Trial]) -> str:
        """Another one that is as good already, or shows that this one doesn't fit."""
        best = max((trial.mfu for trial in trials), default=0.0)
        for trial in filter(lambda trial: trial.compiled and trial.report, trials):
            other, report = trial.candidate, trial.report
            if other.remat == candidate.remat and report["fits"]:
                # The compiler's products at peak speed are the least that a step can take.
                most = report["model_flops"] / report["matmul_flops"]
                if most <= best:
                    return f"at most {most:.1%} MFU, for what it computes twice"
            same = {"batch_size": other.batch_size, "microbatches": other.microbatches}
            if dataclasses.replace(candidate, **same) != other:
                continue
            fewer, more = (
                other.microbatches < candidate.microbatches,
                other.batch_size < candidate.batch_size,
            )
            if report["fits"] and fewer and other.batch_size == candidate.batch_size:
                return f"MICROBATCHES={other.microbatches} fits already"
            if not report["fits"] and more and other.microbatches == candidate.microbatches:
                return f"BATCH_SIZE={other.batch_size} doesn't fit already"
        return ""

    def _too_big(self, candidate: Candidate) -> str:
        """The state alone, or by far too much beside it."""
        capacity = self._target.chip.capacity
        state = self._state(candidate.rules, candidate.mesh)
        if state > capacity:
            return f"the state alone takes {state / GIB:.2f} of {capacity / GIB:.2f} GiB"
        rows = candidate.batch_size / candidate.microbatches
        kept = rows * self._stored(candidate.remat, candidate.rules, candidate.mesh)
        if state + kept > MARGIN * capacity:
            return (f"by estimate {(state + kept) / GIB:.2f} of {capacity / GIB:.2f} GiB, "
                    f"temporaries apart")  # fmt: skip
        return ""

    def _sharding(self, rules: str | Rules, mesh: MeshConfig) -> Sharding:
        chips = mesh.abstract(self._target.chips)
        return Sharding(chips, rules, self._run["pipeline_microbatches"])

    def _state_bytes(self, rules, mesh) -> int:
        run, ema = self._run, self._run["ema_decay"] is not None
        sharding = self._sharding(rules, mesh)
        shapes, where = state_shardings(run["model"], run["optimizer"], sharding, ema)
        pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(where), strict=True)
        return sum(math.prod(w.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, w in pairs)

    def _stored_a_row(self, remat, rules, mesh) -> float:
        """Of a microbatch: activations grow with its rows."""
        run, sharding = self._run, self._sharding(rules, mesh)
        model, rows = dataclasses.replace(run["model"], remat=remat), sharding.parts("batch")
        shapes = self._batches(rows).shapes
        return stored_bytes(model, run["loss"], shapes, sharding) / rows
