"""Which published tensor holds which parameter, and how the two are laid out.

A family's key map is a list of `Rule`s. A path of ours with `*` in a layer's place,
`decoder/*/attention/query/kernel`, stands for every layer of the stack, whichever section of it
the layer is in; a name of theirs with `{layer}` is then that layer's tensor.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from t5x_lite.nn.blocks import Round
from t5x_lite.nn.config import ModelConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Same:
    """A tensor of the same layout."""

    def their_shape(self, shape: Shape) -> Shape:
        """Of a parameter of this shape, for one layer."""
        return shape

    def load(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """Theirs as ours; a view where possible."""
        return theirs.reshape(shape)

    def save(self, ours: np.ndarray) -> np.ndarray:
        """Ours as theirs."""
        return ours.reshape(self.their_shape(ours.shape))


@dataclasses.dataclass(frozen=True)
class Flat(Same):
    """A vector whose axes we keep apart, such as heads and head dimension of a bias."""

    def their_shape(self, shape: Shape) -> Shape:
        """All axes as one."""
        return (math.prod(shape),)


@dataclasses.dataclass(frozen=True)
class Product(Same):
    """A kernel stored as [inputs, outputs] (GPT-2's Conv1D); ours has `inputs` input axes."""

    inputs: int = 1

    def their_shape(self, shape: Shape) -> Shape:
        """Input axes as one, output axes as one."""
        return math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])


@dataclasses.dataclass(frozen=True)
class Linear(Product):
    """A kernel stored as [outputs, inputs], as torch's Linear does."""

    def their_shape(self, shape: Shape) -> Shape:
        """Output axes as one, input axes as one."""
        return super().their_shape(shape)[::-1]

    def load(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """Theirs as ours; a view where possible."""
        return theirs.T.reshape(shape)

    def save(self, ours: np.ndarray) -> np.ndarray:
        """Ours as theirs."""
        return ours.reshape(super().their_shape(ours.shape)).T


@dataclasses.dataclass(frozen=True)
class Neighbours(Same):
    """Features that rotate as pairs of neighbours in theirs, as (i, i + size / 2) in ours.

    Those are the last `size` of the output's last axis; `plain` is the layout but for them.
    """

    plain: Same = Linear()
    size: int = 2

    def their_shape(self, shape: Shape) -> Shape:
        """As without."""
        return self.plain.their_shape(shape)

    def load(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """Theirs as ours: even features, then odd ones."""
        return self._move(self.plain.load(theirs, shape), lambda last: last.reshape(-1, 2).T)

    def save(self, ours: np.ndarray) -> np.ndarray:
        """Ours as theirs."""
        return self.plain.save(self._move(ours, lambda last: last.reshape(2, -1).T))

    def _move(self, kernel: np.ndarray, reorder) -> np.ndarray:
        order = np.arange(kernel.shape[-1])
        order[-self.size :] = reorder(order[-self.size :]).reshape(-1)
        return kernel[..., order]


Layout = Same | Flat | Product | Linear | Neighbours


@dataclasses.dataclass(frozen=True)
class Rule:
    """One published tensor (or one a layer) and the parameter, or parameters, that it holds.

    Attributes:
        ours: the parameter's path. Several: theirs holds them one after the other along `axis`.
        theirs: the tensor's name. With `{expert}`: one tensor for each row of ours.
        layout: how a kernel is stored.
        axis: of theirs, along which several of ours are joined.
    """

    ours: str | tuple[str, ...]
    theirs: str
    layout: Layout = Same()
    axis: int = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """`ours`, as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def linear_rules(ours: str, theirs: str, inputs: int = 1) -> list[Rule]:
    """Kernel and bias of one of torch's Linear modules."""
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", Linear(inputs)),
        Rule(f"{ours}/bias", f"{theirs}.bias", Flat()),
    ]


def norm_rules(ours: str, theirs: str) -> list[Rule]:
    """Scale and bias of one of torch's LayerNorm modules."""
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One published tensor of a model, and the places of the parameters that it holds.

    A place is a parameter's path and the indices of its leading axes: round and, of a stack of
    experts, expert.
    """

    name: str
    places: tuple[tuple[str, tuple[int, ...]], ...]
    rule: Rule

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """What it must have, given the shapes at its places."""
        each = [self.rule.layout.their_shape(shape) for shape in shapes]
        joined = list(each[0])
        if len(each) > 1:
            joined[self.rule.axis] = sum(shape[self.rule.axis] for shape in each)
        return tuple(joined)

    def load(self, theirs: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        """Writes theirs into `outs`, views of the parameters at its places."""
        axis, parts = self.rule.axis, [theirs]
        if len(outs) > 1:
            sizes = [self.rule.layout.their_shape(out.shape)[axis] for out in outs]
            parts = np.split(theirs, np.cumsum(sizes)[:-1], axis=axis)
        for part, out in zip(parts, outs, strict=True):
            out[...] = self.rule.layout.load(part, out.shape)

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """The published tensor, from the parameters at its places."""
        parts = [self.rule.layout.save(part) for part in ours]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self.rule.axis)


def expand(
    model: ModelConfig, rules: Sequence[Rule], shapes: Mapping[str, Shape]
) -> Iterator[Tensor]:
    """Every tensor of a model, in the order of the rules and then of layers and experts.

    Args:
        model: the model.
        rules: its family's key map. A rule whose parameters the model lacks gives nothing, so that
            one key map serves tied and untied heads.
        shapes: of every parameter, layers stacked, by path.
    """
    for rule in rules:
        for layer, paths, index in _locations(model, rule.paths):
            if not all(path in shapes for path in paths):
                continue
            if "{expert}" not in rule.theirs:
                places = tuple((path, index) for path in paths)
                yield Tensor(rule.theirs.format(layer=layer), places, rule)
                continue
            for expert in range(shapes[paths[0]][len(index)]):
                places = tuple((path, (*index, expert)) for path in paths)
                name = rule.theirs.format(layer=layer, expert=expert)
                yield Tensor(name, places, rule)


def _locations(model: ModelConfig, paths: Sequence[str]) -> Iterator[tuple]:
    """(layer, paths, index): where parameters stand, once or for every layer of their stack."""
    if "*" not in paths[0]:
        yield None, paths, ()
        return
    stack = getattr(model, paths[0].partition("/")[0])
    for section in stack.sections:
        for row in range(section.repeats if section.stacked else 1):
            for number, _ in enumerate(section.blocks):
                where = section.name
                if isinstance(section.block, Round):
                    where += f"/block_{number}"
                layer = section.first + row * len(section.blocks) + number
                index = (row,) if section.stacked else ()
                yield layer, tuple(path.replace("*", where) for path in paths), index
