"""The order of examples: for any corpus, hosts, threads, batch size and kill point."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_lite.data.mixing import Interleave
from t5x_lite.data.objectives import CausalLM, MaskedLM, SpanCorruption
from t5x_lite.data.pipeline import Batches, Origin, iterate
from t5x_lite.data.rows import Rows
from t5x_lite.data.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary(100)
OBJECTIVES = [
    CausalLM(),
    CausalLM(packing="best_fit"),
    MaskedLM(packing="best_fit"),
    SpanCorruption(),
    SpanCorruption(packing="best_fit"),
]
CORPORA = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda s: sum(s) > 1)
FEW = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def documents(in_memory, sizes):
    """Every token is another one, so that each can be found again."""
    places = itertools.count(3)
    return in_memory([[next(places) % 256 + 3 for _ in range(size)] for size in sizes])


def rows_of(store, objective, length=16, seed=0, name="demo"):
    sides = objective.sides(length)
    return Rows(
        lambda: objective.examples(store, VOCABULARY, sides),
        sides=sides,
        shapes=objective.shapes(sides),
        packing=objective.packing,
        name=name,
        seed=seed,
    )


def endless(tasks, batch_size, rates=None, **rest):
    rates = rates or [1.0] * len(tasks)
    return Batches(
        tasks, batch_size=batch_size, seed=0, is_endless=True, rates=lambda: rates, **rest
    )


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@FEW
@given(
    sizes=CORPORA,
    objective=st.sampled_from(OBJECTIVES),
    hosts=st.sampled_from([1, 2, 4, 8]),
    per_host=st.integers(1, 3),
    threads=st.integers(1, 4),
    start=st.sampled_from([0, 1, 7, 100_000, 10**12]),
    others=st.sampled_from([1, 2, 4, 8]),
)
def test_any_hosts_threads_and_kill_point_give_the_same_batches(
    in_memory, sizes, objective, hosts, per_host, threads, start, others
):
    batch_size = 8 * per_host
    batches = endless([rows_of(documents(in_memory, sizes), objective)], batch_size)
    expected = [batches[start + step] for step in range(3)]

    def read(first, count, hosts):
        readers = [
            iterate(batches, first, rows=rows.tolist(), threads=threads, prefetch=3)
            for rows in np.array_split(np.arange(batch_size), hosts)
        ]
        for _ in range(count):
            parts = [next(reader) for reader in readers]
            assert all(len(part["tokens"]) == batch_size // hosts for part in parts)
            yield {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    # Killed after the first batch, and gone on with by another number of hosts.
    found = [*read(start, 1, hosts), *read(start + 1, 2, others)]
    for left, right in zip(found, expected, strict=True):
        assert_same(left, right)


def contents(row):
    """The documents' tokens that the segments of a row hold, un-noised."""
    for segment in range(1, row["segments"].max() + 1):
        mine = row["segments"] == segment
        targets = row["targets"][mine].tolist()
        if "encoder_tokens" in row:
            inputs = row["encoder_tokens"][row["encoder_segments"] == segment].tolist()
            yield unnoised(inputs, targets)
        else:
            yield [t for t in targets if 3 <= t < 259]


def unnoised(inputs, targets):
    spans, restored = {}, []
    for token in targets[:-1]:
        if token in VOCABULARY.sentinel_ids:
            spans[token] = span = []
        else:
            span.append(token)
    for token in inputs[:-1]:
        restored += spans[token] if token in VOCABULARY.sentinel_ids else [token]
    return restored


@FEW
@given(CORPORA, st.sampled_from(OBJECTIVES), st.integers(0, 3))
def test_an_epoch_has_every_token_once_and_noise_comes_off(in_memory, sizes, objective, epoch):
    store = documents(in_memory, sizes)
    rows = rows_of(store, objective)
    count = rows.count(epoch)
    held = [rows.shuffled(number) for number in range(epoch * count, (epoch + 1) * count)]
    found = sorted(itertools.chain.from_iterable(c for row in held for c in contents(row)))
    assert found == sorted(itertools.chain.from_iterable(store.rows))


@FEW
@given(CORPORA, st.sampled_from([o for o in OBJECTIVES if o.packing == "best_fit"]))
def test_no_document_is_cut_that_fits_a_row(in_memory, sizes, objective):
    store = documents(in_memory, sizes)
    rows = rows_of(store, objective, length=64)  # all fit
    held = [rows.row(0, number) for number in range(rows.count(0))]
    found = sorted(c for row in held for c in contents(row))
    assert found == sorted(row for row in store.rows if row or objective == OBJECTIVES[1])


def test_epochs_differ_in_order_and_noise(in_memory):
    store = documents(in_memory, [20] * 12)
    rows = rows_of(store, MaskedLM(packing="none"), length=24)
    count = rows.count(0)
    epochs = [[rows.shuffled(e * count + n) for n in range(count)] for e in range(2)]
    targets = [[row["targets"].tobytes() for row in epoch] for epoch in epochs]
    assert targets[0] != targets[1]
    assert sorted(targets[0]) == sorted(targets[1])
    noisy = [sorted(row["tokens"].tobytes() for row in epoch) for epoch in epochs]
    assert noisy[0] != noisy[1]


@FEW
@given(
    rates=st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any),
    step=st.integers(0, 50),
)
def test_a_mixture_is_its_tasks_interleaved(in_memory, rates, step):
    store = documents(in_memory, [9, 14, 3, 20])
    tasks = [rows_of(store, CausalLM(), name=f"task{n}") for n in range(len(rates))]
    batches = endless(tasks, 4, rates)
    interleave = Interleave(tuple(rates))
    for place in range(4):
        which, number = interleave.locate(step * 4 + place)
        row = tasks[which].shuffled(number)
        assert_same(row, {name: values[place] for name, values in batches[step].items()})


def test_another_origin_goes_on_where_the_cursors_stand(in_memory):
    tasks = [rows_of(documents(in_memory, [9, 14, 3, 20]), CausalLM())]
    batches = endless(tasks, 4)
    later = endless(tasks, 8, origin=Origin(5, {"demo": 20}))
    expected = [batches[step]["tokens"] for step in range(5, 9)]
    found = [later[step]["tokens"] for step in range(5, 7)]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))
    np.testing.assert_array_equal(next(iterate(later, 6))["tokens"], found[1])
    with pytest.raises(IndexError):
        later[4]


def test_a_host_may_need_any_rows_of_a_batch(in_memory):
    batches = endless([rows_of(documents(in_memory, [9, 14]), CausalLM())], 6)
    reader = iterate(batches, 3, rows=[0, 1, 4])
    for step in (3, 4):
        assert_same(next(reader), {name: x[[0, 1, 4]] for name, x in batches[step].items()})
    with pytest.raises(ValueError, match="of a batch of 6"):
        next(iterate(batches, rows=[5, 6]))
