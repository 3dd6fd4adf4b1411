"""A prefix LM's prefix is seen in both directions; nothing else changes, and decoding agrees."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.cache import init_cache

# Of conftest's SEGMENTS: a long one, one before padding, two packed ones of which one doesn't begin
# its document, one of two packed.
PREFIX = [[1] * 4 + [0] * 4, [1] * 2 + [0] * 6, [1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
# Dense attention with each kind of positions, windows, latent attention, cross-attention.
FAMILIES = ["gpt2", "gemma3", "deepseek_v3", "t5_1_1"]
GRID = [pytest.param("llama", scan, marks=pytest.mark.grid) for scan in (True, False)]
SEEN = [*((family, True) for family in FAMILIES), *GRID]
# What is read at once, of which the prefix is a part; then single steps.
PROMPTS, GIVEN, PROMPT, STEPS = np.array([5, 3, 1, 4]), np.array([3, 2, 1, 4]), 5, 3
SLOTS = PROMPT + STEPS


def marked(models, config):
    return models.packed_batch(config) | {"prefix": jnp.asarray(PREFIX, jnp.int32)}


def influence(models, config, params, batch):
    """[B, T, S] gradient norms of each query by each embedded token; no two tokens are alike."""
    run, rows = models.probe(config), []
    noise = np.random.default_rng(2).normal(size=(4, 8, config.width)).astype(np.float32)
    for query in range(8):
        cotangent = np.zeros_like(noise)
        cotangent[:, query] = noise[:, query]
        _, grads = run(params, batch, None, jnp.asarray(cotangent))
        norms = np.linalg.norm(grads["embedder"]["embedding"], axis=-1)
        rows.append(norms[np.asarray(batch["tokens"])])
    return np.stack(rows, axis=1)


@pytest.mark.parametrize(("family", "scan"), SEEN)
def test_a_prefix_sees_itself_both_ways_and_nothing_sees_later_targets(models, family, scan):
    config = models.tiny(family, scan=scan)
    batch = marked(models, config)
    found = influence(models, config, models.random_params(config), batch)
    segments, prefix = np.array(batch["segments"]), np.array(PREFIX) > 0
    own = segments[:, :, None] == segments[:, None, :]
    both = prefix[:, :, None] & prefix[:, None, :]
    may, real = own & (both | np.tril(np.ones((8, 8), bool))), segments > 0
    assert (may & ~np.tril(np.ones((8, 8), bool))).sum() == 12
    assert np.all(found[real][~may[real]] == 0)
    assert np.all(found[real][may[real]] > 1e-4)


def test_a_window_narrows_a_prefix_on_both_sides(models):
    config = models.tiny("gemma3")
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, layers=1))
    assert config.decoder.blocks[0].attention.window == 3
    batch = {"tokens": marked(models, config)["tokens"], "prefix": jnp.ones((4, 8), jnp.int32)}
    found = influence(models, config, models.random_params(config), batch)
    distance = np.abs(np.arange(8)[:, None] - np.arange(8)[None])
    assert np.all(found[:, distance >= 3] == 0)
    assert np.all(found[:, distance < 3] > 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_prefix_of_nothing_or_one_token_is_a_causal_model(models, family):
    config = models.tiny(family)
    params, batch = models.random_params(config), models.packed_batch(config)
    run = models.forward(config)
    causal = np.asarray(run(params, batch).hidden_BTD)
    first = jnp.asarray(np.array(batch["positions"]) == 0, jnp.int32)
    none, one = (
        np.asarray(run(params, batch | {"prefix": prefix}).hidden_BTD)
        for prefix in (jnp.zeros_like(first), first)
    )
    np.testing.assert_array_equal(none, one)  # one program; the causal model is another
    assert models.relative(none, causal) < 1e-6
    changed = run(params, marked(models, config)).hidden_BTD
    assert models.relative(changed, causal) > 1e-3


def test_an_encoder_has_no_use_for_a_prefix(models):
    config = models.tiny("bert")
    params, run = models.random_params(config), models.forward(config)
    plain, batch = models.packed_batch(config), marked(models, config)
    expected = run(params, plain).hidden_BTD
    np.testing.assert_array_equal(run(params, batch).hidden_BTD, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_prefilled_as_prefix_and_continued_equals_the_full_pass(models, family):
    config = models.tiny(family)
    params, run = models.random_params(config), models.forward(config)
    places = np.arange(SLOTS)[None]
    whole = models.packed_batch(config) | {
        "segments": jnp.asarray(places < (PROMPTS + STEPS)[:, None], jnp.int32),
        "positions": jnp.asarray(np.broadcast_to(places, (4, SLOTS)), jnp.int32),
        "prefix": jnp.asarray(places < GIVEN[:, None], jnp.int32),
    }
    if "encoder_segments" in whole:
        whole["encoder_segments"] = jnp.minimum(whole["encoder_segments"], 1)
    full = run(params, whole).hidden_BTD
    prompt = {k: v if k.startswith("encoder_") else v[:, :PROMPT] for k, v in whole.items()}
    prompt["segments"] = jnp.asarray(places[:, :PROMPT] < PROMPTS[:, None], jnp.int32)
    slots = 6 if config.kind == "encoder-decoder" else None
    output = run(params, prompt, None, init_cache(config, 4, SLOTS, slots))
    pieces = [[row[:n]] for row, n in zip(output.hidden_BTD, PROMPTS, strict=True)]
    for step in range(STEPS):
        at = jnp.asarray(PROMPTS + step, jnp.int32)[:, None]
        tokens = jnp.take_along_axis(whole["tokens"], at, axis=1)
        batch = {"tokens": tokens, "segments": jnp.ones_like(at), "positions": at}
        output = run(params, batch, None, output.cache)
        for row, piece in zip(output.hidden_BTD, pieces, strict=True):
            piece.append(row)
    for row, n, piece in zip(full, PROMPTS, pieces, strict=True):
        assert models.relative(np.concatenate(piece), row[: n + STEPS]) < 1e-5
