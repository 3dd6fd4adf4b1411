"""Parameters from published tensors and back, one tensor at a time."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.rules import Tensor, expand
from t5x_lite.hub.source import Tensors
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import NoHead, Pooler, SentenceEmbedding
from t5x_lite.types import Params

# Heads that belong to the bare model, whose tensors are published without the base prefix.
BARE_HEADS = (Pooler, NoHead, SentenceEmbedding)


def load(model: ModelConfig, family: Family, tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter with its path, layers stacked, float32, filled from published tensors.

    Holds the parameters of one rule of the key map and one tensor at a time.

    Raises:
        UserError: a tensor that is missing, unused, or of another shape than config.json says;
            before any is read, but for ties.
    """
    shapes, places = _layout(model)
    plan = list(expand(model, family.key_map(model), shapes))
    names = _names(family, tensors, plan)
    _check(model, family, tensors, plan, names, shapes)
    # A rule's tensors follow each other, and no two rules share a parameter.
    for _, group in itertools.groupby(plan, lambda tensor: tensor.rule):
        params: dict[str, np.ndarray] = {}
        for tensor in group:
            for path, _ in tensor.places:
                if path not in params:
                    params[path] = np.zeros(places.pop(path), np.float32)
            outs = [_view(params[path], index, shapes[path]) for path, index in tensor.places]
            tensor.load(tensors.read(names[tensor.name]), outs)
        for path in list(params):
            yield path, params.pop(path)
    if places:
        raise AssertionError(f"no rule fills {sorted(places)}")


def tensor_names(model: ModelConfig, family: Family) -> list[str]:
    """Of the published tensors that hold its parameters."""
    return [t.name for t in expand(model, family.key_map(model), _layout(model)[0])]


def unread(
    model: ModelConfig, family: Family, tensors: Tensors
) -> Iterator[tuple[str, np.ndarray]]:
    """Published tensors that were trained but that no parameter holds, as stored, one at a time.

    Under their full names, of which `save` leaves out the prefix of a bare model.
    """
    plan = list(expand(model, family.key_map(model), _layout(model)[0]))
    kept = _unread(family, tensors, _names(family, tensors, plan))
    for name, stored in kept.items():
        yield name, tensors.read(stored)


def unread_zeros(model: ModelConfig, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """A pooler for a sentence embedding that has none, where its class of `transformers` has one.

    Nothing reads it: that of published sentence embeddings wasn't trained with them either.
    """
    if not isinstance(model.head, SentenceEmbedding) or not isinstance(family.base_head, Pooler):
        return
    model = dataclasses.replace(model, head=family.base_head)
    shapes, _ = _layout(model)
    for tensor in expand(model, family.key_map(model), shapes):
        if all(path.startswith("head/") for path, _ in tensor.places):
            zeros = np.zeros(_expected(tensor, shapes), np.float32)
            yield tensor.name, zeros


def left_out(model: ModelConfig, family: Family, tensors: Tensors | None = None) -> str:
    """What the names of tensors don't begin with: the prefix where they are of the bare model.

    As those that are stored say; without any, the model's head.
    """
    if tensors is None:
        bare = isinstance(model.head, BARE_HEADS)
    else:
        bare = not any(name.startswith(family.base_prefix) for name in tensors.names)
    return family.base_prefix if bare else ""


def as_tree(leaves: Iterable[tuple[str, np.ndarray]]) -> Params:
    """Nested dicts of JAX arrays from paths."""
    tree: dict = {}
    for path, leaf in leaves:
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jax.device_put(leaf)
    return tree


def save(
    model: ModelConfig,
    family: Family,
    read: Callable[[str], np.ndarray],
    prefix: str | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Published tensors of a model, float32, one after the other.

    Args:
        model: the model.
        family: its family.
        read: gives the parameter at a path, layers stacked; asked for those of a rule at a time.
        prefix: what names leave out, as `left_out` says of the published ones; None: of the model.
    """
    shapes, _ = _layout(model)
    prefix = left_out(model, family) if prefix is None else prefix
    plan = expand(model, family.key_map(model), shapes)
    for _, group in itertools.groupby(plan, lambda tensor: tensor.rule):
        params: dict[str, np.ndarray] = {}
        for tensor in group:
            for path, _ in tensor.places:
                if path not in params:
                    params[path] = read(path)
            ours = [_view(params[path], index, shapes[path]) for path, index in tensor.places]
            yield tensor.name.removeprefix(prefix), tensor.save(ours)


def _check(model, family, tensors, plan, names, shapes) -> None:
    """Refuses what config.json and the stored tensors don't agree on."""
    unused = set(tensors.names) - set(names.values())
    unused -= _repeated(family, tensors, names, unused)
    unused -= set(_unread(family, tensors, names).values())
    unused = [n for n in sorted(unused) if not _ignored(family, model, n)]
    if unused:
        raise UserError(
            f"{tensors.folder} has tensors that the model doesn't: {_some(unused)}. config.json "
            "describes another model, or t5x_lite doesn't know this part of it."
        )
    missing = [tensor.name for tensor in plan if tensor.name not in names]
    if missing:
        raise UserError(
            f"{tensors.folder} lacks tensors that config.json asks for: {_some(missing)}."
        )
    for tensor in plan:
        name = names[tensor.name]
        expected = _expected(tensor, shapes)
        if tensors.shape(name) != expected:
            raise UserError(
                f"{tensors.place(name)} has shape {list(tensors.shape(name))}, but config.json "
                f"asks for {list(expected)}."
            )


def _expected(tensor: Tensor, shapes) -> tuple[int, ...]:
    """A tensor's shape, from those of all parameters."""
    return tensor.shape([shapes[path][len(index) :] for path, index in tensor.places])


def _layout(model: ModelConfig):
    """Of every parameter, by path: its shape without padding of the vocabulary, and with it."""
    shapes, axes = parameters.abstract(parameters.scanned(model))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=parameters.is_axes)
    published = {
        _path(path): parameters.published_shape(model, leaf.shape, axis_names)
        for (path, leaf), axis_names in zip(leaves, names, strict=True)
    }
    return published, {_path(path): leaf.shape for path, leaf in leaves}


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _view(array: np.ndarray, index: tuple[int, ...], published: Sequence[int]) -> np.ndarray:
    """What a tensor holds of a parameter: a layer, an expert, no rows that pad the vocabulary."""
    return array[(*index, *(slice(size) for size in published[len(index) :]))]


def _names(family: Family, tensors: Tensors, plan: Sequence[Tensor]) -> dict[str, str]:
    """The stored name of each planned tensor that is there: its own, an older, a bare model's."""
    stored, names = set(tensors.names), {}
    for tensor in plan:
        known = [tensor.name]
        for now, old in family.old_names.items():
            if tensor.name.endswith(now):
                known.append(tensor.name.removesuffix(now) + old)
        known += [name.removeprefix(family.base_prefix) for name in known]
        found = [name for name in known if name in stored]
        if found:
            names[tensor.name] = found[0]
    return names


def _repeated(family: Family, tensors: Tensors, names: dict[str, str], unused: set[str]):
    """Unused tensors that repeat a tied one, which must be equal to it."""
    found = set()
    for name in unused & set(family.tied):
        original = names.get(family.tied[name])
        if original is None:
            continue
        if not np.array_equal(tensors.read(name), tensors.read(original)):
            raise UserError(
                f"{tensors.place(name)} differs from {original}, but config.json ties them."
            )
        found.add(name)
    return found


def _unread(family: Family, tensors: Tensors, names: dict[str, str]) -> dict[str, str]:
    """The stored names of trained tensors that no parameter holds, by their full names."""
    found, used = {}, set(names.values())
    for stored in tensors.names:
        if stored in used or family.tied.get(stored) in names:
            continue
        full = family.base_prefix + stored.removeprefix(family.base_prefix)
        for name in (full, stored):
            known = any(re.fullmatch(pattern, name) for pattern in family.unread_tensors)
            if known and name not in names:  # stored twice, it would be unused
                found.setdefault(name, stored)
                break
    return found


def _ignored(family: Family, model: ModelConfig, name: str) -> bool:
    patterns = family.ignored_tensors
    patterns = patterns(model) if callable(patterns) else patterns
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
