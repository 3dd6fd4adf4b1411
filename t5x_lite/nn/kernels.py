"""Which path computes attention: by what the program is compiled for, and by what is asked of it.

plain      the whole score matrix at once, by XLA
sliced     slices of queries, each with the keys that it may see; everything that plain can
blockwise  a block of scores at a time, forwards and backwards; everything that plain can
splash     Pallas, on TPUs: a block at a time in fast memory, hidden blocks left out
cudnn      NVIDIA's fused attention, on GPUs
ring       blocks that go round the devices that share a row, wherever a row is split
"""

import dataclasses
import math
from typing import Any

import jax

from t5x_lite.errors import UserError
from t5x_lite.nn import sliced
from t5x_lite.nn.masks import Visibility
from t5x_lite.partitioning import Sharding

KERNELS = ("auto", "plain", "sliced", "blockwise", "splash", "cudnn")

# What one layer's scores may take on one device, in float32, before they are computed by blocks: a
# sixteenth of the smallest TPU's memory, and several copies may be alive in the backward pass. A
# CPU's caches are passed long before (docs/kernels.md has what was measured).
_FITTING = {"cpu": 2**26}
_FITTING_ELSEWHERE = 2**30
_ONE_BLOCK = 512  # up to so many queries and keys nothing is saved
# Shorter rows are padded to this by splash, and XLA does them well; on a CPU, slices of a causal
# row begin to save time here.
_SHORT = 256


@dataclasses.dataclass(frozen=True)
class Work:
    """What is asked of a kernel, as far as the choice depends on it.

    Attributes:
        shape: (B, N, T, S) of the scores on all devices together.
        head_dim: the larger of queries' and values'.
        dtype: of queries, keys and values.
        slotted: the mask is known but for segments and prefix; False in cached decoding.
        narrow: of the keys, no query sees more than those before it or those near.
        bias: something is added to the logits.
        prefix: a causal mask has a prefix that is read in both directions.
        soft_cap: logits are capped.
        dropout: probabilities are dropped.
    """

    shape: tuple[int, int, int, int]
    head_dim: int
    dtype: str
    slotted: bool = True
    narrow: bool = False
    bias: bool = False
    prefix: bool = False
    soft_cap: bool = False
    dropout: bool = False

    @classmethod
    def of(cls, shape, head_dim, dtype, sees: Visibility, bias: tuple, **others) -> "Work":
        """What `sees` and `bias` say of it."""
        prefix = sees.causal and sees.prefix_q is not None
        narrow = (sees.causal and not prefix) or sees.window is not None
        return cls(shape, head_dim, str(dtype), sees.slotted, narrow, bool(bias), prefix, **others)

    def lacks(self, kernel: str) -> str | None:
        """What of this a kernel can't do; None: it can."""
        return next((why for why, cannot in self._limits(kernel) if cannot), None)

    def _limits(self, kernel: str) -> tuple[tuple[str, bool], ...]:
        _, _, queries, keys = self.shape
        common = (
            ("a bias on the logits (relative positions)", self.bias),
            ("dropout of attention's probabilities", self.dropout),
        )
        if kernel == "splash":
            return (*common, ("a prefix that is read in both directions", self.prefix))
        if kernel == "cudnn":
            return (
                *common,
                ("a soft cap", self.soft_cap),
                (f"{self.dtype}, only bfloat16 and float16", self.dtype == "float32"),
                (f"odd lengths ({queries} queries, {keys} keys)", (queries | keys) % 2 == 1),
                (f"heads of {self.head_dim}, only multiples of 8 up to 128",
                 self.head_dim % 8 != 0 or self.head_dim > 128),
            )  # fmt: skip
        return ()


_HOME = {"splash": "tpu", "cudnn": "gpu"}


def platform_of(sharding: Sharding | None) -> str:
    """What a program is compiled for: "cpu", "gpu" or "tpu"."""
    # Of an abstract mesh too, which is what there is inside of `shard_map`.
    device = sharding and sharding.mesh.abstract_mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def choose(asked: str, platform: str, work: Work, sharding: Sharding | None = None) -> str:
    """The path for this work: one of `KERNELS`, or "ring".

    Args:
        asked: of `KERNELS`.
        platform: what the program is compiled for.
        work: what is to be computed.
        sharding: over how many devices.

    Raises:
        UserError: the kernel that was asked for doesn't run there, or can't do it.
    """
    if not work.slotted:  # decoding: a few queries a row need no blocks
        return "plain"
    if sharding is not None and sharding.parts("length") > 1:
        return "ring"
    if asked in _HOME:
        _require(asked, platform, work)
    if asked != "auto":
        return asked
    _, _, queries, keys = work.shape
    long, size = min(queries, keys) >= _SHORT, _bytes(work, sharding)
    if long:
        for kernel, home in _HOME.items():
            if platform == home and work.lacks(kernel) is None:
                return kernel
    fitting = _FITTING.get(platform, _FITTING_ELSEWHERE)
    gains = work.narrow or work.bias  # of a bias the whole matrix would have to be summed over rows
    if platform == "cpu" and gains and long and size <= sliced.MOST * fitting:
        return "sliced"
    too_large = max(queries, keys) > _ONE_BLOCK and size > fitting
    return "blockwise" if too_large else "plain"


def _require(kernel: str, platform: str, work: Work) -> None:
    others = "'auto' chooses one that can"
    if platform != _HOME[kernel]:
        raise UserError(
            f"attention_kernel={kernel!r} runs on a {_HOME[kernel].upper()}, and this program is "
            f"compiled for a {platform.upper()}; {others}."
        )
    if why := work.lacks(kernel):
        raise UserError(f"attention_kernel={kernel!r} has no way to do {why}; {others}.")


def _bytes(work: Work, sharding: Sharding | None) -> int:
    """Of a float32 score matrix on one device."""
    parts = 1
    if sharding is not None:
        parts = sharding.parts("batch") * sharding.parts("act_heads")
    return 4 * math.prod(work.shape) // parts


def require_kernel(name: Any) -> None:
    """Raises `UserError` for a name that `KERNELS` lacks."""
    if name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} must be one of {', '.join(KERNELS)}.")
