"""Heads that predict no words: of rows, tokens and spans; see test_heads.py for the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.heads import (
    Dense,
    QuestionAnswering,
    Reward,
    SentenceEmbedding,
    SequenceClassifier,
    TokenClassifier,
    pool,
)
from t5x_lite.nn.layers import UnbiasedLayerNorm
from t5x_lite.partitioning import MeshConfig, Sharding

HEADS = {
    "bert": SequenceClassifier(3, dense=Dense("tanh"), dropout=0.1),
    "roberta": SequenceClassifier(3, dense=Dense("tanh", input_dropout=0.1), dropout=0.1),
    "distilbert": SequenceClassifier(3, dense=Dense("relu"), dropout=0.2),
    "modernbert": SequenceClassifier(
        3, "mean", Dense("gelu", UnbiasedLayerNorm(), bias=False), dropout=0.1
    ),
    "llama": SequenceClassifier(3, "last", bias=False),
    "tokens": TokenClassifier(5, dropout=0.1),
    "answers": QuestionAnswering(dense=Dense("gelu"), dropout=0.1),
    "embedding": SentenceEmbedding("mean", normalized=True),
    "cls": SentenceEmbedding("first"),
    "reward": Reward(),
}
ROWS = [name for name in HEADS if name not in ("tokens", "answers")]
SHAPES = {
    "tokens": {"logits": (4, 8, 5)},
    "answers": {"start_logits": (4, 8), "end_logits": (4, 8)},
    "embedding": {"embedding": (4, 32)},
    "cls": {"embedding": (4, 32)},
    "reward": {"reward": (4,)},
}


def topped(models, name, family="bert", **overrides):
    return dataclasses.replace(models.tiny(family, **overrides), head=HEADS[name])


def run_of(models, name, family="bert", **overrides):
    """(head's parameters, batch, output) of a tiny model."""
    config = topped(models, name, family, **overrides)
    params, batch = models.random_params(config), models.packed_batch(config)
    return params.get("head"), batch, models.forward(config)(params, batch)


def linear(params, x):
    y = np.asarray(x) @ np.asarray(params["kernel"])
    return y + np.asarray(params["bias"]) if "bias" in params else y


def test_pooling_reads_real_tokens_only():
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    segments = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]], np.int32)
    rows = [x[0], x[1, :2], x[2, 1:3]]
    ones, zeros = jnp.ones((3, 4), jnp.int32), jnp.zeros((3, 4), jnp.int32)
    for pooling, expected in {
        "first": [row[0] for row in rows],
        "last": [row[-1] for row in rows],
        "mean": [row.mean(axis=0) for row in rows],
    }.items():
        given = pool(jnp.asarray(x), jnp.asarray(segments), pooling)
        np.testing.assert_allclose(given, expected, rtol=1e-5, err_msg=pooling)
        whole = pool(jnp.asarray(x), None, pooling)
        np.testing.assert_array_equal(whole, pool(jnp.asarray(x), ones, pooling))
    np.testing.assert_array_equal(pool(jnp.asarray(x), zeros, "mean"), np.zeros((3, 5)))


@pytest.mark.parametrize("name", HEADS)
def test_results_are_float32_and_no_words(models, name):
    config = topped(models, name)
    predicts = {SequenceClassifier: "labels", QuestionAnswering: "spans"}
    predicts = predicts.get(type(HEADS[name]), "none")
    assert config.predicts == predicts
    assert dataclasses.replace(models.tiny("gpt2"), head=HEADS[name]).predicts == predicts
    _, _, output = run_of(models, name, dtype="bfloat16")
    assert output.unembedding is None
    shapes = {name: value.shape for name, value in output.aux.items()}
    assert shapes == SHAPES.get(name, {"logits": (4, 3)})
    assert {value.dtype.name for value in output.aux.values()} == {"float32"}


@pytest.mark.parametrize("name", HEADS)
def test_the_axes_of_their_parameters_are_known(models, name):
    shapes, axes = parameters.abstract(topped(models, name))
    leaves = jax.tree.leaves(shapes.get("head", {}))
    names = jax.tree.leaves(axes.get("head", {}), is_leaf=parameters.is_axes)
    for table, mesh in (("fsdp", MeshConfig()), ("fsdp_tp", MeshConfig(tensor=2))):
        sharding = Sharding(mesh.build(), table)
        for leaf, axis_names in zip(leaves, names, strict=True):
            sharding.spec(axis_names, leaf.shape)


@pytest.mark.parametrize(("name", "activation"), [("bert", np.tanh), ("distilbert", jax.nn.relu)])
def test_a_row_is_classified_by_a_dense_layer_and_a_product(models, name, activation):
    head, batch, output = run_of(models, name)
    first = pool(output.hidden_BTD, batch["segments"], "first")
    expected = linear(head["classifier"], activation(linear(head["pooler"], first)))
    np.testing.assert_allclose(output.aux["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_norm_may_follow_the_dense_layer(models):
    head, batch, output = run_of(models, "modernbert")
    assert "bias" not in head["pooler"]
    mean = pool(output.hidden_BTD, batch["segments"], "mean")
    hidden = np.asarray(jax.nn.gelu(linear(head["pooler"], np.asarray(mean)), approximate=False))
    centered = hidden - hidden.mean(1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-5)
    expected = linear(head["classifier"], normed * np.asarray(head["pooler_norm"]["scale"]))
    np.testing.assert_allclose(output.aux["logits"], expected, rtol=1e-3, atol=1e-4)


def test_tokens_and_spans_are_scored_one_by_one(models):
    head, _, output = run_of(models, "tokens")
    expected = linear(head["classifier"], np.asarray(output.hidden_BTD))
    np.testing.assert_allclose(output.aux["logits"], expected, rtol=1e-4, atol=1e-5)
    head, _, output = run_of(models, "answers")
    hidden = linear(head["pooler"], np.asarray(output.hidden_BTD))
    expected = linear(head["classifier"], np.asarray(jax.nn.gelu(hidden, approximate=False)))
    for name, end in (("start_logits", 0), ("end_logits", 1)):
        np.testing.assert_allclose(output.aux[name], expected[..., end], rtol=1e-4, atol=1e-5)


def test_embeddings_have_length_one_where_asked(models):
    _, batch, output = run_of(models, "embedding")
    given = np.asarray(output.aux["embedding"])
    np.testing.assert_allclose(np.linalg.norm(given, axis=1), 1, rtol=1e-5)
    mean = np.asarray(pool(output.hidden_BTD, batch["segments"], "mean"))
    assert models.relative(given * np.linalg.norm(mean, axis=1, keepdims=True), mean) < 1e-5


def test_a_row_of_padding_is_embedded_as_zeros_with_finite_gradients(models):
    config = topped(models, "embedding")
    params, batch = models.random_params(config), models.packed_batch(config)
    batch["segments"] = batch["segments"].at[0].set(0)

    @jax.jit
    def both(params):
        def total(params):
            embedding = models.forward(config)(params, batch).aux["embedding"]
            return jnp.sum(embedding**3), embedding

        return jax.grad(total, has_aux=True)(params)

    gradient, embedding = both(params)
    np.testing.assert_array_equal(embedding[0], np.zeros(32))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((gradient, embedding)))


def test_a_reward_is_one_label_of_the_last_token(models):
    config = topped(models, "reward", "gpt2")
    params, batch = models.random_params(config), models.packed_batch(config)
    classifier = dataclasses.replace(config, head=SequenceClassifier(1, "last", bias=False))
    logits = models.forward(classifier)(params, batch).aux["logits"]
    reward = models.forward(config)(params, batch).aux["reward"]
    np.testing.assert_allclose(reward, logits[:, 0], rtol=1e-6)


def padded(start: int, fill: int):
    """Two rows of 5 tokens from slot `start` of 8; the rest is padding that holds other tokens."""
    ids = np.random.default_rng(3).integers(1, 97, (3, 2, 8))
    tokens, segments, positions = ids[fill], np.zeros((2, 8)), np.zeros((2, 8))
    tokens[:, start : start + 5] = ids[0, :, :5]
    segments[:, start : start + 5], positions[:, start : start + 5] = 1, np.arange(5)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    return {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padding_on_either_side_changes_no_row(models, family, name):
    config = topped(models, name, family)
    params, run = models.random_params(config), models.forward(config)

    def result(start, fill):
        return next(iter(run(params, padded(start, fill)).aux.values()))

    right = result(0, 1)
    np.testing.assert_array_equal(result(0, 2), right)
    np.testing.assert_array_equal(result(3, 2), result(3, 1))
    assert models.relative(result(3, 1), right) < 1e-5


@pytest.mark.parametrize("name", ["bert", "roberta", "tokens", "answers"])
def test_dropout_draws_row_by_row(models, name):
    config = topped(models, name)  # nothing below the head drops out
    params, batch = models.random_params(config), models.packed_batch(config)
    run, keys = models.forward(config), models.row_keys()
    plain, dropped = run(params, batch).aux, run(params, batch, keys).aux
    others = run(params, batch, models.row_keys(seed=1)).aux
    half = run(params, {n: value[2:] for n, value in batch.items()}, keys[2:]).aux
    for output in plain:
        assert models.relative(dropped[output], plain[output]) > 1e-2
        assert models.relative(dropped[output], others[output]) > 1e-2
        np.testing.assert_allclose(half[output], dropped[output][2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: SequenceClassifier(0), "labels=0 must be at least 1"),
        (lambda: TokenClassifier(-1), "labels=-1 must be at least 1"),
        (
            lambda: SequenceClassifier(2, "max"),
            "unknown pooling 'max'; there are first, last",
        ),
        (lambda: SentenceEmbedding("cls"), "unknown pooling 'cls'"),
        (lambda: Dense("mish"), "unknown activation 'mish'"),
        (lambda: Dense("tanh", input_dropout=1.0), r"input_dropout=1.0 must lie in \[0, 1\)"),
        (lambda: QuestionAnswering(dropout=2), r"dropout=2 must lie in \[0, 1\)"),
    ],
)
def test_heads_refuse(head, message):
    with pytest.raises(UserError, match=message):
        head()
