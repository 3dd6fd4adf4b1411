import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data import packing
from t5x_lite.data.converters import (
    assemble,
    decoder,
    encoder_decoder,
    prefix_decoder,
    sizes_of,
    token_shapes,
)
from t5x_lite.data.packing import OneEach, best_fit, kept
from t5x_lite.errors import UserError


def ids(*values):
    return np.array(values, np.int32)


def test_the_worked_example_of_packing():
    """Two examples of a T5 in one row of 10 inputs and 7 targets (seqio's documentation)."""
    examples = [
        encoder_decoder(ids(7, 8, 5, 1), ids(3, 9, 1)),
        encoder_decoder(ids(8, 4, 9, 3, 1), ids(4, 1)),
    ]
    row = assemble(examples, token_shapes(10, side="encoder_") | token_shapes(7))
    assert {name: values.tolist() for name, values in row.items()} == {
        "encoder_tokens": [7, 8, 5, 1, 8, 4, 9, 3, 1, 0],
        "encoder_segments": [1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
        "encoder_positions": [0, 1, 2, 3, 0, 1, 2, 3, 4, 0],
        "tokens": [0, 3, 9, 0, 4, 0, 0],
        "targets": [3, 9, 1, 4, 1, 0, 0],
        "weights": [1, 1, 1, 1, 1, 0, 0],
        "segments": [1, 1, 1, 2, 2, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0],
    }


def test_a_prefix_holds_the_inputs_and_the_start():
    segment = prefix_decoder(ids(9, 4, 6, 1), ids(3, 9, 1))
    assert segment["tokens"].tolist() == [0, 9, 4, 6, 1, 3, 9]
    assert segment["targets"].tolist() == [9, 4, 6, 1, 3, 9, 1]
    assert segment["weights"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert segment["prefix"].tolist() == [1, 1, 1, 1, 1, 0, 0]
    causal = decoder(ids(9, 4, 6, 1), ids(3, 9, 1), start_id=2)
    assert causal["tokens"].tolist() == [2, 9, 4, 6, 1, 3, 9]
    assert "prefix" not in causal


def test_what_does_not_fit_a_row_is_an_error():
    with pytest.raises(ValueError, match="5 positions in a row of 4"):
        assemble([decoder(ids(1, 2), ids(3, 4, 5))], token_shapes(4))
    label = {"tokens": ids(1), "labels": np.array(1)}
    shapes = {**token_shapes(4), "labels": ((), np.dtype(np.int32))}
    assert assemble([label], shapes)["labels"] == 1
    with pytest.raises(ValueError, match="2 examples with labels"):
        assemble([label, label], shapes)


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=60),
    sides=st.integers(1, 2),
    chunk=st.sampled_from([3, 7, 2**20]),
)
def test_a_plan_holds_every_example_once_and_no_row_overflows(sizes, sides, chunk):
    array, room = np.array(sizes)[:, :sides], [9, 5][:sides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK", chunk)
        plan = best_fit(array, room)
    members = [plan.members(row) for row in range(len(plan))]
    assert (
        sorted(itertools.chain.from_iterable(members)) == np.flatnonzero(array.any(axis=1)).tolist()
    )
    for row in members:
        assert row
        assert (array[row].sum(axis=0) <= room).all()


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_no_two_rows_of_a_plan_would_fit_in_one(sizes):
    """What any-fit means: a row is begun only for what has no room in those before."""
    array = np.array(sizes).reshape(-1, 1)
    plan = best_fit(array, [20])
    used = sorted(int(array[plan.members(row)].sum()) for row in range(len(plan)))
    assert len(used) < 2 or used[0] + used[1] > 20
    # Best-fit decreasing needs at most 11/9 of the best, and one more (Johnson 1973).
    assert len(plan) <= 11 / 9 * np.ceil(array.sum() / 20) * 2


def test_the_best_fit_is_taken():
    """3 leaves nothing beside 7 and one beside 6; then 1 goes where one is left."""
    plan = best_fit(np.array([[7], [6], [3], [1]]), [10])
    rows = [sorted(plan.members(row)) for row in range(len(plan))]
    assert rows == [[0, 2], [1, 3]]


def test_an_example_larger_than_a_row_is_named():
    with pytest.raises(UserError, match="example 1 has 12 positions and a row 10"):
        best_fit(np.array([[3], [12]]), [10])


def test_one_each_takes_no_memory():
    plan = OneEach(2**40)
    assert len(plan) == plan.examples == 2**40
    assert plan.members(2**39 + 1) == [2**39 + 1]


def test_a_plan_is_made_once_for_each_key(tmp_path):
    calls = []

    def make(value):
        calls.append(value)
        return best_fit(np.full((value, 1), 1), [1])

    assert len(kept(tmp_path, {"a": 1}, lambda: make(3))) == 3
    assert len(kept(tmp_path, {"a": 1}, lambda: make(4))) == 3
    assert len(kept(tmp_path, {"a": 2}, lambda: make(5))) == 5
    assert calls == [3, 5]
    assert len(list((tmp_path / "plans").iterdir())) == 2
    (next((tmp_path / "plans").iterdir()) / "order.npy").write_bytes(b"torn")
    with pytest.raises(UserError, match="can't be read"):
        [kept(tmp_path, {"a": n}, lambda: make(3)) for n in (1, 2)]
    assert len(kept(tmp_path / "nowhere", {}, lambda: make(2))) == 2  # can't be written


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rows_of_demo_like_documents_are_98_percent_full(seed):
    """Lengths as of chat dialogues: lognormal, median 350, cut at a row of 512."""
    lengths = np.random.default_rng(seed).lognormal(5.9, 0.7, 2000).astype(int) + 1
    pieces = np.concatenate([lengths[lengths <= 512], np.full((lengths > 512).sum(), 512)])
    pieces = np.concatenate([pieces, lengths[lengths > 512] % 512])
    pieces = pieces[pieces > 0].reshape(-1, 1)
    plan = best_fit(pieces, [512])
    assert pieces.sum() / (len(plan) * 512) > 0.98


def test_sizes_are_counted_on_both_sides():
    segment = encoder_decoder(ids(1, 2, 3), ids(4))
    assert sizes_of([segment, segment]) == {"tokens": 2, "encoder_tokens": 6}
    assert sizes_of([decoder(ids(1), ids(2))]) == {"tokens": 2}
