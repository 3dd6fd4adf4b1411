"""Optimizers against their papers' equations in NumPy, and the layout of their state."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import optim, schedules
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.presets import bert, gpt2, llama, t5

# More layers than any axis has entries, and axes of equal sizes: which axis a factor has kept must
# not be told by its size.
STEPS, LAYERS = 3, 11
AXES = {
    "embedder": {"embedding": ("vocab", "embed")},
    "layers": {
        "norm": {"scale": ("layers", "norm")},
        "query": {"kernel": ("layers", "embed", "heads", "head_dim")},
        "result": {"kernel": ("layers", "heads", "head_dim", "embed")},
        "up": {"bias": ("layers", "mlp"), "kernel": ("layers", "embed", "mlp")},
    },
    "experts": {"kernel": ("expert", "embed", "mlp")},
    "key": {"bias": ("kv_heads", "head_dim"), "kernel": ("embed", "kv_heads", "head_dim")},
    "out": {"kernel": ("mlp", "embed")},
}
SHAPES = {
    "embedder": {"embedding": (10, 6)},
    "layers": {
        "norm": {"scale": (LAYERS, 6)},
        "query": {"kernel": (LAYERS, 6, 2, 3)},
        "result": {"kernel": (LAYERS, 2, 3, 6)},
        "up": {"bias": (LAYERS, 6), "kernel": (LAYERS, 6, 6)},
    },
    "experts": {"kernel": (5, 5, 5)},
    "key": {"bias": (4, 4), "kernel": (5, 5, 5)},
    "out": {"kernel": (3, 6)},
}
RATE = schedules.linear(0.1, STEPS)
RATES = [0.1, 0.1 * 2 / 3, 0.1 / 3]


def is_shape(node):
    return isinstance(node, tuple)


def noise(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: scale * rng.standard_normal(shape, np.float32), SHAPES, is_leaf=is_shape
    )


# The first gradients are within the norm that AdamW clips at; each is larger than the one before,
# so that Adafactor's updates outgrow the second moments that they are divided by.
GRADIENTS = [noise(seed, scale) for seed, scale in ((1, 0.01), (2, 0.1), (3, 1.0))]


def flat(tree):
    return {optim.path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def run(optimizer, gradients=GRADIENTS):
    """The parameters after each step, and the last state."""
    transform = optimizer.build(AXES)

    @jax.jit
    def step(params, state, gradient):
        updates, state = transform.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params = jax.tree.map(jnp.asarray, noise(0))
    state, history = jax.jit(transform.init)(params), []
    for gradient in gradients:
        params, state = step(params, state, jax.tree.map(jnp.asarray, gradient))
        history.append(flat(params))
    return history, state


def by_layer(update):
    """Applies a reference to every tensor of its own: each layer of a stack is one."""

    def each(params, gradients, *rest):
        result = {}
        for name, param in params.items():
            stacked = name.startswith("layers/")
            layers = range(LAYERS) if stacked else [...]
            parts = [
                update(f"{name}@{layer}", param[layer], gradients[name][layer], *rest)
                for layer in layers
            ]
            result[name] = np.stack(parts) if stacked else parts[0]
        return result

    return each


def decays(name):
    return name.split("@")[0].endswith(("kernel", "embedding"))


def assert_follows(history, reference):
    params = {name: x.astype(np.float64) for name, x in flat(noise(0)).items()}
    for step, found in enumerate(history):
        gradients = {name: g.astype(np.float64) for name, g in flat(GRADIENTS[step]).items()}
        params = reference(params, gradients, step + 1)
        for name, expected in params.items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_adamw_follows_its_paper(clip_norm):
    """Loshchilov and Hutter 2019, algorithm 2, lines 6-12; the rate scales the decay too, as in
    PyTorch: η·α there is the rate here, and η·λ is rate · weight_decay."""
    b1, b2, epsilon, decay = 0.9, 0.95, 1e-8, 0.1
    moments = {}

    @by_layer
    def update(name, x, g, t):
        m, v = moments.get(name, (0, 0))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        moments[name] = m, v
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        return x - RATES[t - 1] * (m_hat / (np.sqrt(v_hat) + epsilon) + decay * decays(name) * x)

    def reference(params, gradients, t):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        assert (norm > 1) == (t > 1)
        factor = min(1, clip_norm / norm) if clip_norm else 1
        return update(params, {name: factor * g for name, g in gradients.items()}, t)

    assert_follows(run(optim.AdamW(RATE, clip_norm=clip_norm))[0], reference)


def root_mean_square(x):
    return np.sqrt(np.mean(x**2))


def by_heads(name, x):
    """A layer's tensor with the axis of heads and that of their entries as one."""
    names = [axis for axis in OWNERS[name.split("@")[0]] if axis != "layers"]
    if "head_dim" not in names:
        return x
    at = names.index("head_dim")
    return x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_follows_its_paper(decay):
    """Shazeer and Stern 2018, algorithms 4 (matrices) and 5 (vectors), hyperparameters of 6.

    Heads and their entries are one axis. A tensor of more axes than two is a stack of the matrices
    of its two largest ones.
    """
    moments, clipped = {}, set()

    @by_layer
    def update(name, x, g, t):
        beta = 1 - t**-0.8
        alpha = max(1e-3, root_mean_square(x)) * RATES[t - 1]
        tensor, (x, g) = x.shape, (by_heads(name, each) for each in (x, g))
        square = g**2 + 1e-30
        if x.ndim > 1 and sorted(x.shape)[-2] >= 4:
            second, first = np.argsort(x.shape)[-2:]
            rows, columns = moments.get(name, (0, 0))
            rows = beta * rows + (1 - beta) * np.sum(square, axis=first, keepdims=True)
            columns = beta * columns + (1 - beta) * np.sum(square, axis=second, keepdims=True)
            moments[name] = rows, columns
            v = rows * columns / np.sum(rows, axis=second, keepdims=True)
        else:
            v = moments[name] = beta * moments.get(name, 0) + (1 - beta) * square
        u = g / np.sqrt(v)
        if root_mean_square(u) > 1.1:
            clipped.add((t, x.ndim))
        u = u / max(1, root_mean_square(u) / 1.0)
        return (x - alpha * u - RATES[t - 1] * decay * decays(name) * x).reshape(tensor)

    history, _ = run(optim.Adafactor(RATE, min_factored=4, weight_decay=decay))
    assert_follows(history, update)
    assert {(2, 1), (2, 2), (3, 3)} <= clipped


@pytest.mark.parametrize(("heads", "entries"), [(2, 3), (12, 11)])
@pytest.mark.parametrize("first", [True, False])
def test_adafactor_of_a_kernel_is_optax_s_of_its_matrix(heads, entries, first):
    """Attention's kernels against a chain that we had no hand in, on what they multiply by."""
    width, least = 7, 4
    names = ("heads", "head_dim"), (heads, entries)
    axes, shape = ((*part, end) if first else (end, *part)
                   for part, end in zip(names, ("embed", width), strict=True))  # fmt: skip
    matrix = (heads * entries, width) if first else (width, heads * entries)
    ours = optim.Adafactor(RATE, min_factored=least).build({"kernel": axes})
    theirs = optax.adafactor(RATE, min_dim_size_to_factor=least, multiply_by_parameter_scale=True,
                             clipping_threshold=1.0, momentum=None)  # fmt: skip
    rng = np.random.default_rng(0)
    params = [{"kernel": jnp.asarray(rng.standard_normal(shape, np.float32))}]
    params += [{"kernel": params[0]["kernel"].reshape(matrix)}]
    states = [rule.init(each) for rule, each in zip((ours, theirs), params, strict=True)]
    for scale in (0.1, 1.0, 10.0):
        gradient = jnp.asarray(scale * rng.standard_normal(shape, np.float32))
        for at, (rule, size) in enumerate(((ours, shape), (theirs, matrix))):
            step, states[at] = jax.jit(rule.update)(
                {"kernel": gradient.reshape(size)}, states[at], params[at]
            )
            params[at] = jax.tree.map(jnp.add, params[at], step)
    found, expected = (each["kernel"].reshape(matrix) for each in params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(state)) for state in states]
    assert sizes[0] <= sizes[1]


def test_what_is_not_factored_keeps_its_shape():
    state = named_state(optim.Adafactor(RATE, min_factored=16))
    assert state["0/key/kernel/0/v"] == ((5, 5, 5), ("embed", "kv_heads", "head_dim"))
    state = named_state(optim.Adafactor(RATE, min_factored=4))
    assert state["0/key/bias/0/v"] == ((16,), ("kv_heads",))  # a vector, however it lies
    assert state["0/layers/result/kernel/0/v_row"] == ((LAYERS, 6), ("layers", "heads"))
    assert state["0/layers/result/kernel/0/v_col"] == ((LAYERS, 6), ("layers", "embed"))
    assert state["0/layers/query/kernel/0/v_row"] == ((LAYERS, 6), ("layers", "embed"))
    assert state["0/layers/query/kernel/0/v_col"] == ((LAYERS, 6), ("layers", "heads"))
    assert state["0/key/kernel/0/v_col"] == ((25,), ("kv_heads",))


def test_clipping_is_by_the_norm_of_all_gradients_together():
    (clip,) = optim.clip(2.0)
    gradients = jax.tree.map(jnp.asarray, GRADIENTS[2])
    clipped, _ = jax.jit(clip.update)(gradients, clip.init(gradients))
    before, after = flat(gradients), flat(clipped)
    assert np.sqrt(sum(np.sum(x**2) for x in after.values())) == pytest.approx(2, rel=1e-6)
    for name, gradient in before.items():
        np.testing.assert_allclose(after[name] / gradient, (after[name] / gradient).flat[0], 1e-5)
    assert optim.clip(None) == []


@pytest.mark.parametrize(
    "config", [t5.t5_1_0("tiny"), t5.t5_1_1("tiny"), bert.bert("tiny"), gpt2.gpt2(), llama.llama()]
)
def test_matrices_decay_and_norms_and_biases_do_not(config):
    mask = optim.decay_mask(optim.AdamW(RATE).decay, parameters.abstract(config)[1])
    decayed = {name for name, on in flat(mask).items() if on}
    kept = set(flat(mask)) - decayed
    assert {name.rsplit("/", 1)[-1] for name in kept} <= {"scale", "bias"}
    assert not [name for name in decayed if name.endswith(("scale", "bias"))]
    assert any("norm" in name for name in kept)


def test_decay_must_be_a_regular_expression():
    with pytest.raises(UserError, match=r"decay='\(kernel' is not a regular expression"):
        optim.AdamW(RATE, decay="(kernel").build(AXES)


def abstract(shapes):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=is_shape
    )


def named_state(optimizer):
    """path → (shape, logical axes) of the optimizer's state."""
    shapes = abstract(SHAPES)
    state = jax.eval_shape(optimizer.build(AXES).init, shapes)
    names = optim.state_axes(state, shapes, AXES)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = zip(leaves, jax.tree.structure(state).flatten_up_to(names), strict=True)
    return {optim.path_name(path): (leaf.shape, n) for (path, leaf), n in named}


OWNERS = {
    optim.path_name(path): names
    for path, names in jax.tree_util.tree_leaves_with_path(AXES, is_leaf=is_shape)
}


def owner(path):
    return next(names for name, names in OWNERS.items() if f"/{name}/" in f"/{path}/")


@pytest.mark.parametrize(
    ("optimizer", "kinds"),
    [(optim.AdamW(RATE), {"mu", "nu"}), (optim.Adafactor(RATE, min_factored=99), {"v"})],
)
def test_moments_of_a_parameter_s_shape_have_its_axes(optimizer, kinds):
    state = named_state(optimizer)
    assert all(len(shape) == len(names) for shape, names in state.values())
    moments = {path: names for path, (_, names) in state.items() if kinds & set(path.split("/"))}
    assert len(moments) == len(kinds) * len(OWNERS)
    for path, names in moments.items():
        assert names == owner(path), path


@pytest.mark.parametrize("place", range(3))
def test_factors_have_the_axes_that_they_vary_along(place):
    """A gradient that differs along one axis alone shows which factors have kept that axis."""
    optimizer = optim.Adafactor(RATE, min_factored=4)

    def sloped(names):
        own = [name for name in names if name != "layers"]
        return own[place] if place < len(own) else None

    def slope(shape, names):
        along = [
            1 + np.arange(n) if name == sloped(names) else [1]
            for n, name in zip(shape, names, strict=True)
        ]
        return np.broadcast_to(math.prod(np.ix_(*along)), shape).astype(np.float32)

    _, state = run(optimizer, [jax.tree.map(slope, SHAPES, AXES, is_leaf=is_shape)])
    named = named_state(optimizer)
    factors = {
        path: value for path, value in flat(state).items()
        if path.endswith(("v_row", "v_col")) and value.shape[-1] > 1
    }  # fmt: skip
    assert len(factors) == 2 * 6  # not of the norm, biases, and `out`, whose rows are too few
    for path, value in factors.items():
        names = named[path][1]
        one = [name for name in owner(path) if name != "head_dim"]  # within the axis of heads
        assert len(names) == len(one) - 1, path
        varying = {
            name for axis, name in enumerate(names) if np.any(np.diff(value, axis=axis) > 0.1)
        }
        slope_of = sloped(owner(path))
        if slope_of == "head_dim":
            slope_of = next(name for name in one if name.endswith("heads"))
        assert varying == {slope_of} & set(names), path
