import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from t5x_lite.data.objectives import CausalLM, MaskedLM, SpanCorruption
from t5x_lite.data.pipeline import Batches, iterate
from t5x_lite.data.rows import Rows
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.errors import UserError

OBJECTIVES = [CausalLM(), MaskedLM(), SpanCorruption()]


@pytest.fixture(params=OBJECTIVES, ids=lambda o: type(o).__name__)
def task(request, prepared):
    return dataclasses.replace(prepared, objective=request.param)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def differ(left, right):
    return any(not np.array_equal(left[name], right[name]) for name in left)


class Numbered:
    """Rows that say which they are and which noise they got."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    are_sizes_fixed = is_noisy = True

    def segments(self, index, noise):
        one = np.array([index])
        return [{"tokens": one, "index": one, "noise": noise.integers(2**62, size=1)}]

    def sizes(self, noise_of):
        return np.ones((self.rows, 1), int)


SHAPES = {name: ((1,), np.dtype(np.int64)) for name in ("tokens", "index", "noise")}
SHAPES |= {name: ((1,), np.dtype(np.int64)) for name in ("segments", "positions")}


def numbered_rows(rows=10, name="demo", seed=0, packing="none"):
    return Rows(
        lambda: Numbered(rows),
        sides={"tokens": 1},
        shapes=SHAPES,
        packing=packing,
        name=name,
        seed=seed,
    )


def numbered(rows=10, batch_size=4, name="demo", seed=0, is_endless=True, **rest):
    own = [numbered_rows(rows, name, seed)]
    return Batches(own, batch_size=batch_size, seed=seed, is_endless=is_endless, **rest)


def flat(batches, steps, key="index"):
    return np.concatenate([batches[step][key].reshape(-1) for step in range(steps)])


def test_batches_have_the_shapes_promised_without_data(task):
    unprepared = dataclasses.replace(task, data_dir="nowhere")
    promised = unprepared.batches(batch_size=3, length=24, seed=0).shapes
    batch = task.batches(batch_size=3, length=24, seed=0)[0]
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == promised
    assert all(type(a) is np.ndarray for a in batch.values())


def test_a_batch_depends_on_seed_and_step_alone(task):
    make = lambda seed=7: task.batches(batch_size=4, length=32, seed=seed)  # noqa: E731
    batches = make()
    in_order = [batches[step] for step in range(6)]
    for step in (5, 0, 3):
        assert_same(make()[step], in_order[step])
    assert differ(make(8)[0], in_order[0])


def test_iterating_from_a_step_seeks_whatever_the_threads(task):
    batches = task.batches(batch_size=4, length=32, seed=7)
    for threads, prefetch in ((1, 1), (4, 16)):
        ahead = iterate(batches, 1_000_003, prefetch=prefetch, threads=threads)
        for step in range(1_000_003, 1_000_006):
            assert_same(next(ahead), batches[step])
        ahead.close()


def test_another_process_gets_the_same_batches(prepared):
    tasks = [dataclasses.replace(prepared, objective=objective) for objective in OBJECTIVES]
    program = (
        "import sys, pickle\n"
        "for task in pickle.loads(bytes.fromhex(sys.argv[1])):\n"
        "    batch = task.batches(batch_size=2, length=24, seed=3)[1234]\n"
        "    print({k: v.tolist() for k, v in batch.items()})\n"
    )
    command = [sys.executable, "-c", program, pickle.dumps(tasks).hex()]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for task, line in zip(tasks, run.stdout.splitlines(), strict=True):
        batch = task.batches(batch_size=2, length=24, seed=3)[1234]
        assert line == str({k: v.tolist() for k, v in batch.items()})


def test_every_row_comes_once_an_epoch_in_a_new_order():
    rows = flat(numbered(rows=10, batch_size=4), 5 * 5).reshape(10, 10)
    for epoch in rows:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in rows}) > 5


def test_noise_differs_by_seed_task_epoch_and_index():
    def noise_of(**rest):
        batches = numbered(rows=6, batch_size=6, **rest)
        by_index = np.argsort(flat(batches, 1)), np.argsort(batches[1]["index"].reshape(-1))
        first, second = batches[0]["noise"][by_index[0]], batches[1]["noise"][by_index[1]]
        return np.concatenate([first, second]).reshape(-1).tolist()

    every = noise_of() + noise_of(seed=1) + noise_of(name="other")
    assert len(set(every)) == len(every) == 36


def test_noise_of_a_row_does_not_depend_on_its_place_in_the_batch():
    def noises(batch_size, steps):
        batches = numbered(rows=12, batch_size=batch_size)
        rows = zip(
            flat(batches, steps).tolist(), flat(batches, steps, "noise").tolist(), strict=True
        )
        return dict(rows)

    assert noises(12, 1) == noises(3, 4)


def test_evaluation_reads_every_row_once_in_order_and_fills_with_padding():
    held_out = numbered(rows=10, batch_size=4, is_endless=False)
    assert len(held_out) == 3
    batches = list(held_out)
    assert np.concatenate([b["index"] for b in batches]).reshape(-1).tolist() == [*range(10), 0, 0]
    assert (batches[-1]["noise"][2:] == 0).all()
    with pytest.raises(IndexError):
        held_out[3]
    assert [len(list(numbered(is_endless=False, limit=n))) for n in (1, 2, 9)] == [1, 2, 3]


def test_evaluation_has_every_held_out_target_once(prepared):
    store = prepared.store("validation")
    eos = prepared.load_vocabulary().eos_id
    expected = np.concatenate([[*row, eos] for (row,) in store.read(range(len(store)))])
    batches = list(prepared.evaluation(batch_size=4, length=32))
    targets = [b["targets"][b["weights"] > 0] for b in batches]
    np.testing.assert_array_equal(np.concatenate(targets), expected)
    assert len(batches) == len(prepared.evaluation(batch_size=4, length=32))
    for name, (shape, dtype) in prepared.evaluation(batch_size=4, length=32).shapes.items():
        assert batches[-1][name].shape == shape
        assert batches[-1][name].dtype == dtype


def test_evaluation_noise_is_the_same_every_time(task):
    once, again = (list(task.evaluation(batch_size=2, length=24, batches=2)) for _ in range(2))
    assert len(once) == 2
    for left, right in zip(once, again, strict=True):
        assert_same(left, right)


def test_training_batches_have_no_length():
    with pytest.raises(TypeError, match="never end"):
        len(numbered())


def test_the_fingerprint_tells_apart_what_gives_other_batches(prepared):
    def fingerprint(task=prepared, batch_size=4, length=32, seed=0, split="train"):
        batches = task.batches(split, batch_size=batch_size, length=length, seed=seed)
        return json.dumps(batches.fingerprint, sort_keys=True)

    masked = dataclasses.replace(prepared, objective=MaskedLM())
    sparser = dataclasses.replace(prepared, objective=MaskedLM(density=0.1))
    every = [
        fingerprint(),
        fingerprint(batch_size=5),
        fingerprint(length=33),
        fingerprint(seed=1),
        fingerprint(split="validation"),
        fingerprint(masked),
        fingerprint(sparser),
    ]
    assert len(set(every)) == len(every)
    assert fingerprint() == every[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"limit": 0, "is_endless": False}, "batches=0"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        numbered(**arguments)
    with pytest.raises(UserError, match="no examples"):
        numbered(rows=0)[0]
    with pytest.raises(UserError, match="prefetch=0"):
        next(iterate(numbered(), prefetch=0))


def test_an_unprepared_task_names_the_command(byte_task):
    with pytest.raises(UserError, match="t5x_lite data prepare --gin_file"):
        byte_task.batches(batch_size=2, length=8, seed=0)[0]
    with pytest.raises(UserError, match="split='test'"):
        byte_task.batches("test", batch_size=2, length=8, seed=0)


def test_a_task_refuses_names_and_fractions_that_cannot_work(byte_task):
    for name in ("", "../up", "a b", ".hidden"):
        with pytest.raises(UserError, match="task name"):
            dataclasses.replace(byte_task, name=name)
    for fraction in (0, 1, -0.5):
        with pytest.raises(UserError, match="validation_fraction"):
            dataclasses.replace(byte_task, validation_fraction=fraction)


def test_another_vocabulary_needs_other_tokens(prepared):
    other = dataclasses.replace(prepared, vocabulary=Bytes(extra_ids=7))
    with pytest.raises(UserError, match="isn't prepared"):
        other.batches(batch_size=2, length=8, seed=0)[0]
