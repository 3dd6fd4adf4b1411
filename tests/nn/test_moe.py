"""Experts: exact beside a loop over tokens, whatever the sharding; what their losses get."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import optim
from t5x_lite.errors import UserError
from t5x_lite.nn import dispatch, grouped, loads, parameters
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.layers import Common, FanIn
from t5x_lite.nn.moe import GroupLimit, MoEConfig, SigmoidRouter, SoftmaxRouter
from t5x_lite.partitioning import MeshConfig, Sharding

EXPERT = MLPConfig(5, "silu", gated=True)
ROUTERS = {
    "softmax": SoftmaxRouter(2),
    "plain softmax": SoftmaxRouter(3, normalized=False, scale=1.5),
    "groups": SoftmaxRouter(2, normalized=False, groups=GroupLimit(3, 2)),
    "sigmoid": SigmoidRouter(2, scale=2.5, groups=GroupLimit(3, 2, best=2)),
}


def build(config, seed=0, shape=(2, 7, 8)):
    """A module, its parameters and an input."""
    module = config.build(Common("float32", FanIn()), "ffn")
    x_BTD = jax.random.normal(jax.random.key(seed), shape)
    params = jax.jit(module.init)(jax.random.key(1), x_BTD, None)["params"]
    params = jax.tree.map(lambda box: box.value, params, is_leaf=lambda b: hasattr(b, "value"))
    if "correction" in params["router"]:
        noise = 0.3 * jax.random.normal(jax.random.key(2), (config.experts,))
        params["router"]["correction"] = noise
    return module, params, x_BTD


def by_the_token(config, params, x_D):
    """One token by the definition, in float64: (result, chosen experts)."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    router, logits_E = config.router, x_D @ p["router"]["kernel"]
    scores_E = np.exp(logits_E) / np.exp(logits_E).sum()
    ranked_E = scores_E.copy()
    if isinstance(router, SigmoidRouter):
        scores_E = 1 / (1 + np.exp(-logits_E))
        ranked_E = scores_E + p["router"]["correction"]
    if router.groups is not None:
        groups = ranked_E.reshape(router.groups.groups, -1)
        good = np.sort(groups, axis=1)[:, -router.groups.best :].sum(axis=1)
        for group in np.argsort(good)[: -router.groups.chosen]:
            groups[group] = -np.inf
    chosen = np.argsort(ranked_E)[-router.top_k :]
    weights = scores_E[chosen] / (scores_E[chosen].sum() if router.normalized else 1)
    out = np.zeros_like(x_D)
    for expert, weight in zip(chosen, weights * router.scale, strict=True):
        gate, up, down = (p["experts"][n]["kernel"][expert] for n in ("gate", "up", "down"))
        hidden = x_D @ gate
        out += weight * (hidden / (1 + np.exp(-hidden)) * (x_D @ up) @ down)
    return out, chosen


@pytest.mark.parametrize("name", ROUTERS)
def test_each_token_passes_its_experts(name):
    config = MoEConfig(6, EXPERT, ROUTERS[name])
    module, params, x_BTD = build(config)
    out_BTD, aux = jax.jit(module.apply)({"params": params}, x_BTD, None)
    load_BE = np.zeros((2, 6))
    for row in range(2):
        for place in range(7):
            x_D = np.asarray(x_BTD[row, place], np.float64)
            expected, chosen = by_the_token(config, params, x_D)
            np.testing.assert_allclose(out_BTD[row, place], expected, rtol=2e-4, atol=1e-5)
            load_BE[row, chosen] += 1
    np.testing.assert_array_equal(aux["expert_load_BE"], load_BE)


def test_shared_experts_are_added():
    config = MoEConfig(6, EXPERT, SoftmaxRouter(2), shared=MLPConfig(4, "silu", gated=True))
    module, params, x_BTD = build(config)
    out_BTD, _ = jax.jit(module.apply)({"params": params}, x_BTD, None)
    alone = dataclasses.replace(config, shared=None).build(module.common, "ffn")
    routed = {name: leaf for name, leaf in params.items() if name != "shared"}
    routed_BTD, _ = jax.jit(alone.apply)({"params": routed}, x_BTD, None)
    shared = config.shared.build(module.common, "ffn")
    shared_BTD, _ = jax.jit(shared.apply)({"params": params["shared"]}, x_BTD, None)
    np.testing.assert_allclose(out_BTD, routed_BTD + shared_BTD, rtol=1e-5, atol=1e-6)


def test_all_tokens_to_one_expert_are_all_computed():
    config = MoEConfig(6, EXPERT, SoftmaxRouter(1))
    module, params, x_BTD = build(config)
    x_BTD = jnp.abs(x_BTD)
    params["router"]["kernel"] = jnp.zeros((8, 6)).at[:, 4].set(9.0)
    out_BTD, aux = jax.jit(module.apply)({"params": params}, x_BTD, None)
    np.testing.assert_array_equal(aux["expert_load_BE"], [[0, 0, 0, 0, 7, 0]] * 2)
    expected, _ = by_the_token(config, params, np.asarray(x_BTD[1, 6], np.float64))
    np.testing.assert_allclose(out_BTD[1, 6], expected, rtol=2e-4, atol=1e-5)


def test_a_router_learns_from_weights_and_its_correction_from_nothing():
    module, params, x_BTD = build(MoEConfig(6, EXPERT, ROUTERS["sigmoid"]))
    grads = jax.jit(jax.grad(lambda p: module.apply({"params": p}, x_BTD, None)[0].sum()))(params)
    assert np.all(np.asarray(grads["router"]["correction"]) == 0)
    assert np.abs(grads["router"]["kernel"]).max() > 1e-3
    assert np.abs(grads["experts"]["down"]["kernel"]).max() > 1e-3


def test_statistics_leave_out_padding_and_balance_is_least_where_equal():
    module, params, x_BTD = build(MoEConfig(6, EXPERT, SoftmaxRouter(2)))
    segments_BT = jnp.asarray([[1] * 7, [1, 1, 2, 0, 0, 0, 0]])
    _, aux = jax.jit(module.apply)({"params": params}, x_BTD, None, segments_BT)
    _, short = jax.jit(module.apply)({"params": params}, x_BTD[1:, :3], None)
    for name, value in aux.items():
        np.testing.assert_allclose(value[1], short[name][0], rtol=1e-5, err_msg=name)
    assert aux["router_tokens_B"].tolist() == [7, 3]
    balanced = {
        "expert_load_BE": jnp.full((1, 2, 6), 4.0),
        "expert_probs_BE": jnp.full((1, 2, 6), 2.0),
        "router_tokens_B": jnp.full((1, 2), 12.0),
    }
    assert loads.load_balance(balanced) == pytest.approx(2.0)  # top_k
    skewed = {**balanced, "expert_load_BE": jnp.asarray([[[24.0, 0, 0, 0, 0, 0]] * 2])}
    skewed["expert_probs_BE"] = skewed["expert_load_BE"] / 2
    assert loads.load_balance(skewed) == pytest.approx(12.0)
    stacked = {name: value[None] for name, value in aux.items()}
    z = loads.router_z_loss(stacked)
    logits = x_BTD @ params["router"]["kernel"]
    z_BT = jax.nn.logsumexp(logits, axis=-1) ** 2
    assert z == pytest.approx(float((z_BT[0].sum() + z_BT[1, :3].sum()) / 10), rel=1e-5)


MESHES = {
    "fsdp_ep_tp": MeshConfig(fsdp=2, expert=2, tensor=2),
    "ep": MeshConfig(fsdp=1, replica=4, expert=2),
    "ep_sp_tp": MeshConfig(fsdp=1, expert=2, sequence=2, tensor=2),
}
SHARED = MLPConfig(4, "silu", gated=True)
ON_MESHES = [
    *((MoEConfig(6, MLPConfig(6, "silu", gated=True), ROUTERS[name]), table)
      for name, table in zip(ROUTERS, ("fsdp_ep_tp", "ep", "ep_sp_tp", "fsdp_ep_tp"), strict=True)),
    (MoEConfig(6, MLPConfig(6, "gelu"), ROUTERS["sigmoid"], SHARED), "ep_sp_tp"),
    (MoEConfig(6, MLPConfig(6, "silu", gated=True), ROUTERS["groups"], SHARED, 0.8), "fsdp_ep_tp"),
    (MoEConfig(6, MLPConfig(6, "gelu"), ROUTERS["softmax"], capacity_factor=1.1), "ep_sp_tp"),
]  # fmt: skip
SEGMENTS = jnp.asarray([[1] * 6] * 5 + [[1, 1, 2, 2, 0, 0], [0] * 6, [1, 1, 1, 1, 1, 0]])


def split(module, table):
    """The same module on a mesh, and (names, shape) → where an array lies on it."""
    sharding = Sharding(MESHES[table].build(), table)
    common = dataclasses.replace(module.common, sharding=sharding)
    return dataclasses.replace(module, common=common), sharding


def place(module, params, x_BTD, sharding):
    """Parameters and tokens where they lie on a mesh."""
    tokens = sharding.named(("batch", "length", None), x_BTD.shape)
    boxed = jax.eval_shape(module.init, jax.random.key(0), x_BTD, None)["params"]
    placed = jax.tree.map(
        lambda box, leaf: jax.device_put(leaf, sharding.named(box.names, leaf.shape)),
        boxed, params, is_leaf=lambda b: hasattr(b, "names"),
    )  # fmt: skip
    return placed, jax.device_put(x_BTD, tokens)


def probe(module, x_BTD):
    """Compiled: (result, auxiliaries), and gradients of parameters and tokens."""
    noise_BTD = jnp.cos(jnp.arange(x_BTD.size, dtype=jnp.float32)).reshape(x_BTD.shape)

    def of(params, x_BTD):
        out_BTD, aux = module.apply({"params": params}, x_BTD, None, SEGMENTS)
        stacked = {name: leaf[None] for name, leaf in aux.items()}
        value = jnp.sum(out_BTD * noise_BTD) + loads.load_balance(stacked)
        return value, (out_BTD, aux)

    return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize(("config", "table"), ON_MESHES)
def test_a_mesh_with_experts_on_two_devices_each_equals_one_device(models, config, table):
    module, params, x_BTD = build(config, shape=(8, 6, 8))
    expected, grads = probe(module, x_BTD)(params, x_BTD)
    on_mesh, sharding = split(module, table)
    if config.capacity_factor is not None:
        assert expected[1][1]["expert_dropped_B"].sum() > 3
    placed, x_BTD = place(module, params, x_BTD, sharding)
    found, split_grads = probe(on_mesh, x_BTD)(placed, x_BTD)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert models.relative(found[1][0], expected[1][0]) < 1e-5
    for name, value in expected[1][1].items():
        np.testing.assert_allclose(found[1][1][name], value, rtol=1e-5, err_msg=name)
    for one, other in zip(jax.tree.leaves(split_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def moved(config, table):
    """What the forward pass sends between devices, {kind: [bytes a device gets]}, sorted."""
    module, params, x_BTD = build(config, shape=(8, 6, 8))
    on_mesh, sharding = split(module, table)
    run = jax.jit(lambda p, x: on_mesh.apply({"params": p}, x, None)[0])
    text = run.lower(*place(module, params, x_BTD, sharding)).compile().as_text()
    sent = {}
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in re.findall(rf" = (.*? (?:{kinds})(?:-start)?)\(", text):
        shapes, kind = line.rsplit(" ", 1)
        arrays = re.findall(r"[fs]32\[([\d,]+)", shapes)
        size = sum(np.prod([*map(int, dims.split(","))]) for dims in arrays)
        sent.setdefault(kind, []).append(4 * int(size))
    return {kind: sorted(sizes) for kind, sizes in sent.items()}


def test_tokens_move_as_they_should_and_nothing_else_does():
    """Of 8 rows of 6 tokens of width 8, a device has 2 rows (fsdp=2, expert=2), 384 bytes."""
    config = MoEConfig(6, MLPConfig(6, "silu", gated=True), SoftmaxRouter(2))
    rows = 2 * 6 * 8 * 4
    # Under fsdp=2 the router's kernel and three of each of its three experts' are gathered.
    kernels = [8 * 6 * 4, *[3 * 8 * 3 * 4] * 3]
    dropless = moved(config, "fsdp_ep_tp")
    # Tokens, their two picks and the weights of these come from both devices along the expert axis.
    # Sums go back, and are added up over the tensor axis once a token, not once a pick.
    picks = 2 * 2 * 6 * 2 * 4
    assert dropless == {
        "all-gather": sorted([*kernels, picks, picks, 2 * rows]),
        "reduce-scatter": [rows],
        "all-reduce": [rows],
    }
    places = moved(dataclasses.replace(config, capacity_factor=1.0), "fsdp_ep_tp")
    # Six experts' two places in each of two rows, there and back.
    buffers = 2 * 6 * 2 * 8 * 4
    assert places == {
        "all-gather": sorted(kernels), "all-to-all": [buffers] * 2, "all-reduce": [rows]
    }  # fmt: skip


def test_enough_capacity_drops_nothing():
    module, params, x_BTD = build(MoEConfig(6, EXPERT, ROUTERS["sigmoid"]))
    expected, _ = jax.jit(module.apply)({"params": params}, x_BTD, None)
    ample = dataclasses.replace(module.config, capacity_factor=3.0).build(module.common, "ffn")
    out_BTD, aux = jax.jit(ample.apply)({"params": params}, x_BTD, None)
    np.testing.assert_allclose(out_BTD, expected, rtol=1e-5, atol=1e-6)
    assert aux["expert_dropped_B"].tolist() == [0, 0]


def test_a_full_expert_takes_the_first_tokens_of_a_row_and_counts_the_others():
    config = MoEConfig(4, EXPERT, SoftmaxRouter(1), capacity_factor=1.0)
    module, params, x_BTD = build(config, shape=(2, 8, 8))
    x_BTD = jnp.abs(x_BTD).at[:, 3, 7].set(-1000.0)  # the fourth token picks expert 1, not 2
    params["router"]["kernel"] = jnp.zeros((8, 4)).at[:, 2].set(9.0).at[7, 1].set(-9.0)
    segments_BT = jnp.asarray([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 0]])
    out_BTD, aux = jax.jit(module.apply)({"params": params}, x_BTD, None, segments_BT)
    alone = dataclasses.replace(config, capacity_factor=None).build(module.common, "ffn")
    free, _ = jax.jit(alone.apply)({"params": params}, x_BTD, None)
    # 8 tokens to 4 experts: two places. Padding takes none.
    kept_BT = np.asarray([[1, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]], bool)
    np.testing.assert_allclose(out_BTD[kept_BT], free[kept_BT], rtol=1e-5, atol=1e-6)
    assert np.abs(free).min(axis=-1).max() > 0
    assert np.all(np.asarray(out_BTD)[~kept_BT] == 0)
    assert aux["expert_dropped_B"].tolist() == [5, 1]
    assert aux["expert_load_BE"].tolist() == [[0, 1, 7, 0], [0, 1, 3, 0]]
    # Whatever comes later, a token's place is its own.
    later = x_BTD.at[:, 5:].multiply(-1.0)
    again, _ = jax.jit(module.apply)({"params": params}, later, None, segments_BT)
    np.testing.assert_array_equal(again[:, :5], out_BTD[:, :5])


@pytest.mark.parametrize(("length", "picked", "factor", "size"), [
    (8, 1, 1.0, 2), (8, 2, 1.25, 5), (8, 2, 100.0, 8), (1, 2, 0.1, 1), (10, 3, 1.0, 8),
])  # fmt: skip
def test_a_capacity_is_the_mean_number_of_picks_times_the_factor(length, picked, factor, size):
    assert dispatch.capacity(length, picked, 4, factor) == size


def test_what_a_ragged_product_leaves_undefined_reaches_nothing(monkeypatch):
    """The TPU's leaves rows after its last group as they were in memory; here they are NaN."""

    def poisoned(platform, x_MD, kernels_EDF, sizes_E):
        last = (jnp.arange(len(x_MD)) >= jnp.sum(sizes_E))[:, None]

        @jax.custom_vjp
        def poison(x):
            return jnp.where(last, jnp.nan, x)

        poison.defvjp(lambda x: (poison(x), None), lambda _, g: (jnp.where(last, jnp.nan, g),))
        return poison(jax.lax.ragged_dot(poison(x_MD), kernels_EDF, sizes_E))

    rng = np.random.default_rng(0)
    kernels = {n: jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.float32) for n in ("up", "down")}
    chosen_BTK = jnp.asarray(rng.permuted(np.tile(np.arange(6) - 2, (5, 1)), axis=1)[None, :, :3])
    x_BTD, weights = jnp.asarray(rng.normal(size=(1, 5, 4)), jnp.float32), jnp.ones((1, 5, 3))

    def of(kernels, x_BTD):
        return jnp.sum(jnp.sin(dispatch._own(x_BTD, chosen_BTK, weights, kernels, "silu", "cpu")))

    expected = jax.value_and_grad(of, argnums=(0, 1))(kernels, x_BTD)
    monkeypatch.setattr(dispatch, "grouped_product", poisoned)
    found = jax.value_and_grad(of, argnums=(0, 1))(kernels, x_BTD)
    assert np.abs(expected[1][1]).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_the_tpu_compiler_multiplies_each_row_by_one_kernel(tpu, uncached):
    """Forwards and backwards; `ragged_dot`'s own gradient multiplies by all eight."""
    where = jax.sharding.SingleDeviceSharding(tpu("v5e:2x2")[0])
    shapes = {"x": (512, 128), "kernels": (8, 128, 256)}
    x, kernels = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where) for s in shapes.values())
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=where)

    def flops(product):
        def total(x, kernels, sizes):
            return jnp.sum(jnp.square(product(x, kernels, sizes).astype(jnp.float32)))

        lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, kernels, sizes)
        return lowered.compile().cost_analysis()["flops"]

    once = 2 * 512 * 128 * 256
    assert 3 * once <= flops(functools.partial(grouped.grouped_product, "tpu")) < 3.2 * once
    assert flops(jax.lax.ragged_dot) > 9 * once


@pytest.mark.parametrize("rows", [16, 37])
def test_the_tpu_s_gradient_of_kernels_is_the_ragged_product_s(rows):
    rng = np.random.default_rng(0)
    x_MD, out_MF = (jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for n in (8, 6))
    sizes_E = jnp.asarray([3, 0, 9, rows - 15])  # three rows belong to none
    found = grouped.kernel_gradient(x_MD, out_MF, sizes_E, interpret=True)
    _, pull = jax.vjp(lambda k: jax.lax.ragged_dot(x_MD, k, sizes_E), jnp.ones((4, 8, 6)))
    np.testing.assert_allclose(found, pull(out_MF)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [optim.AdamW, optim.Adafactor])
def test_no_optimizer_moves_a_correction(models, rule):
    config = models.tiny("deepseek_v3")
    params, batch = models.random_params(config), models.packed_batch(config)
    noise = jax.random.normal(jax.random.key(3), (4, 8, config.width))
    _, grads = models.probe(config)(params, batch, None, noise)
    transform = rule(lambda step: 0.1, weight_decay=0.1).build(parameters.abstract(config)[1])
    updates, _ = jax.jit(transform.update)(grads, transform.init(params), params)
    router = updates["decoder"]["layers"]["ffn"]["router"]
    assert np.all(np.asarray(router["correction"]) == 0)
    assert np.abs(router["kernel"]).min() > 0


def test_bfloat16_sends_few_tokens_elsewhere(models):
    exact = models.tiny("deepseek_v3")
    params, batch = models.random_params(exact), models.packed_batch(exact)
    rounded = models.forward(dataclasses.replace(exact, dtype="bfloat16"))
    errors = np.sort([
        models.relative(a, b)
        for a, b in zip(
            rounded(params, batch).hidden_BTD.reshape(-1, exact.width),
            models.forward(exact)(params, batch).hidden_BTD.reshape(-1, exact.width),
            strict=True,
        )
    ])  # fmt: skip
    assert errors[0] > 1e-4
    assert errors[-4] < 0.05


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match=r"top_k=7 must lie in 1 … experts=6"):
        MoEConfig(6, EXPERT, SoftmaxRouter(7))
    with pytest.raises(UserError, match=r"experts=6 don't divide into groups=4"):
        MoEConfig(6, EXPERT, SoftmaxRouter(2, groups=GroupLimit(4, 2)))
    with pytest.raises(UserError, match=r"1 groups of 2 experts have too few for top_k=3"):
        MoEConfig(6, EXPERT, SoftmaxRouter(3, groups=GroupLimit(3, 1)))
    with pytest.raises(UserError, match=r"chosen=4 must lie in 1 … groups=3"):
        GroupLimit(3, 4)
    with pytest.raises(UserError, match=r"capacity_factor=0 must be above 0"):
        MoEConfig(6, EXPERT, SoftmaxRouter(2), capacity_factor=0)
    with pytest.raises(UserError, match=r"neither bias nor dropout"):
        MoEConfig(6, MLPConfig(5, "silu", bias=True), SoftmaxRouter(2))
