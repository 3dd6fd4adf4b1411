"""Experts: exact beside a loop over tokens, whatever the sharding; what their losses get."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import optim
from t5x_lite.errors import UserError
from t5x_lite.nn import moe, parameters
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.layers import Common, FanIn
from t5x_lite.nn.moe import GroupLimit, MoEConfig, SigmoidRouter, SoftmaxRouter
from t5x_lite.nn.transformer import Transformer
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
    out_BTD, _ = module.apply({"params": params}, x_BTD, None)
    alone = dataclasses.replace(config, shared=None).build(module.common, "ffn")
    routed = {name: leaf for name, leaf in params.items() if name != "shared"}
    routed_BTD, _ = alone.apply({"params": routed}, x_BTD, None)
    shared = config.shared.build(module.common, "ffn")
    shared_BTD, _ = shared.apply({"params": params["shared"]}, x_BTD, None)
    np.testing.assert_allclose(out_BTD, routed_BTD + shared_BTD, rtol=1e-5, atol=1e-6)


def test_all_tokens_to_one_expert_are_all_computed():
    config = MoEConfig(6, EXPERT, SoftmaxRouter(1))
    module, params, x_BTD = build(config)
    x_BTD = jnp.abs(x_BTD)
    params["router"]["kernel"] = jnp.zeros((8, 6)).at[:, 4].set(9.0)
    out_BTD, aux = module.apply({"params": params}, x_BTD, None)
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
    _, aux = module.apply({"params": params}, x_BTD, None, segments_BT)
    _, short = module.apply({"params": params}, x_BTD[1:, :3], None)
    for name, value in aux.items():
        np.testing.assert_allclose(value[1], short[name][0], rtol=1e-5, err_msg=name)
    assert aux["router_tokens_B"].tolist() == [7, 3]
    balanced = {
        "expert_load_BE": jnp.full((1, 2, 6), 4.0),
        "expert_probs_BE": jnp.full((1, 2, 6), 2.0),
        "router_tokens_B": jnp.full((1, 2), 12.0),
    }
    assert moe.load_balance(balanced) == pytest.approx(2.0)  # top_k
    skewed = {**balanced, "expert_load_BE": jnp.asarray([[[24.0, 0, 0, 0, 0, 0]] * 2])}
    skewed["expert_probs_BE"] = skewed["expert_load_BE"] / 2
    assert moe.load_balance(skewed) == pytest.approx(12.0)
    stacked = {name: value[None] for name, value in aux.items()}
    z = moe.router_z_loss(stacked)
    logits = x_BTD @ params["router"]["kernel"]
    z_BT = jax.nn.logsumexp(logits, axis=-1) ** 2
    assert z == pytest.approx(float((z_BT[0].sum() + z_BT[1, :3].sum()) / 10), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "table"), [("mixtral", "fsdp_tp"), ("deepseek_v3", "fsdp"), ("mixtral", "dp")]
)
def test_eight_devices_equal_one(models, family, table):
    config = models.tiny(family)
    params, batch = models.random_params(config), models.packed_batch(config)
    _, axes = parameters.abstract(config)
    sharding = Sharding(MeshConfig(fsdp=2, expert=2, tensor=2).build(), table)

    def loss(run):
        def of(params, batch):
            output = run.apply({"params": params}, batch)
            return jnp.sum(jnp.sin(output.hidden_BTD)) + moe.load_balance(output.aux)

        return jax.jit(jax.value_and_grad(of))

    one, grads = loss(Transformer(config))(params, batch)
    placed = jax.tree.map(
        lambda names, leaf: jax.device_put(leaf, sharding.named(names, leaf.shape)),
        axes, params, is_leaf=parameters.is_axes,
    )  # fmt: skip
    rows = {n: jax.device_put(v, sharding.batch(v.shape)) for n, v in batch.items()}
    eight, split_grads = loss(Transformer(config, sharding))(placed, rows)
    assert float(eight) == pytest.approx(float(one), rel=1e-5)
    assert models.relative(jax.device_get(split_grads), grads) < 1e-5


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
    with pytest.raises(UserError, match=r"neither bias nor dropout"):
        MoEConfig(6, MLPConfig(5, "silu", bias=True), SoftmaxRouter(2))
