"""Experts in a run: their losses beside microbatches and meshes, corrections, loads in the log."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses, optim, router_losses, schedules
from t5x_lite.errors import UserError
from t5x_lite.nn import loads, parameters
from t5x_lite.nn.config import Pattern
from t5x_lite.nn.ffn import MLPConfig
from t5x_lite.nn.layers import Common, FanIn
from t5x_lite.nn.moe import MoEConfig, SigmoidRouter
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.mixtral import mixtral
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train import loop
from t5x_lite.train.corrections import correction_rule
from t5x_lite.train.layout import check_layout
from t5x_lite.train.restore import restore_params
from t5x_lite.train.state import TrainState
from t5x_lite.train.step import accumulate, make_train_step, model_apply
from t5x_lite.types import Output, Unembedding

SCRIPT = pathlib.Path(__file__).with_name("resumable.py")
SPEC = importlib.util.spec_from_file_location("resumable", SCRIPT)
resumable = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(resumable)

EXPERTS, WIDTH = 4, 8
MOE = MoEConfig(EXPERTS, MLPConfig(6, "gelu"), SigmoidRouter(2), capacity_factor=1.0)
ROUTED = router_losses.Routed(load_balance=0.5, row_balance=0.3, z_loss=0.2)
TERMS = {"load_balance", "row_balance", "router_z_loss"}


def toy_apply(sharding=None):
    """A model of an embedding, one layer of experts, and an unembedding; quick to compile."""
    module = MOE.build(Common("float32", FanIn(), sharding=sharding), "ffn")

    def apply(params, batch, keys=None):
        del keys
        x_BTD = params["embedding"][batch["tokens"]]
        out_BTD, aux = module.apply({"params": params["ffn"]}, x_BTD, None, batch["segments"])
        aux = {name: leaf[None] for name, leaf in aux.items()}
        return Output(out_BTD, Unembedding(params["embedding"], None, 16), aux=aux)

    return apply


@pytest.fixture(scope="module")
def toy():
    """Parameters whose routers are far from balanced, and rows of as many different lengths."""
    rng = np.random.default_rng(0)
    kernels = {"up": (EXPERTS, WIDTH, 6), "down": (EXPERTS, 6, WIDTH)}
    shapes = {
        "embedding": (16, WIDTH),
        "ffn": {
            "router": {"kernel": (WIDTH, EXPERTS), "correction": (EXPERTS,)},
            "experts": {name: {"kernel": shape} for name, shape in kernels.items()},
        },
    }
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    params = jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))
    params["ffn"]["router"]["correction"] = np.asarray([0.4, 0, 0, -0.4], np.float32)
    tokens, targets = (rng.integers(0, 16, (8, 6), np.int32) for _ in range(2))
    count = np.asarray([6, 3, 0, 6, 5, 1, 6, 4])[:, None]
    real = np.arange(6)[None] < count
    weights = (real & (rng.random((8, 6)) < 0.7)).astype(np.float32)
    batch = {"tokens": tokens, "targets": targets, "segments": real.astype(np.int32)}
    return jax.tree.map(jnp.asarray, (params, batch | {"weights": weights}))


def run(toy, loss=ROUTED, microbatches=1, sharding=None):
    """Gradients, metrics and loads of one batch."""
    params, batch = toy
    state = TrainState(jnp.zeros((), jnp.int32), params, ())
    if sharding is not None:
        batch = {n: jax.device_put(x, sharding.batch(x.shape, n)) for n, x in batch.items()}
    step = jax.jit(
        lambda s, b: accumulate(loss, toy_apply(sharding), s, b, None, microbatches, sharding)
    )
    return jax.tree.map(np.asarray, step(state, batch))


@pytest.fixture(scope="module")
def whole(toy):
    return run(toy)


def test_terms_and_loads_are_what_they_say(toy, whole):
    """By the token, in NumPy and float64."""
    params, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), toy)
    router = params["ffn"]["router"]
    logits = params["embedding"][np.asarray(toy[1]["tokens"])] @ router["kernel"]
    scores = 1 / (1 + np.exp(-logits))
    picks = np.argsort(scores + router["correction"])[..., -2:]
    shares, probs, z, each, sizes = np.zeros(4), np.zeros(4), 0.0, 0.0, 0
    for row in range(8):
        own, own_probs = np.zeros(4), np.zeros(4)
        count = int(batch["segments"][row].sum())
        for slot in range(count):
            own[picks[row, slot]] += 1
            own_probs += scores[row, slot] / scores[row, slot].sum()
            z += np.log(np.exp(logits[row, slot]).sum()) ** 2
        each += 4 * (own * own_probs).sum() / max(count, 1)  # / count² for the mean, times count
        shares, probs, sizes = shares + own, probs + own_probs, sizes + count
    _, metrics, found = whole
    np.testing.assert_array_equal(found["picks_LE"], [shares])
    expected = {
        "load_balance": 4 * (shares * probs).sum() / sizes**2,
        "row_balance": each / sizes,
        "router_z_loss": z / sizes,
        "expert_load_max": shares.max() * 4 / shares.sum(),
        "expert_load_min": shares.min() * 4 / shares.sum(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    total = metrics["cross_entropy"] + 0.5 * expected["load_balance"]
    total += 0.3 * expected["row_balance"] + 0.2 * expected["router_z_loss"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert 0 < metrics["expert_dropped"] < 0.5


def test_microbatches_change_the_balance_of_the_batch_and_nothing_else(toy, whole):
    gradients, metrics, found = run(toy, microbatches=4)
    for name, value in whole[1].items():
        if name not in ("load_balance", "loss"):
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found["picks_LE"], whole[2]["picks_LE"])
    # Each microbatch's own balance, averaged by tokens; the third has least.
    params, batch = toy
    parts = [run((params, {n: x[i::4] for n, x in batch.items()}))[1] for i in range(4)]
    tokens = [float((np.asarray(batch["segments"])[i::4] > 0).sum()) for i in range(4)]
    mean = np.average([part["load_balance"] for part in parts], weights=tokens)
    assert metrics["load_balance"] == pytest.approx(mean, rel=1e-5)
    assert 1.02 < metrics["load_balance"] / whole[1]["load_balance"] < 1.2
    # Without that term, gradients agree.
    rest = dataclasses.replace(ROUTED, load_balance=0)
    one, four = run(toy, rest)[0], run(toy, rest, 4)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), four, one)
    assert np.abs(gradients["ffn"]["router"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("microbatches", [1, 2])
def test_balance_is_the_microbatch_s_whatever_the_mesh(toy, whole, microbatches):
    expected = whole if microbatches == 1 else run(toy, microbatches=2)
    sharding = Sharding(MeshConfig(fsdp=2, expert=2, tensor=2).build(), "fsdp_ep_tp")
    gradients, metrics, found = run(toy, microbatches=microbatches, sharding=sharding)
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found["picks_LE"], expected[2]["picks_LE"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected[0]
    )


def test_an_encoder_has_terms_of_its_own(whole):
    batch = {"tokens": jnp.ones((2, 3)), "encoder_features": jnp.ones((2, 5, 7))}
    batch |= {"encoder_segments": jnp.asarray([[1, 1, 1, 2, 0], [0] * 5])}
    rng = np.random.default_rng(0)
    names = ("expert_load_BE", "expert_probs_BE", "router_z_B", "router_tokens_B")
    encoder = {n: jnp.asarray(rng.random((3, 2, 4)[: 3 if "BE" in n else 2])) for n in names}
    aux = {f"encoder_{name}": value for name, value in encoder.items()}

    class Nothing:
        coefficients = MappingProxyType({})

        def weights(self, batch):
            return {}

        def __call__(self, apply, params, state, batch, keys):
            return losses.Sums({}, {}, loads.of(apply(params, batch, keys).aux))

    loss = router_losses.Routed(Nothing(), row_balance=0.1)
    sums = loss(lambda *_: Output(None, aux=aux), {}, None, batch, None)
    assert set(sums.terms) == {f"encoder_{name}" for name in TERMS}
    assert set(sums.terms) <= set(loss.coefficients)
    weights = loss.weights(batch)
    assert {n: float(weights[n]) for n in sums.terms} == dict.fromkeys(sums.terms, 4.0)
    assert float(weights["load_balance"]) == 6
    assert set(sums.loads) == {"encoder_picks_LE"}
    assert loads.summary(sums.loads)["expert_load_max"] > 1


# Layers whose routers differ in kind: corrections are only in every second one.
def patterned(scan=True):
    config = mixtral("tiny", width=16, layers=5, heads=2, kv_heads=1, hidden=8, vocab_size=32,
                     experts=6, scan=scan)  # fmt: skip
    soft = config.decoder.block
    corrected = dataclasses.replace(
        soft, ffn=dataclasses.replace(soft.ffn, router=SigmoidRouter(1))
    )
    dense = dataclasses.replace(soft, ffn=MLPConfig(8, "gelu"))
    pattern = Pattern((corrected, soft), first=(dense,))
    return dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, layers=6, block=pattern)
    )


def corrections(params):
    """{path: values} of all corrections."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {optim.path_name(path): np.asarray(leaf) for path, leaf in leaves}
    return {path: leaf for path, leaf in found.items() if path.endswith("correction")}


@pytest.mark.parametrize("scan", [True, False])
def test_each_correction_moves_by_its_own_layer_s_load(scan):
    """Layers 1, 3 and 5 of 6 have one, by which they pick experts 1, 3 and 5 each time."""
    config = patterned(scan)
    shapes, _ = parameters.abstract(parameters.scanned(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes)
    decoder = params["decoder"]
    favourites = 9 * np.eye(6, dtype=np.float32)
    decoder["layers"]["block_0"]["ffn"]["router"]["correction"] = favourites[[1, 3]]
    decoder["last_0"]["ffn"]["router"]["correction"] = favourites[5]
    params = params if scan else parameters.unstack_layers(params)
    tokens = jnp.asarray(rng.integers(0, 32, (2, 4), np.int32))
    aux = jax.jit(model_apply(config))(params, {"tokens": tokens}).aux
    picks = loads.of(aux)
    assert picks["picks_LE"].shape == (5, 6)
    before, after = (corrections(p) for p in (params, correction_rule(config, 0.25)(params, picks)))
    moves = {path: after[path] - before[path] for path in before}
    down = 0.25 - 0.5 * np.eye(6)
    rounds = {"layers/block_0": down[[1, 3]]}
    if not scan:
        rounds = {"layers_0/block_0": down[1], "layers_1/block_0": down[3]}
    expected = {**rounds, "last_0": down[5]}
    assert moves.keys() == {f"decoder/{name}/ffn/router/correction" for name in expected}
    for name, move in expected.items():
        found = moves[f"decoder/{name}/ffn/router/correction"]
        np.testing.assert_allclose(found, move, atol=1e-6, err_msg=name)


def with_block(model, **changes):
    """A decoder-only model of one kind of block, which is changed."""
    block = dataclasses.replace(model.decoder.block, **changes)
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, block=block))


def test_corrections_balance_loads(toy):
    """With nothing else that trains, the most popular expert's share comes down to the mean."""
    params, batch = toy
    decoder = {"layers": {"ffn": jax.tree.map(lambda leaf: leaf[None], params["ffn"])}}
    model = with_block(mixtral("tiny", layers=1), ffn=MOE)
    inner = toy_apply()

    def apply(params, batch, keys=None):
        own = jax.tree.map(lambda leaf: leaf[0], params["decoder"]["layers"]["ffn"])
        return inner({"embedding": params["embedding"], "ffn": own}, batch, keys)

    params = {"embedding": params["embedding"], "decoder": decoder}
    transform = optim.AdamW(schedules.constant(0.0)).build(
        jax.tree.map(lambda leaf: (None,) * leaf.ndim, params)
    )
    step = jax.jit(make_train_step(
        apply, losses.CrossEntropy(), transform, schedules.constant(0.0), 2, 0.9,
        correct=correction_rule(model, 0.01),
    ))  # fmt: skip
    state = TrainState(jnp.zeros((), jnp.int32), params, transform.init(params), ema=params)
    history = []
    for _ in range(80):
        state, metrics = step(state, batch, jax.random.key(0))
        history.append({name: float(value) for name, value in metrics.items()})
    # Few tokens, of which some are alike: they change sides together.
    assert history[0]["expert_load_max"] > 1.8
    assert np.mean([row["expert_load_max"] for row in history[-20:]]) < 1.3
    assert history[-1]["expert_dropped"] < 0.6 * history[0]["expert_dropped"]
    now = state.params["decoder"]["layers"]["ffn"]["router"]
    np.testing.assert_array_equal(now["kernel"], decoder["layers"]["ffn"]["router"]["kernel"])


def test_a_run_logs_and_shows_the_loads_of_its_experts(tmp_path, capsys):
    shape = {"width": 16, "heads": 2, "kv_heads": 1, "hidden": 8, "vocab_size": 363}
    ffn = dataclasses.replace(MOE, capacity_factor=0.75)
    arguments = resumable.arguments(tmp_path, tmp_path, "gpt2") | {
        "model": with_block(mixtral("tiny", layers=1, **shape), ffn=ffn),
        "loss": ROUTED, "steps": 2, "microbatches": 1, "eval_period": None, "ema_decay": None,
        "mesh": MeshConfig(fsdp=-1, expert=2), "rules": "fsdp_ep",
    }  # fmt: skip
    loop.train(**arguments)
    path = pathlib.Path(arguments["model_dir"]) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert TERMS | {"cross_entropy"} <= set(rows[0])
    assert 1 < rows[0]["expert_load_max"] < 4
    assert 0 <= rows[0]["expert_load_min"] < 1
    # At most three quarters of the picks find a place.
    assert 0.25 <= rows[0]["expert_dropped"] < 0.9
    params, _ = restore_params(arguments["model"], arguments["model_dir"])
    (moved,) = corrections(params).values()
    assert set(np.round(1000 * moved).ravel()) <= {-2, -1, 0, 1, 2}
    assert np.abs(moved).max() >= 0.9e-3
    shown = capsys.readouterr().out
    assert f"experts ≤ {rows[0]['expert_load_max']:.2f}×" in shown
    assert f"dropped {rows[0]['expert_dropped']:.1%}" in shown


def test_what_cannot_work_is_refused(toy):
    model = patterned()
    with pytest.raises(UserError, match=r"correction_rate=-1 must not be negative"):
        correction_rule(model, -1)
    assert correction_rule(model, 0) is None
    assert correction_rule(gpt2("tiny"), 0.1) is None
    with pytest.raises(UserError, match=r"reports no loads of experts"):
        correction_rule(model, 0.1)({}, {})
    with pytest.raises(UserError, match=r"z_loss=-0.1 must not be negative"):
        router_losses.Routed(z_loss=-0.1)
    with pytest.raises(UserError, match=r"Routed is for models with experts.*@losses.CrossEntropy"):
        router_losses.Routed().check_model(gpt2("tiny"))
    router_losses.Routed().check_model(model)
    sharding = Sharding(MeshConfig(fsdp=2, expert=4).build(), "fsdp_ep")
    with pytest.raises(UserError, match=r"expert=6 doesn't divide by expert=4, 6 / 4 = 1.5"):
        check_layout(model, sharding, 8, [8])
