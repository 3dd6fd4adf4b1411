import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses
from t5x_lite.decode import generate as module
from t5x_lite.decode.generate import Decoding, decode, generate
from t5x_lite.decode.prompts import right_pad
from t5x_lite.decode.sampling import GREEDY, Sampling
from t5x_lite.nn import parameters
from t5x_lite.nn.cache import Cache
from t5x_lite.nn.transformer import Transformer

FAMILIES = ["llama", "gpt2", "t5_1_0"]
PROMPTS = [[5, 17, 3, 60], [9], [44, 2, 81, 7, 33, 21, 90]]
FORCED = [[0, 12], [0], [0, 50, 8]]  # an encoder-decoder's ragged beginnings
NEW, VOCAB = 10, 100
SAMPLED = Decoding(NEW, stop_ids=(11, 12), sampling=Sampling(30.0, top_k=95, top_p=0.99), pad_id=98)


def prompt_of(model, rows=PROMPTS, forced=FORCED, length=None):
    if model.config.kind == "encoder-decoder":
        return right_pad(rows, length, "encoder_") | right_pad(forced)
    return right_pad(rows, length)


def keys(seed=0):
    return jax.random.wrap_key_data(np.array([[seed, row] for row in range(3)], np.uint32))


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, batch):
    return losses.logits(model.apply({"params": params}, batch))


def full_pass(model, params, row, tokens):
    """Logits [T, V] of one row alone, without a cache. All have one shape, by padding."""
    batch = right_pad([tokens], 20)
    if model.config.kind == "encoder-decoder":
        batch |= right_pad([row], 12, "encoder_")
    return np.asarray(full_logits(model, params, batch))[0, : len(tokens)]


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)


def greedy_by_full_passes(model, params, row, start):
    tokens, logprobs = list(start), []
    for _ in range(NEW):
        logits = full_pass(model, params, row, tokens)[-1]
        tokens.append(int(logits.argmax()))
        logprobs.append(log_softmax(logits)[tokens[-1]])
    return tokens[len(start) :], logprobs


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation_equals_full_passes_up_to_the_first_stop_id(tiny, name):
    model, params = tiny(name)
    starts = FORCED if model.config.kind == "encoder-decoder" else PROMPTS
    expected = [
        greedy_by_full_passes(model, params, row, start)
        for row, start in zip(PROMPTS, starts, strict=True)
    ]
    assert len({token for tokens, _ in expected for token in tokens}) > 8  # or it says little
    # Row 0 ends in the middle, row 1 (if nowhere else) with its last token.
    stops = (expected[0][0][4], expected[1][0][-1])
    decoding = Decoding(NEW, stop_ids=stops, sampling=GREEDY, pad_id=99)
    result = generate(model, params, prompt_of(model), keys(), decoding)
    for i, (tokens, logprobs) in enumerate(expected):
        ends = np.flatnonzero(np.isin(tokens, stops))
        length = ends[0] + 1 if len(ends) else NEW
        assert result.lengths_B[i] == length
        assert result.stopped_B[i] == bool(len(ends))
        assert result.tokens_BT[i].tolist() == tokens[:length] + [99] * (NEW - length)
        np.testing.assert_allclose(result.logprobs_BT[i, :length], logprobs[:length], atol=2e-5)
        assert not result.logprobs_BT[i, length:].any()


def test_a_prefix_is_read_in_both_directions_and_goes_on_causally(tiny):
    model, params = tiny("llama")
    prompt = right_pad(PROMPTS)
    prompt |= {"prefix": prompt["segments"]}
    result = generate(model, params, prompt, keys(), Decoding(NEW, sampling=GREEDY))
    causal = generate(model, params, right_pad(PROMPTS), keys(), Decoding(NEW, sampling=GREEDY))
    for i, row in enumerate(PROMPTS):
        tokens = [*row, *result.tokens_BT[i].tolist()]
        batch = right_pad([tokens], 20)
        batch |= {"prefix": (np.arange(20) < len(row)).astype(np.int32)[None]}
        logits = np.asarray(full_logits(model, params, batch))[0, len(row) - 1 : len(tokens) - 1]
        assert logits.argmax(axis=-1).tolist() == tokens[len(row) :]
        chosen = np.take_along_axis(log_softmax(logits), np.array(tokens[len(row) :])[:, None], 1)
        np.testing.assert_allclose(result.logprobs_BT[i], chosen[:, 0], atol=2e-5)
    differs = np.abs(np.asarray(result.logprobs_BT - causal.logprobs_BT)).max(axis=1)
    assert (differs > 1e-3).tolist() == [len(row) > 1 for row in PROMPTS]


def run(tiny, rows, keys, banned=None):
    model, params = tiny("llama")
    banned = np.zeros(model.config.physical_vocab, bool) if banned is None else banned
    result = generate(model, params, right_pad(rows), keys, SAMPLED, jnp.asarray(banned))
    return jax.tree.map(np.asarray, result)


def test_a_row_depends_on_its_prompt_and_key_alone(tiny):
    together = run(tiny, PROMPTS, keys())
    shuffled = run(tiny, [PROMPTS[2], [1, 2], PROMPTS[1]], keys()[np.array([2, 0, 1])])
    alone = run(tiny, PROMPTS[1:2], keys()[1:2])
    for i, others, j in [(2, shuffled, 0), (1, shuffled, 2), (1, alone, 0)]:
        np.testing.assert_array_equal(together.tokens_BT[i], others.tokens_BT[j])
        np.testing.assert_allclose(together.logprobs_BT[i], others.logprobs_BT[j], atol=2e-5)
    other_keys = run(tiny, PROMPTS, keys(seed=1))
    assert (together.tokens_BT != other_keys.tokens_BT).any(axis=1).all()
    # Each token has noise of its own: nearly uniform draws seldom repeat.
    for result in (together, other_keys):
        for tokens, length in zip(result.tokens_BT, result.lengths_B, strict=True):
            assert len(set(tokens[:length].tolist())) > 0.6 * length


def test_logprobs_are_the_models_own_and_no_id_is_outside_the_vocabulary(tiny):
    model, params = tiny("llama")
    for seed in range(3):
        result = run(tiny, PROMPTS, keys(seed))
        for i, row in enumerate(PROMPTS):
            tokens = result.tokens_BT[i, : result.lengths_B[i]].tolist()
            assert max(tokens) < VOCAB
            scores = log_softmax(full_pass(model, params, row, row + tokens)[len(row) - 1 : -1])
            expected = [score[token] for score, token in zip(scores, tokens, strict=True)]
            np.testing.assert_allclose(result.logprobs_BT[i, : len(tokens)], expected, atol=2e-5)


def test_banned_ids_are_never_chosen(tiny):
    banned = np.arange(128) % 2 == 1
    tokens = np.concatenate([run(tiny, PROMPTS, keys(s), banned).tokens_BT for s in range(3)])
    assert (tokens % 2 == 0).all()
    assert (np.concatenate([run(tiny, PROMPTS, keys(s)).tokens_BT for s in range(3)]) % 2).any()


def test_the_model_runs_no_longer_than_its_last_row(tiny, monkeypatch):
    """A model that writes 1, 2, 3, … and, as its token number `ends[i]`, the stop id 0."""
    calls, (model, _) = [], tiny("llama")
    decoding = Decoding(NEW, stop_ids=(0,), sampling=GREEDY, pad_id=49)
    prompt = right_pad([[1], [1, 2, 3], [1, 2]])

    @jax.jit
    def run(ends):
        def logits(count):
            return jax.nn.one_hot(jnp.where(count == ends, 0, count + 1), 50)

        def prefill(model, params, prompt, slots):
            return logits(0), Cache(None, None, None, None, jnp.zeros((), jnp.int32))

        def decode_step(model, params, tokens, positions, live, cache):
            jax.debug.callback(lambda *x: calls.append([v.tolist() for v in x]), positions, live)
            count = cache.index + 1
            return logits(count), cache.replace(index=count)

        monkeypatch.setattr(module, "prefill", prefill)
        monkeypatch.setattr(module, "decode_step", decode_step)
        return decode(model, {}, prompt, keys(), decoding)

    for ends, steps in [([0, 0, 0], 0), ([0, 2, 4], 4), ([0, 2, 99], 9), ([99, 99, 99], 9)]:
        calls.clear()
        result = run(jnp.array(ends))
        jax.effects_barrier()
        for tokens, length, end in zip(result.tokens_BT, result.lengths_B, ends, strict=True):
            written = [*range(1, min(end, NEW) + 1), 0][:NEW]
            assert length == len(written)
            assert tokens.tolist() == written + [49] * (NEW - len(written))
        assert result.stopped_B.tolist() == [end < NEW for end in ends]
        # A row that has ended counts as padding; the last tokens of the others stand in place.
        assert calls == [[[1 + n, 3 + n, 2 + n], [end > n for end in ends]] for n in range(steps)]


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_and_unrolled_models_decode_under_strict_promotion(tiny, name):
    config = dataclasses.replace(tiny(name)[0].config, dtype="bfloat16", scan=False)
    model = Transformer(config)
    params, _ = parameters.abstract(config)
    run = functools.partial(decode, model, decoding=SAMPLED)
    result = jax.eval_shape(run, params, prompt_of(model), keys_B=keys())
    assert result.tokens_BT.shape == result.logprobs_BT.shape == (3, NEW)
    assert result.logprobs_BT.dtype == jnp.float32
