"""Fill in the middle: the published orders, undone exactly, no document cut more than before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.objectives import CausalLM, FillInTheMiddle
from t5x_lite.data.objectives.base import measured_sizes
from t5x_lite.data.objectives.infilling import PSM, SPM, infill, restore, special_id
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.errors import UserError
from tests.data.conftest import InMemory
from tests.data.packed import BOS, EOS, VOCABULARY, by_example, rows_of

MARKS = np.array(VOCABULARY.sentinel_ids[:3], np.int32)
PRE, SUF, MID = MARKS.tolist()
TEXT = np.arange(10, 18, dtype=np.int32)


def test_the_orders_are_the_papers():
    psm = infill(TEXT, 2, 5, MARKS, PSM)
    assert psm.tolist() == [PRE, 10, 11, SUF, 15, 16, 17, MID, 12, 13, 14]
    spm = infill(TEXT, 2, 5, MARKS, SPM)
    assert spm.tolist() == [PRE, SUF, 15, 16, 17, MID, 10, 11, 12, 13, 14]


@given(
    ids=st.lists(st.integers(3, 258), max_size=30),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    order=st.sampled_from([PSM, SPM]),
)
def test_restoring_gives_the_text_back(ids, cuts, order):
    text = np.array(ids, np.int32)
    first, second = sorted(round(cut * len(ids)) for cut in cuts)
    assert restore(infill(text, first, second, MARKS, order), MARKS).tolist() == ids
    assert restore(text, MARKS).tolist() == ids


@pytest.mark.parametrize("ids", [[PRE, 10, SUF], [10, PRE, SUF, MID], [PRE, MID, 10, SUF]])
def test_half_an_infilled_text_isnt_restored(ids):
    with pytest.raises(UserError, match="aren't those of an infilled text"):
        restore(np.array(ids, np.int32), MARKS)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
    rate=st.sampled_from([0.5, 1]),
    packing=st.sampled_from(["best_fit", "none"]),
    length=st.integers(7, 70),
)
def test_rows_hold_every_document_once(lengths, seed, rate, packing, length):
    rng = np.random.default_rng(seed)
    store = InMemory([rng.integers(3, 259, n) for n in lengths])
    rows = rows_of(FillInTheMiddle(rate=rate, packing=packing), store, length)
    found, text = by_example(rows), []
    assert sorted(found) == list(range(len(found)))
    for _, (read,) in sorted(found.items()):
        ids, is_infilled = read.targets, read.targets[0] == PRE
        end = [EOS] if ids[-1] == EOS else []
        body = restore(np.array(ids[: len(ids) - len(end)], np.int32), MARKS).tolist()
        text += body if is_infilled else body + end
    without_ends = np.concatenate(store.rows)
    np.testing.assert_array_equal([i for i in text if i != EOS], without_ends)
    plain = rows_of(CausalLM(packing="best_fit"), store, length).examples
    assert len(found) == len(plain), "no document is cut more often than without infilling"


def test_an_infilled_document_begins_and_ends_and_bears_loss(in_memory):
    store = in_memory([TEXT])
    seen = set()
    examples = FillInTheMiddle(rate=1).examples(store, VOCABULARY, {"tokens": 16})
    for seed in range(40):
        (segment,) = examples.segments(0, np.random.default_rng(seed))
        ids = [*segment["tokens"].tolist(), int(segment["targets"][-1])]
        assert ids[1:] == segment["targets"].tolist()
        assert ids[0] == BOS
        assert ids[-1] == EOS
        assert restore(np.array(ids[1:-1], np.int32), MARKS).tolist() == TEXT.tolist()
        assert segment["weights"].all()
        seen.add(tuple(ids))
    assert len(seen) > 12


def test_parts_of_a_cut_document_are_infilled_each(in_memory):
    store = in_memory([np.arange(100) + 10])
    rows = rows_of(FillInTheMiddle(rate=1), store, 40)
    found = by_example(rows)
    bodies = [restore(np.array(r.targets[:-1], np.int32), MARKS) for (r,) in found.values()]
    assert all(read.targets[0] == PRE for (read,) in found.values())
    assert all(read.targets[-1] == EOS for (read,) in found.values())
    # Every 40 - 4 tokens, where every 40 would make as many parts; the first has the bos.
    assert sorted(map(len, bodies)) == [28, 36, 36]


def test_what_leaves_no_room_for_marks_stays_as_it_is(in_memory):
    store = in_memory([range(10, 10 + 15), range(10, 10 + 12), range(10, 10 + 13)])
    examples = FillInTheMiddle(rate=1).examples(store, VOCABULARY, {"tokens": 16})
    first = [examples.segments(i, np.random.default_rng(0))[0]["targets"][0] for i in range(3)]
    assert first == [10, PRE, 10]  # 15 + bos fill the row; 12 + bos and three marks do too


def test_rates_and_cuts_are_as_asked(in_memory):
    store = in_memory([np.arange(248) % 200 + 10])
    objective = FillInTheMiddle(rate=0.7, spm=0.25)
    examples = objective.examples(store, VOCABULARY, {"tokens": 256})
    parts, firsts = {PSM: [], SPM: []}, []
    for index in range(2000):
        ids = examples.segments(0, np.random.default_rng([1, index]))[0]["targets"].tolist()
        if ids[0] == PRE:
            suffix, middle = ids.index(SUF), ids.index(MID)
            order = SPM if suffix == 1 else PSM  # or, once in 125, PSM without any prefix
            parts[order].append((suffix - 1, middle - suffix - 1, len(ids) - middle - 2))
            firsts.append(suffix - 1)
    infilled = len(firsts)
    assert infilled / 2000 == pytest.approx(0.7, abs=0.04)
    assert len(parts[SPM]) / infilled == pytest.approx(0.25, abs=0.04)
    # Two uniform places cut a text into thirds, on average.
    third = 248 / 3
    np.testing.assert_allclose(np.mean(parts[PSM], axis=0), third, rtol=0.08)
    np.testing.assert_allclose(np.mean(parts[SPM], axis=0), [0, third, 2 * third], rtol=0.1)


def test_sizes_are_those_of_the_examples(in_memory):
    rng = np.random.default_rng(0)
    store = in_memory([rng.integers(3, 259, n) for n in [1, 2, 3, *rng.integers(1, 200, 100)]])
    for rate in (0.5, 1):
        examples = FillInTheMiddle(rate=rate).examples(store, VOCABULARY, {"tokens": 64})

        def noise_of(index):
            return np.random.default_rng([7, index])

        sizes = examples.sizes(noise_of)
        np.testing.assert_array_equal(sizes, measured_sizes(examples, noise_of))
        assert sizes.max() <= 64
        assert examples.are_sizes_fixed == (rate == 1)
        other = examples.sizes(lambda index: np.random.default_rng([8, index]))
        assert np.array_equal(sizes, other) == (rate == 1)


def test_best_fit_fills_the_rows(in_memory):
    rng = np.random.default_rng(0)
    store = in_memory([rng.integers(3, 259, n) for n in rng.integers(20, 600, 2000)])
    rows = rows_of(FillInTheMiddle(), store, 512)
    sizes = rows.examples.sizes(lambda index: rows._noise(0, index))
    assert sizes.sum() / (512 * rows.count(0)) > 0.98


class Named(ByteVocabulary):
    """Bytes, and three special tokens by name, as an imported vocabulary has them."""

    NAMES = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")

    def __init__(self):
        super().__init__(0)
        self.first, self.size = self.size, self.size + 3

    def encode(self, text):
        if text in self.NAMES:
            return [self.first + self.NAMES.index(text)]
        return super().encode(text)

    def piece(self, token):
        last = token - self.first
        return self.NAMES[last] if last >= 0 else super().piece(token)


def test_sentinels_may_be_special_tokens_by_name(in_memory):
    vocabulary = Named()
    objective = FillInTheMiddle(rate=1, sentinels=Named.NAMES)
    examples = objective.examples(in_memory([TEXT]), vocabulary, {"tokens": 16})
    targets = examples.segments(0, np.random.default_rng(0))[0]["targets"]
    assert targets[0] == vocabulary.first
    assert restore(targets[:-1], np.arange(3) + vocabulary.first).tolist() == TEXT.tolist()
    assert special_id(VOCABULARY, "<extra_id_7>") == VOCABULARY.sentinel_ids[7]


def test_a_vocabulary_whose_begin_is_its_end_will_do(in_memory):
    vocabulary = ByteVocabulary(3)
    vocabulary.bos_id = vocabulary.eos_id
    examples = FillInTheMiddle(rate=1).examples(in_memory([TEXT]), vocabulary, {"tokens": 16})
    assert examples.segments(0, np.random.default_rng(0))[0]["tokens"][0] == EOS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FillInTheMiddle(rate=0), "rate=0"),
        (lambda: FillInTheMiddle(rate=1.5), "rate=1.5"),
        (lambda: FillInTheMiddle(spm=-0.1), "spm=-0.1"),
        (lambda: FillInTheMiddle(sentinels=("<extra_id_0>",) * 3), "three different names"),
        (lambda: FillInTheMiddle(sentinels=("a", "b")), "three different names"),
        (lambda: FillInTheMiddle(packing="split"), "packing='split'"),
        (lambda: FillInTheMiddle().sides(6), "length=6"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sentinels", "message"),
    [
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "has no token '<fim_prefix>'"),
        (("<extra_id_0>", "<extra_id_1>", "<extra_id_100>"), "no token '<extra_id_100>'"),
    ],
)
def test_sentinels_that_the_vocabulary_lacks_are_refused(in_memory, sentinels, message):
    objective = FillInTheMiddle(sentinels=sentinels)
    with pytest.raises(UserError, match=message):
        objective.examples(in_memory([TEXT]), VOCABULARY, {"tokens": 16})
