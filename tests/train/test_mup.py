"""muP in training: copies of neurons learn like the neurons, and coordinates keep their size."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import optim
from t5x_lite.errors import UserError
from t5x_lite.losses import CrossEntropy
from t5x_lite.nn import mup, parameters
from t5x_lite.nn.presets.albert import albert
from t5x_lite.nn.presets.bart import bart
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gemma3 import gemma3
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.mixtral import mixtral
from t5x_lite.nn.presets.t5 import t5_1_0
from t5x_lite.train import loop
from t5x_lite.train.coordinates import coordinate_check, slopes
from t5x_lite.train.restore import restore_params
from t5x_lite.train.state import TrainState
from t5x_lite.train.step import make_train_step, model_apply

from .test_loop import data_dir, resumable  # noqa: F401

LOSS, VOCAB = CrossEntropy(), 16
SMALL = {"vocab_size": VOCAB, "layers": 2, "dropout": 0.0}
ONE = SMALL | {"layers": 1}
# family → (preset, everything that is wide, heads and their size last)
DOUBLED = {
    "gpt2": (gpt2, {"width": 8, "hidden": 12}, {"heads": 2}),  # its heads become larger
    "gemma3": (
        gemma3, {"width": 8, "hidden": 12, "heads": 4, "kv_heads": 2}, {"head_dim": 4},
    ),
    "mixtral": (
        mixtral, {"width": 8, "hidden": 12, "heads": 2, "kv_heads": 1}, {"head_dim": 4},
    ),
    "t5": (t5_1_0, {"width": 8, "hidden": 12, "head_dim": 4}, {"heads": 2}),  # and its
    "bart": (bart, {"width": 8, "hidden": 12, "heads": 2}, {}),
    "albert": (albert, {"width": 8, "hidden": 12, "heads": 2, "embedding": 4}, {}),
}  # fmt: skip


def batch_of(model, rows=2, length=4):
    rng = np.random.default_rng(0)
    names = ["tokens", "targets", *["encoder_tokens"] * (model.kind == "encoder-decoder")]
    ids = {name: rng.integers(0, VOCAB, (rows, length), np.int32) for name in names}
    return jax.tree.map(jnp.asarray, ids | {"weights": np.ones((rows, length), np.float32)})


def tiled(x, shape):
    return np.tile(x, [n // m for n, m in zip(shape, x.shape, strict=True)])


def copied(params, model, base):
    """The wide model whose every neuron is a copy of one of the base's: the same function.

    Where it sums over copies, each counts for less.
    """
    scales, shapes = mup.scales(model, base), parameters.abstract(model)[0]

    def of(scale, like, x):
        rate, shift = (
            np.reshape(value, [-1] + [1] * (x.ndim - 1)) if np.ndim(value) else value
            for value in (scale.rate, scale.shift)
        )
        return (tiled(x, like.shape) * rate + shift).astype(np.float32)

    return jax.tree.map(of, scales, shapes, params, is_leaf=mup.is_scale)


def noise(model):
    rng = np.random.default_rng(1)

    def value(path, leaf):
        x = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.1 * x if path[-1].key == "scale" else 0.5 * x

    return jax.tree_util.tree_map_with_path(value, parameters.abstract(model)[0])


OFTEN = ("gpt2", "mixtral", "t5")  # the others with -m grid


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in OFTEN else [pytest.mark.grid]) for f in DOUBLED],
)
def test_a_model_of_copies_learns_as_the_base_does(family):
    """An exact law: gradients, clipping, epsilon, rates, decay and every multiplier are right.

    Sinusoids and rotations by a head's place differ between copies, so those heads aren't widened.
    """
    preset, wide, rest = DOUBLED[family]
    base, model = (
        dataclasses.replace(
            preset("tiny", **SMALL, **rest, **{name: n * size for name, size in wide.items()}),
            vocab_multiple=8,
        )
        for n in (1, 2)
    )
    adam = optim.AdamW(lambda step: 0.03, epsilon=0.01, weight_decay=0.5, clip_norm=0.3)
    batch, results = batch_of(base), []
    start = noise(base)
    for config, params in ((base, start), (model, copied(start, model, base))):
        transform = optim.MuP(adam, config, base).build(parameters.abstract(config)[1])
        step = make_train_step(model_apply(config), LOSS, transform, adam.schedule)

        @jax.jit
        def run(params, step=step, transform=transform):
            state = TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))
            after, metrics = step(state, batch, jax.random.key(0))
            return after.params, metrics["loss"]

        results.append(run(params))
    (narrow, loss), (wide_params, wide_loss) = results
    np.testing.assert_allclose(wide_loss, loss, rtol=1e-5)
    expected = copied(jax.tree.map(np.asarray, narrow), model, base)
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), narrow, start)
    for (path, found), right in zip(
        jax.tree_util.tree_leaves_with_path(wide_params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, right, atol=2e-5, err_msg=optim.path_name(path))
    assert np.median(jax.tree.leaves(moved)) > 1e-3


def test_a_ratio_of_one_is_the_same_program():
    model = llama("tiny", **ONE, width=8, heads=2, kv_heads=2, hidden=8)
    batch, axes = batch_of(model), parameters.abstract(model)[1]
    for rule in (optim.AdamW(lambda step: 0.1), optim.Adafactor(lambda step: 0.1, clip_norm=1.0)):
        texts = []
        for optimizer in (rule, optim.MuP(rule, model, model)):
            transform = optimizer.build(axes)
            step = make_train_step(model_apply(model), LOSS, transform, optimizer.schedule)
            params = parameters.abstract(model)[0]
            zero = jax.ShapeDtypeStruct((), jnp.int32)
            state = TrainState(zero, params, jax.eval_shape(transform.init, params))
            key = jax.eval_shape(lambda: jax.random.key(0))
            texts.append(jax.jit(step).lower(state, batch, key).as_text())
        assert texts[0] == texts[1]


def test_adafactor_s_step_is_relative_to_the_base_s_parameter():
    """As many rows again, each r_in^-1/2 as large and with its gradient: r_in^-1 of the step."""
    wide, narrow = (
        llama("tiny", **ONE, width=width, heads=2, kv_heads=2, hidden=16) for width in (32, 16)
    )
    rule = optim.Adafactor(lambda step: 0.1, min_factored=4, clip_norm=0.5)
    rng, results = np.random.default_rng(0), []
    start, slope = (
        jax.tree.map(
            lambda leaf: rng.standard_normal(leaf.shape, np.float32), parameters.abstract(narrow)[0]
        )
        for _ in range(2)
    )
    scales = mup.scales(wide, narrow)

    def grown(tree, factor):
        shapes = parameters.abstract(wide)[0]
        return jax.tree.map(
            lambda s, like, x: tiled(x, like.shape) * np.float32(factor(s)),
            *(scales, shapes, tree),
            is_leaf=mup.is_scale,
        )

    for model, params, gradients in (
        (narrow, start, slope),
        (wide, grown(start, lambda s: s.spread), grown(slope, lambda s: 1 / s.entries / s.rate)),
    ):
        transform = optim.MuP(rule, model, narrow).build(parameters.abstract(model)[1])
        updates, _ = jax.jit(transform.update)(gradients, jax.jit(transform.init)(params), params)
        results.append(updates)
    expected = grown(results[0], lambda s: s.rate)
    for found, right in zip(jax.tree.leaves(results[1]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-8)


KINDS = {
    "decoder": lambda w: gpt2("tiny", **ONE, width=w, heads=2, hidden=2 * w, positions=16),
    "encoder": lambda w: bert("tiny", **ONE, width=w, heads=2, hidden=2 * w, positions=16),
    "encoder-decoder": lambda w: t5_1_0(
        "tiny", **ONE, width=w, heads=2, head_dim=w // 2, hidden=2 * w
    ),
}
WIDTHS = (32, 128)


def coordinates(kind, parametrised):
    models = [dataclasses.replace(KINDS[kind](w), vocab_multiple=8) for w in WIDTHS]
    adam = optim.AdamW(lambda step: jnp.float32(0.01))
    base = models[0] if parametrised else None
    return coordinate_check(models, adam, batch_of(models[0]), base, seeds=3)


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_keep_their_size(kind):
    """Heads become larger, so that a wrong scale of attention shows too."""
    rows = coordinates(kind, parametrised=True)
    found = slopes(rows, 4)
    stacks = [name for name in ("encoder", "decoder") if name in kind]
    assert {f"{stack}/0" for stack in stacks} | {"logits"} <= set(found)
    assert all(abs(found[name]) < 0.25 for name in found if "attention" not in name), found
    # Random queries and keys cancel out first, and agree later: attention's logits may shrink.
    assert all(-0.5 < found[name] < 0.25 for name in found if "attention" in name), found


def test_coordinates_grow_without():
    found = slopes(coordinates("decoder", parametrised=False), 4)
    assert all(slope > 0.5 for slope in found.values()), found


def test_a_run_says_what_it_does_and_keeps_its_base(data_dir, tmp_path, capsys):  # noqa: F811
    arguments = resumable.arguments(data_dir, tmp_path, "gpt2")
    arguments |= {"microbatches": 1, "steps": 2, "eval_period": None, "ema_decay": None}
    base = resumable.tiny_model("gpt2", width=8, layers=1)
    model = arguments["model"] = dataclasses.replace(arguments["model"], scan=False)
    adam = arguments["optimizer"]
    arguments["optimizer"] = optim.MuP(adam, model, base)
    loop.train(**arguments)
    said = capsys.readouterr().out
    assert "muP: width 16, of the base 8; rates are multiplied by" in said
    assert "0.5         in" in said
    table = (pathlib.Path(arguments["model_dir"]) / "parameters.txt").read_text()
    line = next(line for line in table.splitlines() if "layers_1/ffn/down/kernel" in line)
    assert line.split()[-3:] == ["hidden", "0.7071", "0.5"]
    # Who reads the checkpoint need know nothing of it.
    assert restore_params(model, arguments["model_dir"])[1] == 2
    with pytest.raises(UserError, match=r"holds another run \(mup: base of width 8 .* → None\)"):
        loop.train(**arguments | {"optimizer": adam, "steps": 3})
