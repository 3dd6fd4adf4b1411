import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decode.sampling import (
    Sampling,
    apply_temperature,
    greedy,
    keep_top_k,
    keep_top_p,
    sample,
)
from t5x_lite.errors import UserError

NEVER = -0.7 * float(np.finfo(np.float32).max)  # what the padding of a vocabulary is masked with


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(logits, temperature=1.0, top_k=None, top_p=None):
    """One row's distribution, token by token in double precision."""
    logits = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k is not None:
        order = [i for i in order if logits[i] >= logits[order[min(top_k, len(order)) - 1]]]
    probs = dict(zip(order, softmax(logits[order]), strict=True))
    kept, mass = [], 0.0
    for i in order:
        if top_p is None or mass < top_p:
            kept.append(i)
        mass += probs[i]
    result = np.zeros(len(logits))
    result[kept] = softmax(logits[kept])
    return result


def keys_of(rows, seed):
    return jax.random.wrap_key_data(np.array([[seed, row] for row in range(rows)], np.uint32))


@pytest.fixture
def logits():
    values = 3 * np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    values[:, 45:] = NEVER
    return values


SETTINGS = [
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.01},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 3.0, "top_k": 12, "top_p": 0.7},
    {"top_k": 1000, "top_p": 1.0},
]

draw = jax.jit(sample, static_argnums=2)
top_k, top_p = jax.jit(keep_top_k), jax.jit(keep_top_p)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_filtered_distribution_equals_the_reference(logits, setting):
    filtered = np.asarray(jax.jit(Sampling(**setting).filter)(logits), np.float64)
    expected = np.stack([reference(row, **setting) for row in logits])
    np.testing.assert_allclose(softmax(filtered), expected, atol=1e-6)
    np.testing.assert_array_equal(softmax(filtered) > 0, expected > 0)


def test_top_p_keeps_the_token_that_crosses_p():
    logits = np.log(np.array([[0.2, 0.5, 0.3]], np.float32))
    for p, expected in [(0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1e-6, 1)]:
        assert np.isfinite(top_p(logits, p)).sum() == expected, p


def test_equals_of_the_last_token_stay():
    logits = np.array([[1.0, 3.0, 1.0, 0.0, 1.0]], np.float32)
    kept = np.isfinite(top_k(logits, 2))
    assert kept.tolist() == [[True, True, True, False, True]]
    kept = np.isfinite(top_p(logits, 0.8))
    assert kept.tolist() == [[True, True, True, False, True]]


def test_rows_may_have_settings_of_their_own(logits):
    temperatures, ps = np.float32(np.linspace(0.5, 2, 7)), np.float32(np.linspace(0.1, 0.9, 7))
    ks = np.arange(1, 22, 3, np.int32)
    filtered = top_p(top_k(jax.jit(apply_temperature)(logits, temperatures), ks), ps)
    expected = [reference(*row) for row in zip(logits, temperatures, ks, ps, strict=True)]
    np.testing.assert_allclose(softmax(np.asarray(filtered)), expected, atol=1e-6)


def test_filters_respect_what_is_already_removed(logits):
    logits[:, :20] = -np.inf
    filtered = np.asarray(jax.jit(Sampling(0.7, top_k=8, top_p=0.9).filter)(logits))
    assert (np.isfinite(filtered).sum(-1) > 0).all()
    assert not np.isfinite(filtered[:, :20]).any()


def test_temperature_zero_is_the_limit_of_small_temperatures(logits):
    keys = keys_of(7, seed=0)
    for temperature in (0, 1e-6):
        chosen = draw(logits, keys, Sampling(temperature))
        np.testing.assert_array_equal(chosen, logits.argmax(-1))
    assert int(greedy(jnp.array([1.0, 2.0, 2.0]))) == 1


def test_frequencies_match_the_distribution(logits):
    draws, setting = 10_000, {"temperature": 1.5, "top_k": 20, "top_p": 0.95}
    rows = np.repeat(logits[:1], draws, axis=0)
    keys = keys_of(draws, seed=3)
    chosen = draw(rows, keys, Sampling(**setting))
    counts = np.bincount(np.asarray(chosen), minlength=logits.shape[1])
    expected = draws * reference(logits[0], **setting)
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = len(observed) - 1
    # Five standard deviations of a chi-square above its mean.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_a_row_depends_on_its_own_key_and_logits(logits):
    keys = keys_of(7, seed=4)
    sampling = Sampling(1.5, top_k=20, top_p=0.9)
    together = draw(logits, keys, sampling)
    alone = [draw(logits[i : i + 1], keys[i : i + 1], sampling)[0] for i in range(7)]
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(draw(np.zeros_like(logits), keys, sampling))) > 1


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_with_the_number(setting):
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        Sampling(**setting)
