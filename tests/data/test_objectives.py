import numpy as np
import pytest

from t5x_lite.data.converters import assemble
from t5x_lite.data.objectives import (
    CausalLM,
    MaskedLM,
    SpanCorruption,
    corrupt,
    mask_tokens,
    random_spans,
    span_corruption_lengths,
)
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.errors import UserError

VOCABULARY = ByteVocabulary(100)
BOS, EOS = VOCABULARY.bos_id, VOCABULARY.eos_id
OBJECTIVES = [CausalLM(), MaskedLM(), SpanCorruption()]


def documents(in_memory, count=20, longest=40):
    rng = np.random.default_rng(1)
    return in_memory([rng.integers(3, 259, rng.integers(1, longest)) for _ in range(count)])


def rows_of(objective, store, length):
    sides = objective.sides(length)
    examples, shapes = objective.examples(store, VOCABULARY, sides), objective.shapes(sides)
    made = (examples.segments(i, np.random.default_rng(i)) for i in range(len(examples)))
    return [assemble(segments, shapes) for segments in made]


def noise():
    return np.random.default_rng(0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("length", [8, 33, 1500])
def test_rows_have_the_promised_shapes(in_memory, objective, length):
    shapes = objective.shapes(objective.sides(length))
    for row in rows_of(objective, documents(in_memory), length):
        assert {name: (a.shape, a.dtype) for name, a in row.items()} == shapes


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_padding_has_no_segment_and_no_weight(in_memory, objective):
    last = rows_of(objective, documents(in_memory), 64)[-1]
    padding = last["segments"] == 0
    assert padding.any()
    for name in ("tokens", "targets", "weights", "positions"):
        assert not last[name][padding].any()
    assert not np.flatnonzero(np.diff(padding.astype(int)) < 0).size  # only at the end


@pytest.mark.parametrize("length", [2, 7, 64, 5000])
def test_causal_every_token_but_bos_is_a_target_once(in_memory, length):
    store = documents(in_memory)
    targets = [row["targets"][row["weights"] > 0] for row in rows_of(CausalLM(), store, length)]
    expected = [[*row, EOS] for row in store.rows]
    np.testing.assert_array_equal(np.concatenate(targets), np.concatenate(expected))


def test_causal_inputs_are_the_targets_one_earlier(in_memory):
    store = documents(in_memory)
    stream = np.concatenate([[BOS, *row, EOS] for row in store.rows])
    tokens = np.concatenate([row["tokens"] for row in rows_of(CausalLM(), store, 16)])
    np.testing.assert_array_equal(tokens[: len(stream) - 1], stream[:-1])


def test_causal_segments_are_documents_and_positions_restart(in_memory):
    store = in_memory([[10, 11], [12, 13, 14]])
    first, second = rows_of(CausalLM(), store, 6)
    assert first["tokens"].tolist() == [BOS, 10, 11, EOS, BOS, 12]
    assert first["targets"].tolist() == [10, 11, EOS, BOS, 12, 13]
    assert first["weights"].tolist() == [1, 1, 1, 0, 1, 1]
    assert first["segments"].tolist() == [1, 1, 1, 1, 2, 2]
    assert first["positions"].tolist() == [0, 1, 2, 3, 0, 1]
    assert second["tokens"].tolist() == [13, 14, 0, 0, 0, 0]
    assert second["targets"].tolist() == [14, EOS, 0, 0, 0, 0]
    assert second["segments"].tolist() == [1, 1, 0, 0, 0, 0]
    assert second["positions"].tolist() == [0, 1, 0, 0, 0, 0]


def test_causal_learns_to_end_where_bos_and_eos_are_one_id(in_memory):
    vocabulary = ByteVocabulary(0)
    vocabulary.bos_id = vocabulary.eos_id  # as in GPT-2
    examples = CausalLM().examples(in_memory([[10], [11]]), vocabulary, {"tokens": 6})
    row = assemble(examples.segments(0, noise()), CausalLM().shapes({"tokens": 6}))
    assert row["targets"].tolist() == [10, EOS, EOS, 11, EOS, 0]
    assert row["weights"].tolist() == [1, 1, 0, 1, 1, 0]


def test_masked_rates_are_berts():
    ids = np.random.default_rng(0).integers(3, 259, 40_000).astype(np.int32)
    noisy, chosen = mask_tokens(ids, VOCABULARY, MaskedLM(), noise())
    assert chosen.sum() == 6000  # 15%, exactly
    np.testing.assert_array_equal(noisy[~chosen], ids[~chosen])
    masked = (noisy == VOCABULARY.mask_id)[chosen].mean()
    kept = (noisy == ids)[chosen].mean()
    # Devlin et al. 2019: 80% mask, 10% random, 10% kept; four standard errors of 6,000 draws
    assert masked == pytest.approx(0.8, abs=0.021)
    assert kept == pytest.approx(0.1 + 0.1 / 256, abs=0.016)
    drawn = noisy[chosen & (noisy != ids) & (noisy != VOCABULARY.mask_id)]
    assert len(np.unique(drawn)) > 200
    assert not np.isin(drawn, VOCABULARY.special_ids).any()


def test_masked_chooses_evenly_over_places():
    ids = np.full(20, 100, np.int32)
    rng = np.random.default_rng(0)
    counts = sum(mask_tokens(ids, VOCABULARY, MaskedLM(), rng)[1].astype(int) for _ in range(600))
    assert abs(counts - 90).max() < 5 * np.sqrt(90)


def test_masked_never_chooses_special_ids():
    ids = np.array([EOS, BOS, 50, VOCABULARY.size - 1], np.int32)
    _, chosen = mask_tokens(ids, VOCABULARY, MaskedLM(), noise())
    assert chosen.tolist() == [False, False, True, False]
    assert mask_tokens(ids[:2], VOCABULARY, MaskedLM(), noise())[1].sum() == 0


def test_masked_row_is_cls_window_sep_and_keeps_the_original_as_target(in_memory):
    store = documents(in_memory)
    stream = np.concatenate(store.rows)
    rows = rows_of(MaskedLM(), store, 34)
    inner = [row["targets"][row["segments"] == 1][1:-1] for row in rows]
    np.testing.assert_array_equal(np.concatenate(inner), stream)
    assert rows[0]["targets"][[0, 33]].tolist() == [VOCABULARY.cls_id, VOCABULARY.sep_id]
    assert rows[0]["tokens"][[0, 33]].tolist() == [VOCABULARY.cls_id, VOCABULARY.sep_id]
    assert rows[0]["weights"].sum() == round(0.15 * 32)
    assert rows[0]["weights"][[0, 33]].sum() == 0
    assert rows[0]["positions"].tolist() == list(range(34))


def test_span_lengths_are_t5s():
    assert span_corruption_lengths(512) == (568, 114)


@pytest.mark.parametrize("length", [4, 5, 33, 100, 511, 512, 1024])
@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3), (0.5, 3), (0.15, 32), (0.15, 1)])
def test_span_windows_fill_the_encoder_and_no_longer_one_fits(length, density, mean_span):
    raw, targets = span_corruption_lengths(length, density, mean_span)
    sentinels = np.arange(10_000, 9_000, -1)
    for n in (raw, raw + 1):
        is_noise = random_spans(n, density, mean_span, noise())
        inputs, outputs = corrupt(np.arange(n), is_noise, sentinels)
        assert (max(len(inputs), len(outputs)) + 1 <= length) == (n == raw)
        if n == raw:
            assert len(outputs) + 1 == targets


def test_unique_sentinels_on_noise():
    """The worked example of T5's `noise_span_to_unique_sentinel` (vocabulary of 1,000)."""
    is_noise = np.array([True, True, False, False, True, False])
    inputs, targets = corrupt(np.arange(10, 16), is_noise, np.array([999, 998, 997]))
    assert inputs.tolist() == [999, 12, 13, 998, 15]
    assert targets.tolist() == [999, 10, 11, 998, 14]


def undo(inputs, targets, sentinels):
    spans, restored = {}, []
    for token in targets:
        if token in sentinels:
            spans[token] = span = []
        else:
            span.append(token)
    for token in inputs:
        restored.extend(spans.pop(token) if token in sentinels else [token])
    assert not spans
    return restored


def test_span_rows_hold_all_the_text_and_undo(in_memory):
    store = documents(in_memory, 40)
    restored = []
    for row in rows_of(SpanCorruption(), store, 60):
        inputs = row["encoder_tokens"][row["encoder_segments"] == 1]
        targets = row["targets"][row["weights"] == 1]
        assert inputs[-1] == targets[-1] == EOS
        restored += undo(inputs[:-1], targets[:-1], set(VOCABULARY.sentinel_ids))
        used = [t for t in targets if t in VOCABULARY.sentinel_ids]
        assert used == list(range(VOCABULARY.size - 1, VOCABULARY.size - 1 - len(used), -1))
        valid = len(targets)
        assert row["tokens"][:valid].tolist() == [0, *targets[:-1]]
        assert row["encoder_positions"][: len(inputs)].tolist() == list(range(len(inputs)))
    np.testing.assert_array_equal(restored, np.concatenate(store.rows))


def test_full_span_rows_have_no_padding_and_t5s_counts(in_memory):
    row = rows_of(SpanCorruption(), in_memory([range(3, 3 + 200)] * 4), 512)[0]
    assert row["encoder_segments"].sum() == 512
    assert row["segments"].sum() == 114
    sentinels = np.isin(row["targets"], VOCABULARY.sentinel_ids)
    assert sentinels.sum() == 28
    assert (~sentinels).sum() - 1 == 85


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_spans_have_the_right_number_and_begin_after_a_token_that_stays(n):
    is_noise = random_spans(n, 0.15, 3, noise())
    assert len(is_noise) == n
    if n < 2:
        assert not is_noise.any()
        return
    assert is_noise.sum() == max(1, round(0.15 * n))
    assert not is_noise[0]


def test_span_lengths_are_uniform_over_the_ways_to_cut():
    rng = np.random.default_rng(0)
    # 8 tokens, half noise, two spans: 3 ways to cut the noise times 3 to cut the rest
    seen = [tuple(random_spans(8, 0.5, 2, rng).astype(int)) for _ in range(900)]
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    assert len(counts) == 9
    assert abs(counts - 100).max() < 5 * np.sqrt(100)


@pytest.mark.parametrize("objective", OBJECTIVES[1:], ids=lambda o: type(o).__name__)
def test_noise_decides_the_row_and_nothing_else_does(in_memory, objective):
    examples = objective.examples(documents(in_memory), VOCABULARY, objective.sides(64))
    once, again, other = (examples.segments(1, np.random.default_rng(s))[0] for s in (5, 5, 6))
    assert all(np.array_equal(once[name], again[name]) for name in once)
    assert any(not np.array_equal(once[name], other[name]) for name in once)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CausalLM().sides(1), "length=1"),
        (lambda: MaskedLM().sides(3), "length=3"),
        (lambda: SpanCorruption().sides(3), "length=3"),
        (lambda: MaskedLM(density=0), "density=0"),
        (lambda: SpanCorruption(density=1.0), "density=1.0"),
        (lambda: MaskedLM(masked=0.9, randomised=0.2), "masked=0.9"),
        (lambda: SpanCorruption(mean_span=0.5), "mean_span=0.5"),
        (lambda: corrupt(np.arange(3), np.array([True, False, True]), np.arange(1)), "2 spans"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_too_few_sentinels_are_refused_before_training(in_memory):
    sides = SpanCorruption().sides(512)
    with pytest.raises(UserError, match="needs 28 sentinels and the vocabulary has 5"):
        SpanCorruption().examples(documents(in_memory), ByteVocabulary(5), sides)


@pytest.mark.parametrize(
    ("objective", "name"),
    [(CausalLM(), "bos_id"), (MaskedLM(), "mask_id"), (SpanCorruption(), "eos_id")],
)
def test_a_vocabulary_without_a_needed_id_is_refused(in_memory, objective, name):
    vocabulary = ByteVocabulary(100)
    setattr(vocabulary, name, None)
    with pytest.raises(UserError, match=name):
        objective.examples(documents(in_memory), vocabulary, objective.sides(64))
