"""Decoding with the cache gives what the full forward pass gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.nn.cache import init_cache

PROMPTS, PROMPT, STEPS = np.array([5, 3, 1, 4]), 5, 3
SLOTS = PROMPT + STEPS


def sequences(models, config):
    """[4, 8] tokens without packing: each row its prompt and the steps after it, then padding."""
    batch = models.packed_batch(config)
    segments = np.arange(SLOTS)[None] < (PROMPTS + STEPS)[:, None]
    positions = np.broadcast_to(np.arange(SLOTS), segments.shape)
    batch["segments"] = jnp.asarray(segments, jnp.int32)
    batch["positions"] = jnp.asarray(positions, jnp.int32)
    if "encoder_segments" in batch:
        batch["encoder_segments"] = jnp.minimum(batch["encoder_segments"], 1)
        batch["encoder_positions"] = jnp.asarray(
            models.positions_of(np.asarray(batch["encoder_segments"])), jnp.int32
        )
    return batch


def decode(models, config, params, whole):
    """Prefill of the ragged prompts, then single steps; the hidden states at each row's tokens."""
    run = models.forward(config)
    cache = init_cache(config, 4, SLOTS, 6 if config.kind == "encoder-decoder" else None)
    prompt = {k: v if k.startswith("encoder_") else v[:, :PROMPT] for k, v in whole.items()}
    inside = np.arange(PROMPT)[None] < PROMPTS[:, None]
    prompt["segments"] = jnp.asarray(inside, jnp.int32)
    output = run(params, prompt, None, cache)
    pieces = [[row[:n]] for row, n in zip(output.hidden_BTD, PROMPTS, strict=True)]
    for step in range(STEPS):
        at = jnp.asarray(PROMPTS + step, jnp.int32)[:, None]
        tokens = jnp.take_along_axis(whole["tokens"], at, axis=1)
        batch = {"tokens": tokens, "segments": jnp.ones_like(at), "positions": at}
        output = run(params, batch, None, output.cache)
        for row, piece in zip(output.hidden_BTD, pieces, strict=True):
            piece.append(row)
    assert int(output.cache.index) == SLOTS
    return [np.concatenate(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("family", "scan"),
    [
        *((name, True) for name in ("t5_1_1", "gpt2", "llama", "deepseek_v3", "gemma3")),
        *(("umt5", True), ("transformer", True)),
        pytest.param("t5_1_0", True, marks=pytest.mark.grid),
        pytest.param("t5_1_1", False, marks=pytest.mark.grid),
    ],
)
def test_cached_decoding_of_ragged_prompts_equals_the_full_pass(models, family, scan):
    config = models.tiny(family, scan=scan)
    params, whole = models.random_params(config), sequences(models, config)
    full = models.forward(config)(params, whole).hidden_BTD
    expected = [row[: n + STEPS] for row, n in zip(full, PROMPTS, strict=True)]
    got = decode(models, config, params, whole)
    for row, reference in zip(got, expected, strict=True):
        assert models.relative(row, reference) < 1e-5


def test_positions_left_out_go_on_in_the_cache(models):
    config = models.tiny("gpt2")
    params, tokens = models.random_params(config), models.packed_batch(config)["tokens"][:, :4]
    run = models.forward(config)
    full = run(params, {"tokens": tokens}).hidden_BTD
    cache, rows = init_cache(config, 4, 6), []
    for part in (tokens[:, :2], tokens[:, 2:]):
        output = run(params, {"tokens": part}, None, cache)
        cache = output.cache
        rows.append(output.hidden_BTD)
    assert models.relative(jnp.concatenate(rows, axis=1), full) < 1e-5


def test_a_bfloat16_model_has_a_bfloat16_cache_of_the_key_heads(models):
    config = models.tiny("llama", dtype="bfloat16")
    layers = init_cache(config, 3, 7).layers["layers"]
    assert layers["attention"]["key"].shape == (2, 3, 7, 2, 8)  # 2 layers, 2 of 4 heads
    assert layers["attention"]["key"].dtype == jnp.bfloat16
