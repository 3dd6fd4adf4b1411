"""What stands at both ends: embedders, heads, and the rows that only pad the vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.embedders import FeatureEmbedder
from t5x_lite.nn.heads import FixedBiasLMHead, LMHead, Pooler
from t5x_lite.nn.transformer import Transformer
from t5x_lite.types import Output, Unembedding

KERNEL = np.random.default_rng(1).normal(size=(104, 8)).astype(np.float32)
TARGETS = jnp.asarray([[0, 5, 96], [7, 7, 1]], jnp.int32)


def output_of(kernel):
    hidden = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    return Output(jnp.asarray(hidden), Unembedding(jnp.asarray(kernel), None, 97))


logprobs = jax.jit(lambda kernel: losses.token_logprobs(output_of(kernel), TARGETS))


def test_padded_rows_are_never_chosen_and_never_count():
    large = KERNEL.copy()
    large[97:] = 1e3
    logits = np.asarray(jax.jit(lambda kernel: losses.logits(output_of(kernel)))(large))
    assert np.all(np.argmax(logits, axis=-1) < 97)
    assert np.all(np.exp(logits[..., 97:]) == 0)
    np.testing.assert_allclose(logprobs(large), logprobs(KERNEL[:97]), rtol=1e-5)


def test_a_soft_cap_bends_the_logits_of_losses_and_decoding_alike():
    plain = output_of(5 * KERNEL)
    capped = plain.replace(unembedding=plain.unembedding.replace(soft_cap=3.0))
    expected = 3 * np.tanh(np.asarray(losses.logits(plain)[..., :97], float) / 3)
    got = losses.logits(capped)
    np.testing.assert_allclose(got[..., :97], expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.exp(got[..., 97:]) == 0), "padding is hidden after the cap"
    log_z = np.log(np.sum(np.exp(expected), axis=-1))
    target = np.take_along_axis(expected, np.asarray(TARGETS)[:, :, None], axis=-1)[..., 0]
    np.testing.assert_allclose(
        losses.token_logprobs(capped, TARGETS), target - log_z, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(UserError, match="soft_cap=0 must be positive"):
        LMHead(tied=True, soft_cap=0)


def test_padded_rows_get_no_gradient():
    gradient = np.asarray(jax.jit(jax.grad(lambda kernel: jnp.sum(logprobs(kernel))))(KERNEL))
    assert np.all(gradient[97:] == 0)
    assert np.all(np.any(gradient[:97] != 0, axis=1))


@pytest.mark.parametrize("family", ["t5_1_0", "t5_1_1", "bert", "gpt2", "llama"])
def test_which_table_the_head_reads(models, family):
    config = models.tiny(family)
    params, batch = models.random_params(config), models.packed_batch(config)
    output = models.forward(config)(params, batch)
    tied = family not in ("t5_1_1", "llama")
    table = params["embedder"]["embedding"] if tied else params["head"]["kernel"]
    np.testing.assert_array_equal(output.unembedding.kernel_VD, table)
    assert output.unembedding.vocab_size == 97
    assert (output.unembedding.bias_V is not None) == (family == "bert")
    # A tied T5 shrinks what it unembeds; its last norm would leave a root mean square of about 1.
    size = float(jnp.sqrt(jnp.mean(jnp.square(output.hidden_BTD))))
    assert (size < 0.4) == (family == "t5_1_0")


def test_the_pooler_reads_the_first_real_token(models):
    config = dataclasses.replace(models.tiny("bert"), head=Pooler())
    params, batch = models.random_params(config), models.packed_batch(config)
    output = models.forward(config)(params, batch)
    dense = params["head"]["pooler"]
    first = output.hidden_BTD[np.arange(4), [0, 0, 0, 1]]  # row 3 begins with padding
    expected = np.tanh(first @ dense["kernel"] + dense["bias"][None])
    np.testing.assert_allclose(output.aux["pooled"], expected, rtol=1e-4, atol=1e-5)
    assert output.unembedding is None


def test_token_types_are_added_and_default_to_0(models):
    config = models.tiny("bert")
    params, batch = models.random_params(config), models.packed_batch(config)
    run = models.forward(config)
    none = run(params, batch).hidden_BTD
    types = {**batch, "token_types": jnp.zeros_like(batch["tokens"])}
    zeros = run(params, types).hidden_BTD
    ones = run(params, {**types, "token_types": types["token_types"] + 1}).hidden_BTD
    np.testing.assert_array_equal(none, zeros)
    swapped = {**params, "embedder": {**params["embedder"]}}
    swapped["embedder"]["token_types"] = params["embedder"]["token_types"][::-1]
    assert models.relative(run(swapped, types).hidden_BTD, ones) < 1e-6
    assert models.relative(ones, zeros) > 1e-2


def listener(models):
    """A T5 whose encoder reads 5 numbers a step and knows no positions."""
    config = models.tiny("t5_1_1")
    encoder = dataclasses.replace(config.encoder, embedder=FeatureEmbedder(5), positions=None)
    return dataclasses.replace(config, encoder=encoder)


def test_features_take_the_place_of_tokens(models):
    config = listener(models)
    params, batch = models.random_params(config), models.packed_batch(config)
    assert params["encoder_embedder"]["Linear_0"]["kernel"].shape == (5, 32)
    assert parameters.smallest_batch(config)["encoder_features"].shape == (1, 2, 5)
    del batch["encoder_tokens"]
    features = np.random.default_rng(4).normal(size=(4, 6, 5)).astype(np.float32)
    run = models.forward(config)

    def hidden(features):
        out = run(params, {**batch, "encoder_features": features}).hidden_BTD
        return np.asarray(out) * (np.asarray(batch["segments"]) > 0)[:, :, None]

    before = hidden(features)
    # Row 1 ends in two steps of padding; the rest is heard.
    padded, heard = features.copy(), features.copy()
    padded[1, 4:] += 1
    heard[1, 3] += 1
    np.testing.assert_array_equal(hidden(padded), before)
    assert np.all(np.any(hidden(heard) != before, axis=(1, 2)) == [False, True, False, False])
    # Without positions, the order of the steps doesn't matter.
    swapped = features.copy()
    swapped[0] = features[0, ::-1]
    assert models.relative(hidden(swapped)[0], before[0]) < 1e-5


def test_a_fixed_bias_moves_the_logits_and_no_gradient_moves_it(models):
    config = dataclasses.replace(models.tiny("transformer"), head=FixedBiasLMHead(tied=True))
    params, batch = models.random_params(config), models.packed_batch(config)
    bias = params["head"]["fixed_bias"]
    without = {**params, "head": {"fixed_bias": jnp.zeros_like(bias)}}
    before, after = (losses.logits(models.forward(config)(p, batch)) for p in (without, params))
    np.testing.assert_allclose((after - before)[..., :97], jnp.broadcast_to(bias[:97], (4, 8, 97)),
                               atol=1e-5)  # fmt: skip

    @jax.jit
    def gradient(params):
        def loss(params):
            output = Transformer(config).apply({"params": params}, batch)
            return jnp.sum(losses.token_logprobs(output, batch["tokens"]))

        return jax.grad(loss)(params)

    moved = gradient(params)
    assert np.all(np.asarray(moved["head"]["fixed_bias"]) == 0)
    assert np.any(np.asarray(moved["embedder"]["embedding"]) != 0)
    plain = dataclasses.replace(config, head=LMHead(tied=True))
    assert parameters.count(config) == parameters.count(plain)
