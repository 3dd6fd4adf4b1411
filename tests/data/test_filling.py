"""Rows are full on every side, whatever the objective, and no document is cut that needn't be."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data import filling
from t5x_lite.data.filling import CutPlan, Span, fill, growing
from t5x_lite.data.objectives import (
    UL2,
    CausalLM,
    FillInTheMiddle,
    IidDenoising,
    MaskedLM,
    MaskedPairs,
    PrefixLM,
    SentenceOrder,
    SpanCorruption,
)
from t5x_lite.data.packing import kept
from t5x_lite.data.pipeline import Batches, iterate
from t5x_lite.data.vocabularies import ByteVocabulary
from tests.data.packed import rows_of

BOTH, DECODER = "encoder-decoder", "decoder-only"
LENGTH = 512
# Tokens of the demo corpus's dialogues, as read off their 0th, 5th, 25th, … percentile.
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99)
TOKENS = (1, 2, 12, 73, 519, 1408, 2210, 5409)
OBJECTIVES = {
    "causal": CausalLM(packing="best_fit"),
    "masked": MaskedLM(packing="best_fit"),
    "infilling": FillInTheMiddle(),
    "prefix-decoder": PrefixLM(),
    "prefix": PrefixLM(family=BOTH),
    "prefix-quarter": PrefixLM(family=BOTH, density=0.25),
    "spans": SpanCorruption(packing="best_fit"),
    "iid": IidDenoising(),
    "iid-drop": IidDenoising(style="drop"),
    "iid-mask": IidDenoising(style="mask"),
    "iid-decoder": IidDenoising(family=DECODER),
    "ul2": UL2(),
    "ul2-modes": UL2(modes=("[NLU]", "[S2S]", "[NLG]")),
    "ul2-decoder": UL2(family=DECODER),
    "pairs": MaskedPairs(),
    "pairs-order": MaskedPairs(pairs=SentenceOrder()),
}


class Column:
    def __init__(self, lengths, entries):
        self.offsets, self._entries = np.cumsum([0, *lengths]).astype(np.uint64), entries

    def slice(self, start, stop):
        return self._entries[start:stop]


class DemoLike:
    """Documents as long as the demo corpus's, of sentences of about 15 tokens."""

    def __init__(self, documents=800):
        rng = np.random.default_rng(0)
        places = rng.permutation(np.linspace(0, 99, documents))
        lengths = np.exp(np.interp(places, PERCENTILES, np.log(TOKENS))).round().astype(int)
        ids = rng.integers(3, 259, lengths.sum()).astype(np.int32)
        sizes = [[*[15] * (n // 15), *([n % 15] if n % 15 else [])] for n in lengths.tolist()]
        sentences = np.array(list(itertools.chain(*sizes)), np.int64)
        self._columns = {
            "text": Column(lengths, ids),
            "sentences": Column(list(map(len, sizes)), sentences),
        }

    def column(self, name):
        return self._columns[name]


@pytest.fixture(scope="module")
def demo_like():
    return DemoLike()


@pytest.fixture(scope="module")
def vocabulary():
    vocabulary = ByteVocabulary(100)
    vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id = 256, 257, 258
    return vocabulary


@pytest.fixture(scope="module")
def demo_rows(demo_like, vocabulary):
    """Rows of an objective by its name; planned once."""
    return functools.lru_cache(
        lambda name: rows_of(OBJECTIVES[name], demo_like, LENGTH, vocabulary)
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_98_percent_of_all_positions_are_used(demo_rows, name):
    """The bar of issue 4."""
    rows = demo_rows(name)
    used = {side: 0 for side in rows.shapes if side.endswith("segments")}
    count = rows.count()
    for number in range(count):
        row = rows.row(0, number)
        used = {side: total + np.count_nonzero(row[side]) for side, total in used.items()}
    shares = {side: total / (count * rows.shapes[side][0][0]) for side, total in used.items()}
    assert min(shares.values()) >= 0.98, shares


lengths = st.lists(st.integers(0, 90), min_size=1, max_size=25).filter(any)


def table_of(place, longest=60, sides=2, spread=1.0):
    """A share of the tokens goes to each side, drawn for each place, and an end mark to each."""
    share = np.random.default_rng([5, place]).random() * spread
    n = np.arange(longest + 1)
    first = np.floor(n * share).astype(np.int64)
    return growing(np.stack([first + 1, n - first + 1], axis=1)[:, :sides])


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, sides=st.integers(1, 2), chunk=st.sampled_from([2, 5, 2**18]))
def test_a_plan_holds_every_token_once_and_no_row_overflows(lengths, sides, chunk):
    bounds, room = np.cumsum([0, *lengths]), [20, 31][:sides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "CHUNK", chunk)
        plan = fill(bounds, lambda place: table_of(place, sides=sides), room)
    spans = []
    for row in range(len(plan)):
        members = plan.members(row)
        assert members
        sizes = sum(table_of(s.start, sides=sides)[s.stop - s.start] for s in members)
        assert (sizes <= room).all()
        spans += members
    spans.sort()
    assert spans[0].start == 0
    assert spans[-1].stop == bounds[-1]
    assert all(a.stop == b.start for a, b in itertools.pairwise(spans))
    assert all(span.stop > span.start for span in spans)
    assert set(bounds.tolist()) <= set(itertools.chain(*spans)), "none is across documents"


@settings(max_examples=40, deadline=None)
@given(lengths=lengths)
def test_with_one_side_no_document_is_cut_that_fits_a_row(lengths):
    def table(place):
        return growing(np.arange(61).reshape(-1, 1) + place % 3)

    bounds, room = np.cumsum([0, *lengths]), [40]
    plan = fill(bounds, table, room)
    spans = {span for row in range(len(plan)) for span in plan.members(row)}
    for start, stop in itertools.pairwise(bounds.tolist()):
        if 0 < stop - start <= 60 and table(start)[stop - start] <= 40:
            assert Span(start, stop) in spans


@pytest.mark.parametrize(("name", "least"), [("iid", 1), ("prefix", 1), ("ul2", 0.99)])
def test_no_document_is_cut_that_need_not_be(demo_rows, name, least):
    """Of an encoder's and decoder's documents that fit a row; UL2's wouldn't use 98% else."""
    rows = demo_rows(name)
    spans = {span for row in range(rows.count()) for span in rows.plan(0).members(row)}
    examples, room = rows.examples, [*OBJECTIVES[name].sides(LENGTH).values()]
    fitting = []
    for start, stop in itertools.pairwise(examples._stream.bounds().tolist()):
        if 0 < stop - start <= examples._longest:
            sizes = examples._table_of(rows._noise(0, start))[stop - start]
            if (sizes <= room).all():
                fitting.append(Span(start, stop))
    assert len(fitting) > 500
    assert np.mean([span in spans for span in fitting]) >= least


def test_two_pieces_that_need_different_sides_fill_a_row():
    """Three quarters of one kind's tokens are on one side, of the other's on the other one."""

    def table(place):
        n = np.arange(101)
        more, less = n * 3 // 4, n - n * 3 // 4
        return growing(np.stack([more, less] if place % 2 else [less, more], axis=1))

    plan = fill(np.cumsum([0, *[401] * 20]), table, [60, 60])
    for row in range(len(plan) - 8):
        members = plan.members(row)
        assert (sum(table(s.start)[s.stop - s.start] for s in members) >= 59).all()
        assert {s.start % 2 for s in members} == {0, 1}


CUT_ANEW = [UL2(), IidDenoising(), PrefixLM(family=BOTH), UL2(family=DECODER)]


@pytest.mark.parametrize("objective", CUT_ANEW, ids=lambda o: f"{type(o).__name__}-{o.family}")
def test_epochs_are_cut_anew_and_a_resumed_run_finds_its_place(demo_like, vocabulary, objective):
    store = DemoLike(40)

    def batches():
        rows = rows_of(objective, store, 128, vocabulary)
        return Batches([rows], batch_size=16, seed=0, is_endless=True)

    once = batches()
    rows = once.tasks[0]
    epochs = [{s for r in range(rows.count(e)) for s in rows.plan(e).members(r)} for e in (0, 1)]
    assert epochs[0] != epochs[1]
    step = rows.first_row(2) // 16
    expected = [once[step + n] for n in range(2)]
    for found, batch in zip(iterate(batches(), step), expected, strict=False):
        for name, values in batch.items():
            np.testing.assert_array_equal(found[name], values)
    total = int(store.column("text").offsets[-1])
    for spans in epochs:
        assert sum(s.stop - s.start for s in spans) == total + 40 * isinstance(objective, PrefixLM)


def test_a_plan_with_cuts_is_kept(tmp_path):
    plan = fill(np.array([0, 70, 75]), table_of, [40, 40])
    kept(tmp_path, {}, lambda: plan, CutPlan)
    again = kept(tmp_path, {}, lambda: pytest.fail("made again"), CutPlan)
    assert [again.members(n) for n in range(len(again))] == [
        plan.members(n) for n in range(len(plan))
    ]
