"""One call of attention against its formula, written out; masks; grouped heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import masks
from t5x_lite.nn.attend import attend
from t5x_lite.nn.attention import AttentionConfig, LayerInputs
from t5x_lite.nn.layers import Common, FanIn
from t5x_lite.nn.positions import BucketBias
from t5x_lite.nn.presets.t5 import t5_1_1


@jax.jit
def run(q, k, v, mask=None, bias=None, scale=0.3):
    """Attention with any mask [B, T, S] and any bias [1, N, T, S]."""
    sees = masks.everything(q.shape[1], k.shape[1]).replace(whole=mask)
    terms = () if bias is None else (BucketBias(jnp.zeros((2, q.shape[2])), bias),)
    return attend(q, k, v, sees, terms, scale=scale)


def inputs(heads=4, kv_heads=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, heads, 8)).astype(dtype)
    k, v = (rng.normal(size=(2, 5, kv_heads, 8)).astype(dtype) for _ in range(2))
    bias = rng.normal(size=(1, heads, 3, 5)).astype(dtype)
    mask = rng.random((2, 3, 5)) < 0.6
    mask[:, :, 0] = True
    return q, k, v, mask, bias


def by_hand(q, k, v, mask, bias, scale):
    """Vaswani et al. 2017, equation 1, one query at a time in float64."""
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        logits = scale * k[b, :, n // group].astype(float) @ q[b, t, n] + bias[0, n, t]
        weight = np.where(mask[b, t], np.exp(logits - logits.max()), 0)
        out[b, t, n] = weight / weight.sum() @ v[b, :, n // group]
    return out


def test_attention_is_its_formula():
    q, k, v, mask, bias = inputs()
    got = run(*map(jnp.asarray, (q, k, v, mask, bias)))
    np.testing.assert_allclose(got, by_hand(q, k, v, mask, bias, 0.3), atol=1e-6)


def test_grouped_heads_equal_repeated_keys():
    q, k, v, mask, bias = map(jnp.asarray, inputs())
    grouped = run(q, k, v, mask, bias)
    repeated = run(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), mask, bias)
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v, mask, bias = map(jnp.asarray, inputs())
    nothing = jnp.zeros_like(mask)

    def loss(q):
        return jnp.sum(run(q, k, v, nothing, bias))

    value, gradient = jax.jit(jax.value_and_grad(loss))(q)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_the_softmax_of_bfloat16_inputs_is_float32():
    # 300 equal logits: each weight 1/300 is summed exactly only in float32.
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 300, 1, 8), jnp.bfloat16)
    out = run(q, k, jnp.ones((1, 300, 1, 8), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0, 0]) == pytest.approx(1.0, rel=0.01)


def test_masks():
    at = jnp.asarray([[0, 1, 2]], jnp.int32)
    assert masks.causal(at, at)[0].tolist() == np.tril(np.ones((3, 3), bool)).tolist()
    segments = jnp.asarray([[1, 2, 0]], jnp.int32)
    same = masks.same_segment(segments, segments)[0]
    assert same.tolist() == np.diag([True, True, False]).tolist()
    assert masks.combine(None, None) is None
    assert masks.combine(None, masks.causal(at, at)).shape == (1, 3, 3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [(12, 5, "heads=12 must be a multiple of kv_heads=5; try kv_heads=4."),
     (8, 16, "heads=8 must be a multiple of kv_heads=16; try kv_heads=8.")],
)  # fmt: skip
def test_heads_that_do_not_divide(heads, kv_heads, message):
    with pytest.raises(UserError) as error:
        AttentionConfig(heads, 64, kv_heads)
    assert str(error.value) == message


def test_the_scale_is_that_of_the_head_unless_given():
    assert AttentionConfig(4, 16).logit_scale == 0.25
    assert AttentionConfig(4, 16, scale=1.0).logit_scale == 1.0


def test_unscaled_logits_start_with_small_queries():
    # T5 multiplies nothing by head_dim^-0.5; its queries start smaller by as much.
    config = t5_1_1("tiny", width=64, heads=4, head_dim=16).decoder.block.attention
    assert config.logit_scale == 1.0
    module = config.build(Common("float32", FanIn()), "attention")
    x, key = jnp.zeros((1, 2, 64)), jax.random.key(0)
    boxed = jax.jit(lambda: module.init(key, x, None, LayerInputs(), None))()["params"]
    kernels = {name: np.asarray(boxed[name]["kernel"].value) for name in boxed}
    assert np.std(kernels["query"]) == pytest.approx((64 * 16) ** -0.5, rel=0.05)
    for name in ("key", "value", "out"):
        assert np.std(kernels[name]) == pytest.approx(64**-0.5, rel=0.05)
