"""What a token may see, and what must not change a result: scanning, batching, sharding, dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn import layers, parameters, scores
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import MeshConfig, Sharding

FAMILIES = ["t5_1_0", "t5_1_1", "bert", "gpt2", "llama", "mixtral", "gemma3", "umt5", "transformer"]
FAMILIES += ["deepseek_v3"]
GRID = pytest.mark.grid
# T5 1.0 attends as 1.1 does; the grid runs each structure (encoder, decoder, both) unrolled too.
SEEN = [(family, True) for family in FAMILIES[1:]]
SEEN += [pytest.param(family, False, marks=GRID) for family in ["t5_1_1", "bert", "llama"]]


def influence(models, config, params, batch):
    """How strongly each embedded token acts on each query: {name: gradient norms [B, T, S]}.

    No two tokens of the batch are alike, so a row of the embedding's gradient is one token's.
    """
    run, rows = models.probe(config), []
    noise = np.random.default_rng(2).normal(size=(4, 8, config.width)).astype(np.float32)
    for query in range(8):
        cotangent = np.zeros_like(noise)
        cotangent[:, query] = noise[:, query]
        _, grads = run(params, batch, None, jnp.asarray(cotangent))
        rows.append(np.linalg.norm(grads["embedder"]["embedding"], axis=-1))
    names = [name for name in ("tokens", "encoder_tokens") if name in batch]
    return {name: np.stack([row[batch[name]] for row in rows], axis=1) for name in names}


def visible(config, batch):
    """Which token may act on which query, by the definition; real queries only."""
    segments = np.asarray(batch["segments"])
    own = segments[:, :, None] == segments[:, None, :]
    if config.decoder is not None:
        own &= np.tril(np.ones((8, 8), bool))
    result = {"tokens": own}
    if "encoder_segments" in batch:
        source = np.asarray(batch["encoder_segments"])
        result["encoder_tokens"] = segments[:, :, None] == source[:, None, :]
    return result


@pytest.mark.parametrize(("family", "scan"), SEEN)
def test_a_token_gets_gradient_exactly_where_it_may_be_seen(models, family, scan):
    config = models.tiny(family, scan=scan)
    batch = models.packed_batch(config)
    found = influence(models, config, models.random_params(config), batch)
    real = np.asarray(batch["segments"]) > 0
    for name, may in visible(config, batch).items():
        assert np.all(found[name][real & True][~may[real]] == 0), name
        assert np.all(found[name][real][may[real]] > 1e-4), name


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_packed_documents_equal_each_alone(models, family):
    config = models.tiny(family)
    params, batch = models.random_params(config), models.packed_batch(config)
    packed = models.forward(config)(params, batch).hidden_BTD
    # Row 1's only document, padded behind; row 2's second one, behind another. Alone, neither
    # segments nor positions are given.
    alone = {"tokens": jnp.stack([batch["tokens"][1, :5], batch["tokens"][2, 3:]])}
    if "encoder_tokens" in batch:
        sources = batch["encoder_tokens"]
        alone["encoder_tokens"] = jnp.stack([sources[1, :4], sources[2, 2:]])
    one_by_one = models.forward(config)(params, alone).hidden_BTD
    assert models.relative(packed[1, :5], one_by_one[0]) < 1e-5
    assert models.relative(packed[2, 3:], one_by_one[1]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_other_documents_change_no_bit(models, family):
    config = models.tiny(family)
    params, batch = models.random_params(config), models.packed_batch(config)
    before = models.forward(config)(params, batch).hidden_BTD
    other = dict(batch)
    for prefix in ("", "encoder_"):
        if f"{prefix}tokens" in batch:
            kept = batch[f"{prefix}segments"] == 1
            other[f"{prefix}tokens"] = jnp.where(kept, batch[f"{prefix}tokens"], 3)
    after = models.forward(config)(params, other).hidden_BTD
    kept = np.asarray(batch["segments"]) == 1
    np.testing.assert_array_equal(np.asarray(before)[kept], np.asarray(after)[kept])
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("family", ["t5_1_1", "llama", "deepseek_v3", "gemma3", "umt5"])
def test_scanned_equals_unrolled(models, family):
    scanned, unrolled = models.tiny(family), models.tiny(family, scan=False)
    params, batch = models.random_params(scanned), models.packed_batch(scanned)
    noise = jax.random.normal(jax.random.key(3), (4, 8, scanned.width))
    hidden, grads = models.probe(scanned)(params, batch, None, noise)
    apart = parameters.unstack_layers(params)
    hidden_apart, grads_apart = models.probe(unrolled)(apart, batch, None, noise)
    assert models.relative(hidden_apart, hidden) < 1e-5
    assert models.relative(parameters.stack_layers(grads_apart), grads) < 1e-5
    assert models.relative(grads_apart, parameters.unstack_layers(grads)) < 1e-5


# Three training steps of each, dropout on, are compared in tests/train/test_step.py.
@pytest.mark.grid
@pytest.mark.parametrize("family", ["t5_1_1", "bert"])
def test_scanned_equals_unrolled_with_dropout(models, family):
    scanned = models.tiny(family, dropout=0.3)
    unrolled = dataclasses.replace(scanned, scan=False)
    params, batch = models.random_params(scanned), models.packed_batch(scanned)
    keys = models.row_keys()
    hidden = models.forward(scanned)(params, batch, keys).hidden_BTD
    apart = models.forward(unrolled)(parameters.unstack_layers(params), batch, keys).hidden_BTD
    assert models.relative(apart, hidden) < 1e-5


@pytest.mark.parametrize("family", ["t5_1_1", "bert"])
def test_dropout_belongs_to_the_row(models, family):
    config = models.tiny(family, dropout=0.3)
    params, batch = models.random_params(config), models.packed_batch(config)
    keys = models.row_keys()
    run = models.forward(config)
    hidden = run(params, batch, keys).hidden_BTD
    order = jnp.array([2, 0, 3, 1])
    moved = run(params, {k: v[order] for k, v in batch.items()}, keys[order]).hidden_BTD
    assert models.relative(moved, hidden[order]) < 1e-6
    # Another key changes its own row, and no other.
    changed = run(params, batch, keys.at[1].set(models.row_keys(seed=9)[1])).hidden_BTD
    same = np.all(np.asarray(changed) == np.asarray(hidden), axis=(1, 2))
    assert same.tolist() == [True, False, True, True]


def test_dropout_is_the_same_in_a_microbatch(models):
    config = models.tiny("bert", dropout=0.3)
    params, batch = models.random_params(config), models.packed_batch(config)
    keys = models.row_keys()
    whole = models.forward(config)(params, batch, keys).hidden_BTD
    part = models.forward(config)(params, {k: v[1:3] for k, v in batch.items()}, keys[1:3])
    assert models.relative(part.hidden_BTD, whole[1:3]) < 1e-6


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_no_two_dropout_sites_share_a_mask(models, family, monkeypatch):
    config = models.tiny(family, dropout=0.1, scan=False)
    query_keys = scores.query_keys
    params, batch, seen = models.random_params(config), models.packed_batch(config), []

    def record(x, rate, keys_B):
        if rate > 0:
            seen.append(jax.random.key_data(keys_B))
        return x

    def record_queries(keys_B, heads_N, slots_T):
        """Of attention: as many words as of a site outside it, whatever its queries draw."""
        record(None, 1, keys_B)
        return query_keys(keys_B, heads_N, slots_T)

    monkeypatch.setattr(layers, "dropout", record)
    monkeypatch.setattr(scores, "query_keys", record_queries)

    @jax.jit
    def run(params, batch, keys):
        seen.clear()
        Transformer(config).apply({"params": params}, batch, keys)
        return jnp.concatenate(list(seen))

    drawn = run(params, batch, models.row_keys())
    # Attention, its way into the residual stream, the FFN's; T5 also the FFN's hidden units.
    sites = {"t5_1_1": 4 + 2 * 4 + 2 * 6, "bert": 1 + 2 * 3, "gpt2": 1 + 2 * 3, "llama": 2 * 3}
    sites["mixtral"] = sites["gemma3"] = sites["llama"]
    sites["deepseek_v3"] = 3 * 3
    sites |= {"umt5": sites["t5_1_1"], "transformer": 2 + 2 * 2 + 2 * 3}
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 4 * sites[family]


def place(sharding, config, params, batch, keys):
    """Parameters by their logical axes, the batch and its keys by rows."""
    _, axes = parameters.abstract(config)
    params = jax.tree.map(
        lambda names, leaf: jax.device_put(leaf, sharding.named(names, leaf.shape)),
        axes, params, is_leaf=parameters.is_axes,
    )  # fmt: skip
    batch, keys = jax.tree.map(
        lambda leaf: jax.device_put(leaf, sharding.batch(leaf.shape)), (batch, keys)
    )
    return params, batch, keys


@pytest.mark.grid
@pytest.mark.parametrize(
    ("family", "table"),
    [*(("gpt2", table) for table in ("dp", "fsdp", "tp", "fsdp_tp")), ("t5_1_1", "fsdp_tp")],
)
def test_eight_devices_equal_one_with_dropout(models, family, table):
    config = models.tiny(family, dropout=0.3)
    params, batch = models.random_params(config), models.packed_batch(config)
    keys = models.row_keys()
    one = models.forward(config)(params, batch, keys).hidden_BTD
    mesh = MeshConfig(fsdp=4, tensor=2) if "tp" in table else MeshConfig(replica=2, fsdp=4)
    sharding = Sharding(mesh.build(), table)
    placed = place(sharding, config, params, batch, keys)
    split = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed[0])]
    assert any(split) == (table != "dp")
    eight = models.forward(config, sharding)(*placed).hidden_BTD
    assert len(eight.sharding.device_set) == 8
    assert models.relative(jax.device_get(eight), one) < 1e-5


@pytest.mark.parametrize(
    "family",
    # Not DeepSeek-V3, where rounding sends a token to another expert: see test_moe.py.
    [
        "t5_1_1",
        *(pytest.param(n, marks=GRID) for n in FAMILIES if n not in ("t5_1_1", "deepseek_v3")),
    ],
)
def test_bfloat16_stays_near_float32(models, family):
    exact = models.tiny(family)
    config = dataclasses.replace(exact, dtype="bfloat16")
    params, batch = models.random_params(config), models.packed_batch(config)
    hidden = models.forward(config)(params, batch).hidden_BTD
    assert hidden.dtype == jnp.bfloat16
    reference = models.forward(exact)(params, batch).hidden_BTD
    assert 1e-4 < models.relative(hidden, reference) < 0.03


def test_bfloat16_gradients_are_float32_and_near(models):
    exact = models.tiny("gpt2")
    config = dataclasses.replace(exact, dtype="bfloat16")
    params, batch = models.random_params(config), models.packed_batch(config)
    noise = jax.random.normal(jax.random.key(3), (4, 8, config.width))
    _, grads = models.probe(config)(params, batch, None, noise)
    _, reference = models.probe(exact)(params, batch, None, noise)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert 1e-4 < models.relative(grads, reference) < 0.05
