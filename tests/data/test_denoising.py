"""Noise that T5 and UL2 make: as published, undone by its targets, and packed without loss."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.converters import SIDES, sizes_of
from t5x_lite.data.filling import Span
from t5x_lite.data.objectives import (
    UL2,
    Denoiser,
    IidDenoising,
    SpanCorruption,
    corrupt,
    random_spans,
    span_corruption_lengths,
)
from t5x_lite.data.objectives.base import measured_sizes
from t5x_lite.data.objectives.noise import (
    iid,
    masked,
    most_iid,
    most_noise,
    random_prefix,
    spans,
    spans_to_sentinels,
)
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.errors import UserError
from tests.data.conftest import InMemory
from tests.data.packed import EOS, VOCABULARY, by_example, rows_of

GOLDEN = json.loads((Path(__file__).parent / "golden/seqio.json").read_text())
BOTH, DECODER = FAMILIES = ("encoder-decoder", "decoder-only")
MODES = ("[NLU]", "[S2S]", "[NLG]")
OBJECTIVES = [
    SpanCorruption(),
    SpanCorruption(density=0.5, mean_span=8),
    *(IidDenoising(style=style) for style in ("spans", "drop", "mask", "bert")),
    UL2(),
    UL2(modes=MODES),
]


def repr_of(objective):
    """Short, for the names of tests."""
    return f"{type(objective).__name__}-{OBJECTIVES.index(objective)}"


SENTINELS = set(VOCABULARY.sentinel_ids)


def undo(inputs, targets):
    """The text of inputs with sentinels and of targets that give each of them with its span."""
    written, restored = {}, []
    for token in targets:
        if token in SENTINELS:
            written[token] = span = []
        else:
            span.append(token)
    for token in inputs:
        restored.extend(written.pop(token) if token in SENTINELS else [token])
    assert not written
    return restored


def restored(objective, read, document):
    """What a segment stands for; the document, where noise was dropped without a trace."""
    inputs, targets = list(read.inputs), list(read.targets)
    assert targets.pop() == EOS
    if isinstance(objective, UL2) and objective.modes:
        lead = [VOCABULARY.encode(mode) for mode in MODES]
        assert inputs[:5] in lead
        is_prefix = inputs[:5] == lead[1]
        inputs = inputs[5:]
        assert is_prefix == (not SENTINELS & set(inputs)) or len(inputs) < 2
    style = getattr(objective, "style", "spans")
    if style in ("mask", "bert"):
        assert len(inputs) == len(targets)
        return targets
    if style == "drop":
        assert sorted(inputs + targets) == sorted(document)
        return list(document)
    return undo(inputs, targets) if SENTINELS & set(inputs) else inputs + targets


def piece_of(examples, example, whole):
    """The text of an example, which is a number, or says itself from where to where."""
    if isinstance(example, Span):
        return whole[example.start : example.stop]
    return examples._pieces.read(example).ids


def documents_strategy(longest=90):
    lengths = st.lists(st.integers(1, longest), min_size=1, max_size=8)
    return st.tuples(lengths, st.integers(0, 2**32 - 1))


@settings(max_examples=40, deadline=None)
@given(
    documents=documents_strategy(),
    objective=st.sampled_from(OBJECTIVES),
    family=st.sampled_from(FAMILIES),
    packing=st.sampled_from(["split", "best_fit", "none"]),
    length=st.integers(14, 70),
)
def test_rows_hold_all_text_once_and_undo(documents, objective, family, packing, length):
    lengths, seed = documents
    rng = np.random.default_rng(seed)
    store = InMemory([rng.integers(3, 259, n) for n in lengths])
    objective = dataclasses.replace(objective, family=family, packing=packing)
    rows = rows_of(objective, store, length)
    found = by_example(rows)
    text, whole = [], np.concatenate(store.rows)
    for example, (read,) in sorted(found.items()):
        text += restored(objective, read, piece_of(rows.examples, example, whole).tolist())
    np.testing.assert_array_equal(text, whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr_of)
def test_sizes_are_those_of_the_examples(in_memory, objective, family):
    rng = np.random.default_rng(0)
    store = in_memory([rng.integers(3, 259, n) for n in [1, 2, 3, *rng.integers(1, 200, 60)]])
    objective = dataclasses.replace(objective, family=family, packing="best_fit")
    sides = objective.sides(100)
    examples = objective.examples(store, VOCABULARY, sides)

    def noise_of(index):
        return np.random.default_rng([7, index])

    if examples.are_sizes_fixed:
        expected = measured_sizes(examples, lambda index: np.random.default_rng([8, index]))
        np.testing.assert_array_equal(examples.sizes(noise_of), expected)
        return
    plan = examples.plan(noise_of, [sides[side] for side in SIDES if side in sides])
    spans = [span for row in range(len(plan)) for span in plan.members(row)]
    drawn = {}
    for span in spans:
        table = examples._table_of(noise_of(span.start))
        sizes = sizes_of(examples.segments(span, noise_of(span.start)))
        exact = [sizes[side] for side in SIDES if side in sizes]
        # A token more may take a position less on a side: a table never falls.
        assert all(
            0 <= a - b <= 1 for a, b in zip(table[span.stop - span.start], exact, strict=True)
        )
        drawn[tuple(exact)] = span
    assert len(spans) > 60
    assert len(drawn) > 10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr_of)
@pytest.mark.parametrize("length", [64, 256])
def test_windows_fit_and_the_next_longer_may_not(in_memory, objective, family, length):
    objective = dataclasses.replace(objective, family=family, packing="split")
    sides = objective.sides(length)
    store = in_memory([np.arange(5000) % 256 + 3])
    examples = objective.examples(store, VOCABULARY, sides)
    raw = int(examples._pieces.sizes()[0])
    mark = 5 if getattr(objective, "modes", ()) else 0
    room = tuple(sides[side] for side in ("tokens", "encoder_tokens") if side in sides)
    assert all(a <= b for a, b in zip(objective._limits(raw, mark), room, strict=True))
    assert any(a > b for a, b in zip(objective._limits(raw + 1, mark), room, strict=True))
    sizes = np.concatenate(
        [examples.sizes(lambda i, s=s: np.random.default_rng([s, i])) for s in range(5)]
    )
    assert (sizes <= room).all()


@pytest.mark.parametrize("case", GOLDEN["denoising"], ids=lambda case: str(len(case["tokens"])))
def test_noise_becomes_what_t5_makes_of_it(case):
    ids, is_noise = np.array(case["tokens"], np.int32), np.array(case["mask"], bool)
    size = case["vocab_size"]
    sentinels = np.arange(size - 1, size - 101, -1, dtype=np.int32)
    inputs, targets = corrupt(ids, is_noise, sentinels)
    assert inputs.tolist() == case["noise_span_to_unique_sentinel"]
    rest = spans_to_sentinels(ids, ~is_noise, sentinels)
    assert rest.tolist() == case["nonnoise_span_to_unique_sentinel"]
    # T5's targets, where the noise is as its random spans have it
    assert (targets.tolist() == rest.tolist()) == (
        len(ids) > 0 and not is_noise[0] and is_noise[-1]
    )
    assert ids[~is_noise].tolist() == case["drop_noise_tokens"]
    assert ids[is_noise].tolist() == case["drop_nonnoise_tokens"]
    rng = np.random.default_rng(0)
    all_masked = masked(ids, is_noise, size - 1, ids, 0.0, rng)
    assert all_masked.tolist() == case["noise_token_to_sentinel"]


def test_the_worked_example_of_unique_sentinels():
    is_noise = np.array([True, True, False, False, True, False])
    inputs, targets = corrupt(np.arange(10, 16), is_noise, np.array([999, 998, 997]))
    assert inputs.tolist() == [999, 12, 13, 998, 15]
    assert targets.tolist() == [999, 10, 11, 998, 14]


@pytest.mark.parametrize(
    "case", GOLDEN["span_counts"], ids=lambda c: f"{c['density']}-{c['mean_span']}"
)
def test_spans_are_counted_as_t5_counts_them(case):
    for length, noise, count in zip(case["length"], case["noise"], case["spans"], strict=True):
        assert spans(length, case["density"], case["mean_span"]) == (noise, count), length


@pytest.mark.parametrize(
    "case", GOLDEN["span_lengths"], ids=lambda c: f"{c['density']}-{c['mean_span']}"
)
def test_windows_are_as_long_as_t5s(case):
    density, mean_span = case["density"], case["mean_span"]
    rows = zip(case["inputs_length"], case["tokens_length"], case["targets_length"], strict=True)
    for length, raw, targets in rows:
        # T5 reckons without any span where its noise then has one, and is a token short of room.
        if round(round(raw * density) / mean_span) > 0:
            own = span_corruption_lengths(length, density, mean_span)
            # With a density of one half it takes a token off without counting anew.
            assert own in [(raw, targets), (raw, targets - (density == 0.5))]
            sides = SpanCorruption(density=density, mean_span=mean_span).sides(length)
            assert sides == {"tokens": own[1], "encoder_tokens": length}


def generators(count):
    return (np.random.default_rng([3, index]) for index in range(count))


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3), (0.5, 8), (0.15, 64)])
def test_random_spans_have_the_density_and_mean_that_they_are_named_for(density, mean_span):
    n = 1000
    for noise in generators(20):
        is_noise = random_spans(n, density, mean_span, noise)
        begins = is_noise & ~np.concatenate([[False], is_noise[:-1]])
        assert is_noise.sum() == n * density
        assert is_noise.sum() / begins.sum() == pytest.approx(mean_span, rel=0.2)


def test_iid_noise_is_independent_and_of_its_density():
    masks = np.concatenate([iid(1000, 0.15, noise) for noise in generators(200)])
    sigma = np.sqrt(0.15 * 0.85 / len(masks))
    assert abs(masks.mean() - 0.15) < 5 * sigma
    pairs = (masks[1:] & masks[:-1]).mean()
    assert abs(pairs - 0.15**2) < 5 * np.sqrt(0.15**2 / len(masks))


def test_iid_noise_in_an_example_is_as_drawn_and_bounded(in_memory):
    store = in_memory([np.arange(20_000) % 256 + 3])
    objective = IidDenoising(packing="split")
    examples = objective.examples(store, VOCABULARY, objective.sides(512))
    sizes = np.concatenate(
        [examples.sizes(lambda i, s=s: np.random.default_rng([s, i]))[:-1] for s in range(10)]
    )
    raw, (targets, inputs) = 511, sizes.mean(axis=0) - 1
    noisy, count = raw * 0.15, raw * 0.15 * 0.85 + 0.15**2  # a span begins where none was before
    assert targets == pytest.approx(noisy + count, rel=0.02)
    assert inputs == pytest.approx(raw - noisy + count, rel=0.01)
    # As Raffel et al. had it (iid_15_u_u.gin): 512 and 192 positions, and 100 sentinels
    assert 192 < objective.sides(512)["tokens"] < 204
    assert sizes[:, 0].max() < 192


def test_iid_noise_is_drawn_anew_where_sentinels_run_out():
    objective, counts = IidDenoising(density=0.5), []
    for noise in generators(100):
        is_noise = objective._draw(30, 30, 7, noise).is_noise
        counts.append((is_noise & ~np.concatenate([[False], is_noise[:-1]])).sum())
    assert set(counts) <= set(range(8))
    assert counts.count(7) > 30, "which is near the mean, so that others were drawn before"


@pytest.mark.parametrize("density", [0.15, 0.5])
def test_the_bounds_of_iid_noise_are_four_standard_deviations(density):
    n, noise = 400, np.random.default_rng(0)
    masks = noise.random((4000, n)) < density
    begins = masks & ~np.pad(masks[:, :-1], ((0, 0), (1, 0)))
    noisy, count = masks.sum(axis=1), begins.sum(axis=1)
    most, most_spans = most_iid(n, density)
    for bound, seen in ((most, noisy + count), (most_spans, count)):
        assert bound - seen.mean() == pytest.approx(4 * seen.std(), rel=0.05, abs=1)
    assert most_noise(n, density) - noisy.mean() == pytest.approx(4 * noisy.std(), rel=0.05, abs=1)
    assert most_iid(1, density) == (2, 1)


def test_berts_noise_is_a_tenth_random_tokens():
    ids = np.full(50_000, 7, np.int32)
    is_noise = np.arange(len(ids)) % 2 == 0
    rng = np.random.default_rng(0)
    made = masked(ids, is_noise, 362, VOCABULARY.ordinary_ids, 0.1, rng)
    assert (made[~is_noise] == 7).all()
    assert (made[is_noise] == 362).mean() == pytest.approx(0.9, abs=0.01)
    others = made[is_noise & (made != 362)]
    assert np.isin(others, VOCABULARY.ordinary_ids).all()
    assert len(np.unique(others)) > 250


@pytest.mark.parametrize(("density", "least"), [(0.5, 1), (0.25, 50)])
def test_a_random_prefix_is_uniform_as_t5s(density, least):
    drawn = np.array([random_prefix(101, density, noise) for noise in generators(4000)])
    assert drawn.min() == least
    assert drawn.max() == 100
    counts = np.bincount(drawn)[least:]
    assert abs(counts - 4000 / len(counts)).max() < 5 * np.sqrt(4000 / len(counts))
    assert 1 - drawn.mean() / 101 == pytest.approx(density, abs=0.02)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_a_prefix_of_few_tokens_leaves_one_to_ask_for(n):
    drawn = {random_prefix(n, 0.5, noise) for noise in generators(50)}
    assert drawn == {0: {0}, 1: {0}, 2: {1}, 3: {1, 2}}[n]


def test_ul2_draws_the_denoisers_of_its_table(in_memory):
    """Tay et al. 2022, table 1: two R, one S and four X, told apart here by their sizes."""
    objective = UL2(modes=MODES, packing="split")
    n, counts, prefixes = 400, {}, []
    for noise in generators(3500):
        drawn = objective._draw(n, n, 100, noise)
        begins = drawn.is_noise & ~np.concatenate([[False], drawn.is_noise[:-1]])
        key = (drawn.mode, drawn.style, int(drawn.is_noise.sum()), int(begins.sum()))
        if drawn.mode == 1:
            prefixes.append(key[2])
            key = "S"
        counts[key] = counts.get(key, 0) + 1
    expected = {(0, "spans", 60, 20), (0, "spans", 60, 8), "S", (2, "spans", 200, 67)}
    expected |= {(2, "spans", 200, 25), (2, "spans", 60, 1), (2, "spans", 200, 3)}
    assert set(counts) == expected
    assert all(abs(count - 500) < 5 * np.sqrt(500) for count in counts.values())
    assert np.mean(prefixes) / n == pytest.approx(0.25, abs=0.03)


def test_ul2_draws_in_proportion_to_rates():
    denoisers = [Denoiser("S", 0.25, None, rate=3), Denoiser("R", 0.15, 3)]
    modes = [UL2(denoisers=denoisers)._draw(50, 50, 100, noise).mode for noise in generators(2000)]
    assert np.mean(np.array(modes) == 1) == pytest.approx(0.75, abs=0.04)


def test_a_mode_is_put_before_the_inputs(in_memory):
    denoisers = [Denoiser("S", 0.25, None)]
    store = in_memory([range(10, 30)])
    for family, begin in ((BOTH, []), (DECODER, [VOCABULARY.bos_id])):
        objective = UL2(denoisers=denoisers, modes=MODES, family=family)
        examples = objective.examples(store, VOCABULARY, objective.sides(64))
        (segment,) = examples.segments(Span(0, 20), np.random.default_rng(0))
        read = segment["encoder_tokens" if family == BOTH else "tokens"].tolist()
        assert read[: len(begin) + 5] == [*begin, *VOCABULARY.encode("[S2S]")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IidDenoising(style="x"), "style='x'"),
        (lambda: IidDenoising(density=0), "density=0"),
        (lambda: SpanCorruption(family="encoder-only"), "family='encoder-only'"),
        (lambda: UL2(packing="x"), "packing='x'"),
        (lambda: UL2(denoisers=[]), "no denoisers"),
        (lambda: UL2(modes=["[NLU]"]), "must be one text each"),
        (lambda: Denoiser("Q", 0.5, 3), "kind='Q'"),
        (lambda: Denoiser("S", 0.6, None), "density=0.6"),
        (lambda: Denoiser("R", 0.15, 0.5), "mean_span=0.5"),
        (lambda: Denoiser("R", 0.15, 3, rate=0), "rate=0"),
        (lambda: UL2().sides(3), "length=3"),
        (lambda: UL2(family="decoder-only").sides(4), "length=4"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "vocabulary", "length", "message"),
    [
        (
            IidDenoising(packing="split"),
            ByteVocabulary(40),
            512,
            "needs 91 sentinels and the vocabulary has 40",
        ),
        (IidDenoising(style="mask"), ByteVocabulary(0), 64, "needs 1 sentinels"),
        (UL2(), ByteVocabulary(5), 512, "needs .* sentinels and the vocabulary has 5"),
        (UL2(modes=MODES), VOCABULARY, 7, "length=7"),
    ],
)
def test_what_the_vocabulary_or_length_cannot_is_refused(
    in_memory, objective, vocabulary, length, message
):
    with pytest.raises(UserError, match=message):
        objective.examples(in_memory([[10, 11]]), vocabulary, objective.sides(length))


def test_another_family_s_models_are_refused():
    assert UL2().for_family("decoder-only").family == "decoder-only"
    with pytest.raises(UserError, match="encoder-only"):
        UL2().for_family("encoder-only")
