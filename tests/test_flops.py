"""Counted matrix products against closed forms and against XLA's own count."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from t5x_lite import flops, losses
from t5x_lite.nn import parameters
from t5x_lite.nn.presets import bert, gpt2, llama, mixtral, t5
from t5x_lite.train.step import model_apply

B, T = 2, 64
BATCH = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32)
DIMS = {"width": 256, "heads": 4, "vocab_size": 512, "layers": 2}


def shapes(config):
    batch = {name: jax.ShapeDtypeStruct((B, T), dtype) for name, dtype in BATCH.items()}
    batch["weights"] = jax.ShapeDtypeStruct((B, T), jnp.float32)
    if config.kind == "encoder-decoder":
        batch |= {f"encoder_{name}": batch[name] for name in ("tokens", "segments", "positions")}
    return parameters.abstract(config)[0], batch


def forward(config):
    apply, loss = model_apply(config), losses.CrossEntropy()
    return lambda params, batch: loss(apply, params, None, batch, None).terms["cross_entropy"]


def gpt(**options):
    return gpt2.gpt2("tiny", **DIMS, **options)


def closed_form(width, layers, heads, head_dim, kv_heads, matrices, hidden, vocab):
    """2 · (multiplications): projections, scores and mixing, feed-forward; then the logits."""
    projections = 2 * width * head_dim * (2 * heads + 2 * kv_heads)
    attention = 2 * 2 * T * heads * head_dim
    layer = projections + attention + 2 * matrices * width * hidden
    return B * T * (layers * layer + 2 * width * vocab)


def test_gpt_and_llama_equal_their_closed_forms():
    found = flops.matmul_flops(forward(gpt()), *shapes(gpt()))
    assert found == closed_form(256, 2, 4, 64, 4, 2, 1024, 512)
    config = llama.llama("tiny", **DIMS | {"layers": 3}, kv_heads=2, hidden=320)
    found = flops.matmul_flops(forward(config), *shapes(config))
    assert found == closed_form(256, 3, 4, 64, 2, 3, 320, 512)


def test_t5_counts_the_encoder_the_decoder_and_its_second_attention():
    config = t5.t5_1_1("tiny", **DIMS, head_dim=64, hidden=320)
    found = flops.matmul_flops(forward(config), *shapes(config))
    stack = closed_form(256, 2, 4, 64, 4, 3, 320, 0)
    cross = closed_form(256, 2, 4, 64, 4, 0, 0, 0)
    assert found == 2 * stack + cross + B * T * 2 * 256 * 512


def test_a_token_counts_its_own_experts_forwards_and_backwards():
    config = mixtral.mixtral("tiny", **DIMS, kv_heads=2, hidden=320, experts=8)
    found = flops.matmul_flops(forward(config), *shapes(config))
    # The router, two gated MLPs and their weighted sum, statistics of picks and probabilities.
    experts = 2 * (256 * 8 + 2 * 3 * 256 * 320 + 2 * 256 + 2 * 8)
    once = closed_form(256, 2, 4, 64, 2, 0, 0, 512) + B * T * 2 * experts
    assert found == once
    both = flops.matmul_flops(jax.grad(forward(config)), *shapes(config))
    # Give or take what statistics leave out.
    assert both == pytest.approx(3 * once, rel=0.04)


def test_bert_adds_its_head_s_transform():
    config = bert.bert("tiny", **DIMS)
    found = flops.matmul_flops(forward(config), *shapes(config))
    assert found == closed_form(256, 2, 4, 64, 4, 2, 1024, 512) + B * T * 2 * 256 * 256


def test_loops_count_every_turn_and_recomputation_counts_again():
    plain = flops.matmul_flops(forward(gpt()), *shapes(gpt()))
    unrolled = gpt(scan=False)
    assert flops.matmul_flops(forward(unrolled), *shapes(unrolled)) == plain
    gradient = jax.value_and_grad(forward(gpt()))
    logits, last = B * T * 2 * 256 * 512, 2 * B * T * 2 * 1024 * 256
    # Each product has two in the backward pass, for its inputs and for its weights.
    assert flops.matmul_flops(gradient, *shapes(gpt())) == 3 * plain
    # Full recomputation repeats each layer's products but the last, which nothing waits for; logits
    # aren't a layer's.
    again = jax.value_and_grad(forward(gpt(remat="full")))
    assert flops.matmul_flops(again, *shapes(gpt())) == 4 * plain - logits - last
    shapes_of = [
        jax.ShapeDtypeStruct((4, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, 8), jnp.float32),
    ]

    def powers(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    assert flops.matmul_flops(powers, *shapes_of) == 7 * 2 * 4 * 8 * 8


@pytest.mark.parametrize("config", [gpt(scan=False), t5.t5_1_1("tiny", **DIMS, scan=False)])
def test_within_two_percent_of_the_compiled_program(config):
    """XLA also counts what isn't a matrix product, which is little at this width."""
    counted = flops.matmul_flops(forward(config), *shapes(config))
    compiled = jax.jit(forward(config)).lower(*shapes(config)).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_peak_of_named_chips(kind, peak):
    chip = mock.Mock(spec=jax.Device, platform="other", device_kind=kind)
    assert flops.peak_flops([chip] * 4)[0] == 4 * peak


def test_peak_of_an_unknown_chip_is_none():
    chip = mock.Mock(spec=jax.Device, platform="other", device_kind="abacus")
    assert flops.peak_flops([chip]) == (0.0, "abacus unknown")
