"""The prefix LM: a uniform split, a prefix that both families read, and no token lost."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.converters import sizes_of
from t5x_lite.data.filling import Span
from t5x_lite.data.objectives import PrefixLM
from t5x_lite.data.objectives.base import measured_sizes
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.errors import UserError
from tests.data.conftest import InMemory
from tests.data.packed import BOS, EOS, VOCABULARY, by_example, rows_of

BOTH, DECODER = FAMILIES = ("encoder-decoder", "decoder-only")


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
    family=st.sampled_from(FAMILIES),
    packing=st.sampled_from(["split", "best_fit", "none"]),
    length=st.integers(2, 70),
)
def test_what_is_given_and_asked_for_is_the_text(lengths, seed, family, packing, length):
    rng = np.random.default_rng(seed)
    store = InMemory([rng.integers(3, 259, n) for n in lengths])
    objective = PrefixLM(family=family, packing=packing)
    found = by_example(rows_of(objective, store, length))
    text = [read.inputs + read.targets for _, reads in sorted(found.items()) for read in reads]
    expected = np.concatenate([[*row, EOS] for row in store.rows])
    # A part of a document that begins with its bos, or with what came before, is asked for whole.
    np.testing.assert_array_equal(np.concatenate(text), expected)


def test_a_decoder_s_prefix_is_bos_and_what_is_given(in_memory):
    store = in_memory([range(10, 18)])
    examples = PrefixLM().examples(store, VOCABULARY, {"tokens": 16})
    for seed in range(20):
        (segment,) = examples.segments(0, np.random.default_rng(seed))
        assert segment["tokens"].tolist() == [BOS, *range(10, 18)]
        assert segment["targets"].tolist() == [*range(10, 18), EOS]
        given = int((segment["weights"] == 0).sum())
        assert segment["weights"].tolist() == [0.0] * given + [1.0] * (9 - given)
        assert segment["prefix"].tolist() == [1] * (given + 1) + [0] * (8 - given)
        assert 1 <= given <= 8


def test_documents_in_a_window_are_split_each(in_memory):
    store = in_memory([range(10, 14), range(20, 26), range(30, 40)])
    objective = PrefixLM(packing="split")
    row = rows_of(objective, store, 14).row(0, 0)
    for number in (1, 2):
        mine = row["segments"] == number
        assert row["tokens"][mine][0] == BOS
        assert row["prefix"][mine][:2].all()
        # The last target of a document in a window is the next one's bos, which isn't asked for.
        assert row["weights"][mine].sum() >= 1
    assert row["weights"][row["targets"] == BOS].tolist() == [0] * int(
        (row["targets"] == BOS).sum()
    )


def test_an_encoder_reads_what_is_given_and_eos(in_memory):
    store = in_memory([range(10, 18)])
    objective = PrefixLM(family=BOTH)
    examples = objective.examples(store, VOCABULARY, objective.sides(16))
    for seed in range(20):
        (segment,) = examples.segments(Span(0, 9), np.random.default_rng(seed))
        given = len(segment["encoder_tokens"]) - 1
        assert segment["encoder_tokens"].tolist() == [*range(10, 10 + given), EOS]
        assert segment["targets"].tolist() == [*range(10 + given, 18), EOS]
        assert segment["tokens"].tolist() == [0, *range(10 + given, 18)]
        assert segment["weights"].tolist() == [1.0] * len(segment["targets"])


def test_only_a_document_s_end_is_eos(in_memory):
    objective = PrefixLM(family=BOTH, packing="none")
    examples = objective.examples(in_memory([range(10, 40)]), VOCABULARY, objective.sides(16))
    ends = [examples.segments(i, np.random.default_rng(i))[0]["targets"][-1] for i in range(2)]
    assert ends == [25, EOS]


def noise_of(index):
    return np.random.default_rng([7, index])


@pytest.mark.parametrize("packing", ["best_fit", "split"])
def test_sizes_are_those_of_the_examples_and_fit(in_memory, packing):
    rng = np.random.default_rng(0)
    store = in_memory([rng.integers(3, 259, n) for n in [1, 2, 3, *rng.integers(1, 200, 60)]])
    objective = PrefixLM(packing=packing)
    examples = objective.examples(store, VOCABULARY, objective.sides(64))
    sizes = examples.sizes(noise_of)
    np.testing.assert_array_equal(sizes, measured_sizes(examples, noise_of))
    assert (sizes <= 64).all()
    assert examples.are_sizes_fixed


def test_sizes_of_an_encoder_and_a_decoder_are_as_promised_and_fit(in_memory):
    rng = np.random.default_rng(0)
    store = in_memory([rng.integers(3, 259, n) for n in [1, 2, 3, *rng.integers(1, 200, 60)]])
    for density in (0.5, 0.2):
        objective = PrefixLM(family=BOTH, density=density)
        sides = objective.sides(64)
        assert sides == {"tokens": round(64 * density / (1 - density)), "encoder_tokens": 64}
        examples = objective.examples(store, VOCABULARY, sides)
        plan = examples.plan(noise_of, list(sides.values()))
        for row in range(len(plan)):
            segments = [examples.segments(s, noise_of(s.start))[0] for s in plan.members(row)]
            for span, segment in zip(plan.members(row), segments, strict=True):
                promised = examples._table_of(noise_of(span.start))[span.stop - span.start]
                exact = [sizes_of([segment])[side] for side in sides]
                assert all(0 <= a - b <= 1 for a, b in zip(promised, exact, strict=True))
            total = sizes_of(segments)
            assert all(total[side] <= room for side, room in sides.items())


def test_each_epoch_splits_anew(in_memory):
    store = in_memory([range(10, 70)] * 4)
    for family in FAMILIES:
        rows = rows_of(PrefixLM(family=family), store, 64)
        first, again, other = (by_example(rows, epoch) for epoch in (0, 0, 1))
        assert first == again
        assert first != other


def test_what_cannot_work_is_refused():
    for make, message in [
        (lambda: PrefixLM(density=0.6), "density=0.6"),
        (lambda: PrefixLM(density=0), "density=0"),
        (lambda: PrefixLM(family="encoder-only"), "family="),
        (lambda: PrefixLM(packing="x"), "packing='x'"),
        (lambda: PrefixLM().sides(1), "length=1"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "name"), [(DECODER, "bos_id"), (BOTH, "eos_id")])
def test_a_vocabulary_without_a_needed_id_is_refused(in_memory, family, name):
    vocabulary = ByteVocabulary(100)
    setattr(vocabulary, name, None)
    objective = dataclasses.replace(PrefixLM(), family=family)
    with pytest.raises(UserError, match=name):
        objective.examples(in_memory([[10]]), vocabulary, objective.sides(8))
