"""The laws of test_transformer.py for the parts that only some descendants of BERT have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import layers, parameters, scores
from t5x_lite.nn.bottleneck import BottleneckConfig
from t5x_lite.nn.embedders import TokenEmbedder, TrigramEmbedder
from t5x_lite.nn.heads import NoHead, Pooler
from t5x_lite.nn.transformer import Transformer

FAMILIES = ["albert", "modernbert", "mobilebert"]
families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_padding_and_other_documents_change_no_bit(models, family):
    config = models.tiny(family)
    params, batch = models.random_params(config), models.packed_batch(config)
    kept = np.asarray(batch["segments"]) == 1
    other = {**batch, "tokens": jnp.where(kept, batch["tokens"], 3)}
    before, after = (models.forward(config)(params, b).hidden_BTD for b in (batch, other))
    np.testing.assert_array_equal(np.asarray(before)[kept], np.asarray(after)[kept])
    assert not np.array_equal(before, after)


@families
def test_packed_documents_equal_each_alone(models, family):
    config = models.tiny(family)
    params, batch = models.random_params(config), models.packed_batch(config)
    packed = models.forward(config)(params, batch).hidden_BTD
    alone = {"tokens": jnp.stack([batch["tokens"][1, :5], batch["tokens"][2, 3:]])}
    one_by_one = models.forward(config)(params, alone).hidden_BTD
    assert models.relative(packed[1, :5], one_by_one[0]) < 1e-5
    assert models.relative(packed[2, 3:], one_by_one[1]) < 1e-5


@families
def test_scanned_equals_unrolled(models, family):
    scanned = dataclasses.replace(models.tiny(family, dropout=0.3), head=NoHead())
    unrolled = dataclasses.replace(scanned, scan=False)
    params, batch = models.random_params(scanned), models.packed_batch(scanned)
    noise = jax.random.normal(jax.random.key(3), (4, 8, scanned.width))
    keys = models.row_keys()
    hidden, grads = models.probe(scanned)(params, batch, keys, noise)
    apart = parameters.unstack_layers(params)
    hidden_apart, grads_apart = models.probe(unrolled)(apart, batch, keys, noise)
    assert models.relative(hidden_apart, hidden) < 1e-5
    assert models.relative(parameters.stack_layers(grads_apart), grads) < 1e-5


@families
def test_no_two_dropout_sites_share_a_mask(models, family, monkeypatch):
    config = models.tiny(family, dropout=0.1, scan=False)
    if family == "mobilebert":  # as published only some of its sites drop anything
        block = config.encoder.block
        inner, ffn = (dataclasses.replace(part, dropout=0.1) for part in (block.inner, block.ffn))
        block = dataclasses.replace(block, inner=inner, ffn=ffn)
        config = dataclasses.replace(
            config, encoder=dataclasses.replace(config.encoder, block=block)
        )
    params, batch, seen = models.random_params(config), models.packed_batch(config), []

    def record(x, rate, keys_B):
        if rate > 0:
            seen.append(jax.random.key_data(keys_B))
        return x

    def record_queries(keys_B, heads_N, slots_T):
        record(None, 1, keys_B)
        return query_keys(keys_B, heads_N, slots_T)

    query_keys = scores.query_keys
    monkeypatch.setattr(layers, "dropout", record)
    monkeypatch.setattr(scores, "query_keys", record_queries)

    @jax.jit
    def run(params, batch, keys):
        seen.clear()
        Transformer(config).apply({"params": params}, batch, keys)
        return jnp.concatenate(list(seen))

    drawn = run(params, batch, models.row_keys())
    # The input; by layer: attention and two ways into the residual stream; attention, its way
    # there and the FFN's hidden units; attention, its way, four FFNs' units and ways, the layer's.
    sites = {"albert": 1 + 2 * 3, "modernbert": 1 + 5 * 3, "mobilebert": 1 + 2 * (2 + 4 * 2 + 1)}
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 4 * sites[family]


@families
def test_bfloat16_stays_near_float32(models, family):
    exact = models.tiny(family)
    config = dataclasses.replace(exact, dtype="bfloat16")
    params, batch = models.random_params(config), models.packed_batch(config)
    hidden = models.forward(config)(params, batch).hidden_BTD
    assert hidden.dtype == jnp.bfloat16
    assert 1e-4 < models.relative(hidden, models.forward(exact)(params, batch).hidden_BTD) < 0.03


def test_a_local_layer_sees_half_its_window_on_either_side(models):
    # One global layer, which sees only itself here, then one local layer of 4: 2 keys on each side.
    config = models.tiny("modernbert")
    local = config.encoder.blocks[1]
    assert (local.attention.window, config.encoder.blocks[3].attention.window) == (3, None)
    encoder = dataclasses.replace(config.encoder, layers=1, block=local)
    config = dataclasses.replace(config, encoder=encoder)
    params = models.random_params(config)
    tokens = jnp.arange(1, 9)[None]

    def hidden(rows):
        table = params["embedder"]["embedding"].at[tokens[0]].set(rows)
        changed = {**params, "embedder": {"embedding": table}}
        return Transformer(config).apply({"params": changed}, {"tokens": tokens}).hidden_BTD[0, 4]

    rows = params["embedder"]["embedding"][tokens[0]]
    seen = jnp.abs(jax.jacobian(hidden)(rows)).sum((0, 2)) > 0
    assert np.flatnonzero(seen).tolist() == [2, 3, 4, 5, 6]


def test_a_shared_layer_has_one_set_of_parameters(models):
    config = models.tiny("albert")
    deeper = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, layers=7))
    assert parameters.count(deeper) == parameters.count(config)
    params, batch = models.random_params(config), models.packed_batch(config)
    assert not np.allclose(*(models.forward(c)(params, batch).hidden_BTD for c in (config, deeper)))


def test_a_trigram_holds_both_neighbours_of_its_own_document(models):
    config = models.tiny("mobilebert")
    module = config.embedder.build(104, 12, layers.Common("float32", layers.FanIn()), "embedder")
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(104, 12)), jnp.float32)
    kernel = np.zeros((3, 12, 12), np.float32)
    kernel[0], kernel[1], kernel[2] = np.eye(12), 10 * np.eye(12), 100 * np.eye(12)
    params = {
        "embedding": table, "token_types": jnp.zeros((2, 12)),
        "projection": {"kernel": jnp.asarray(kernel.reshape(36, 12)), "bias": jnp.zeros(12)},
    }  # fmt: skip
    batch = {"tokens": jnp.asarray([[5, 6, 7, 8, 9]]), "segments": jnp.asarray([[1, 1, 2, 2, 0]])}
    found = module.apply({"params": params}, batch)[0]
    row = {number: np.asarray(table[number]) for number in range(5, 10)}
    expected = [row[6] + 10 * row[5], 10 * row[6] + 100 * row[5]]
    expected += [row[8] + 10 * row[7], 10 * row[8] + 100 * row[7], 10 * row[9]]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5)


def test_embedders_that_do_not_fit_are_refused(models):
    with pytest.raises(UserError, match="width 16 need an input_projection"):
        dataclasses.replace(models.tiny("bert"), embedder=TokenEmbedder(types=2, width=16))
    with pytest.raises(UserError, match="encoders only"):
        dataclasses.replace(models.tiny("gpt2"), embedder=TrigramEmbedder(16))
    for embedder in (TokenEmbedder, TrigramEmbedder):
        with pytest.raises(UserError, match="width=0"):
            embedder(width=0)


def test_a_bottleneck_has_a_width_and_an_ffn(models):
    block = models.tiny("mobilebert").encoder.block
    assert isinstance(block, BottleneckConfig)
    for change in ({"width": 0}, {"ffns": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            dataclasses.replace(block, **change)


def test_a_pooler_without_activation_is_the_first_token(models):
    config = dataclasses.replace(models.tiny("mobilebert"), head=Pooler(None))
    params, batch = models.random_params(config), models.packed_batch(config)
    out = models.forward(config)(params, batch)
    assert "head" not in params
    np.testing.assert_array_equal(out.aux["pooled"][:3], out.hidden_BTD[:3, 0])
    np.testing.assert_array_equal(out.aux["pooled"][3], out.hidden_BTD[3, 1])  # behind padding
