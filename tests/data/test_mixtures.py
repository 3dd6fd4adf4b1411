import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.mixing import Interleave, proportional
from t5x_lite.data.mixtures import Mixture, Proportional
from t5x_lite.data.objectives import CausalLM, MaskedLM, SpanCorruption
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import Text
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes, SentencePiece
from t5x_lite.errors import UserError

RATES = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=9).filter(any)


@settings(max_examples=40, deadline=None)
@given(rates=RATES, start=st.integers(0, 2**50))
def test_rows_are_numbered_without_gaps_and_counts_agree(rates, start):
    interleave = Interleave(tuple(rates))
    counts = interleave.counts(start)
    assert sum(counts) == start
    for row in range(start, start + 12):
        task, number = interleave.locate(row)
        assert number == counts[task]
        counts[task] += 1
        assert counts == interleave.counts(row + 1)


@settings(max_examples=40, deadline=None)
@given(RATES, st.integers(1, 10_000))
def test_every_task_gets_its_share_at_any_moment(rates, rows):
    counts = Interleave(tuple(rates)).counts(rows)
    expected = np.array(rates) / sum(rates) * rows
    # off by at most one a level of the tree: four levels for nine tasks
    assert np.abs(counts - expected).max() <= 4
    assert all(count == 0 for count, rate in zip(counts, rates, strict=True) if rate == 0)


def test_examples_proportional_rates_are_t5s():
    """Raffel et al. 2020, §3.5.2: r_m ∝ min(e_m, K), then the power 1/T."""
    assert proportional([100, 400], cap=None) == [100, 400]
    assert proportional([100, 400], cap=200) == [100, 200]
    assert proportional([100, 400], cap=None, temperature=2) == [10, 20]
    assert proportional([100, 400], cap=900, scale=3) == [300, 900]
    for bad in ({"cap": 0}, {"temperature": 0}, {"scale": -1}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Proportional(**bad)


SEQIO = json.loads(Path(__file__).with_name("golden").joinpath("seqio.json").read_text())["rates"]


@pytest.mark.parametrize("case", SEQIO["num_examples"])
def test_rates_by_size_are_seqio_s(case):
    found = proportional(
        list(SEQIO["examples"].values()), case["maximum"], case["temperature"], case["scale"]
    )
    assert found == pytest.approx(list(case["rates"].values()), rel=1e-12)


def test_rates_of_nested_mixtures_are_seqio_s():
    sizes = SEQIO["examples"]
    parts = {name: unread(name) for name in sizes}
    for case in SEQIO["mixtures"]:
        rates = dict(case["members"])
        by_size = [rate for rate in rates.values() if isinstance(rate, dict)]
        assert not by_size or by_size == [by_size[0]] * len(rates)  # ours has one rule for all
        own = Proportional(**renamed(by_size[0])) if by_size else tuple(rates.values())
        mixture = Mixture(case["name"].replace("/", "_"), [parts[m] for m in rates], own)
        parts[case["name"]] = mixture
        found = dict(zip((t.name for t in mixture.tasks()), mixture.rates(sizes), strict=True))
        assert found == pytest.approx(case["rates"], rel=1e-12)


def renamed(arguments):
    return {{"maximum": "cap"}.get(name, name): value for name, value in arguments.items()}


def unread(name):
    return Task(name, Text("none.txt"), Bytes(), CausalLM())


@pytest.fixture(scope="module")
def make_task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")

    def make(name, count, word, objective=None, vocabulary=None):
        path = folder / f"{name}.txt"
        path.write_text("\n\n".join(f"{word} {n} " + word * (n % 7) for n in range(count)))
        source = Text(str(path))
        objective = objective or CausalLM(packing="none")
        return Task(name, source, vocabulary or Bytes(), objective, str(folder / "data"), 0.2)

    return make


@pytest.fixture(scope="module")
def two(make_task):
    tasks = [make_task("many", 90, "aa"), make_task("few", 30, "zz")]
    for task in tasks:
        prepare(task, quiet_console())
    return tasks


def quiet_console():
    from rich.console import Console

    return Console(quiet=True)


def names(batches, rows):
    """Which task each row is of: by the letters of its text."""
    letters = {ord("a") + 3: "many", ord("z") + 3: "few"}
    tokens = np.concatenate([batches[step]["tokens"] for step in range(rows // 4)])
    return ["".join({letters[i] for i in row if i in letters}) for row in tokens.tolist()]


@pytest.mark.parametrize(("rates", "share"), [((1, 3), 0.25), ((1.0, 0), 1.0)])
def test_rows_come_at_fixed_rates(two, rates, share):
    mixture = Mixture("both", two, rates, two[0].data_dir)
    batches = mixture.batches(batch_size=4, length=64, seed=0)
    seen = Counter(names(batches, 400))
    assert seen["many"] == pytest.approx(share * 400, abs=1)


def test_proportional_rates_count_the_examples(two):
    mixture = Mixture("both", two, Proportional(), two[0].data_dir)
    batches = mixture.batches(batch_size=4, length=64, seed=0)
    many, few = (len(task.store("train")) for task in two)
    assert Counter(names(batches, 400))["many"] == pytest.approx(400 * many / (many + few), abs=2)


def test_rates_count_examples_before_they_are_packed(two):
    """One task packed and the other not: examples still come one for one."""
    packed = [dataclasses.replace(two[0], objective=CausalLM(packing="best_fit")), two[1]]
    mixture = Mixture("both", packed, (1, 1), two[0].data_dir)
    batches = mixture.batches(batch_size=4, length=256, seed=0)
    rows = [batches[step]["segments"].max(axis=1) for step in range(60)]
    kinds = names(batches, 240)
    examples = Counter()
    for kind, count in zip(kinds, np.concatenate(rows).tolist(), strict=True):
        examples[kind] += count
    assert examples["many"] == pytest.approx(examples["few"], rel=0.1)
    assert Counter(kinds)["few"] > 2 * Counter(kinds)["many"]


def test_a_nested_mixture_divides_its_own_share(two, make_task):
    third = make_task("third", 20, "yy")
    inner = Mixture("inner", two, (1, 3), two[0].data_dir)
    outer = Mixture("outer", [inner, third], (4, 1), two[0].data_dir)
    assert outer.rates({"many": 9, "few": 3, "third": 5}) == [1.0, 3.0, 1.0]
    # The same task in two places gets what each gives it.
    again = Mixture("again", [inner, two[0]], (4, 1), two[0].data_dir)
    assert [task.name for task in again.tasks()] == ["many", "few"]
    assert again.rates({"many": 9, "few": 3}) == [2.0, 3.0]
    # By size, a mixture counts as all that it holds.
    sized = Mixture("sized", [inner, third], Proportional(cap=10), two[0].data_dir)
    assert sized.rates({"many": 9, "few": 3, "third": 5}) == [2.5, 7.5, 5.0]


def test_each_task_goes_through_its_own_epochs(two):
    mixture = Mixture("both", two, (1, 1), two[0].data_dir)
    batches = mixture.batches(batch_size=4, length=64, seed=3)
    rows = [row.tobytes() for step in range(50) for row in batches[step]["tokens"]]
    for task in two:
        alone = task.batches(batch_size=1, length=64, seed=3)
        expected = [alone[step]["tokens"].tobytes() for step in range(75)]
        own = [row for row in rows if row in set(expected)]
        assert own[:75] == expected


def test_tasks_of_one_mixture_are_evaluated_one_by_one(two):
    mixture = Mixture("both", two, (1, 1), two[0].data_dir)
    held_out = mixture.evaluations(batch_size=4, length=64)
    assert list(held_out) == ["many", "few"]
    for task in two:
        alone = task.evaluation(batch_size=4, length=64)
        for left, right in zip(held_out[task.name], alone, strict=True):
            np.testing.assert_array_equal(left["tokens"], right["tokens"])


def test_a_cursor_says_how_far_each_task_has_come(two):
    mixture = Mixture("both", two, (1, 3), two[0].data_dir)
    batches = mixture.batches(batch_size=4, length=64, seed=0)
    cursors = batches.cursors(50)
    assert {name: at["rows"] for name, at in cursors.items()} == {"many": 50, "few": 150}
    few = len(two[1].store("train"))
    assert cursors["few"] == {"rows": 150, "epoch": 150 // few, "row": 150 % few, "of": few}
    # Other rates go on where each task was: nothing comes again before its epoch is over.
    other = Mixture("both", two, (3, 1), two[0].data_dir)
    make = lambda **origin: other.batches(batch_size=4, length=64, seed=0, **origin)  # noqa: E731
    moved = make(origin=make().origin_at(50, cursors))
    alone = two[1].batches(batch_size=1, length=64, seed=0)
    first = next(
        row
        for step in range(50, 60)
        for row in moved[step]["tokens"]
        if (row == ord("z") + 3).any()
    )
    np.testing.assert_array_equal(first, alone[150]["tokens"][0])
    assert moved.cursors(50)["few"]["rows"] == 150
    assert moved.fingerprint["origin"] == {"step": 50, "cursors": {"many": 50, "few": 150}}


def test_one_tokenizer_is_trained_on_the_text_of_all(make_task, tmp_path):
    pieces = SentencePiece(vocab_size=380)
    tasks = [
        dataclasses.replace(make_task(name, 30, word, vocabulary=pieces), data_dir=str(tmp_path))
        for name, word in (("latin", "ab"), ("greek", "λμ"))
    ]
    mixture = Mixture("both", tasks, (1, 1), str(tmp_path))
    prepare(mixture, quiet_console())
    vocabulary = mixture.load_vocabulary()
    for word in ("ab", "λμ"):
        assert vocabulary.unk_id not in vocabulary.encode(word)
        assert len(vocabulary.encode(word)) < len(word.encode())  # no byte by byte
    assert (tmp_path / "both" / "tokenizer.model").exists()
    assert not (tmp_path / "latin" / "tokenizer.model").exists()
    assert mixture.batches(batch_size=2, length=32, seed=0)[0]["tokens"].any()


def test_what_cannot_be_mixed_is_refused(two, make_task):
    first, second = two
    for rates in ((0, 0), (0.0,) * 2):
        with pytest.raises(UserError, match="sum to zero"):
            Mixture("both", two, rates)
    with pytest.raises(UserError, match="must not be negative"):
        Mixture("both", two, (1, -1))
    with pytest.raises(UserError, match="2 parts and 1 rates"):
        Mixture("both", two, (1,))
    with pytest.raises(UserError, match="no parts"):
        Mixture("both", ())
    renamed = dataclasses.replace(second, name="many")
    with pytest.raises(UserError, match="two tasks named 'many'"):
        Mixture("both", [first, renamed], (1, 1))
    with pytest.raises(UserError, match="mixture name"):
        Mixture("a/b", two, (1, 1))
    other = dataclasses.replace(second, vocabulary=Bytes(extra_ids=5))
    mixture = Mixture("both", [first, other], (1, 1))
    with pytest.raises(UserError, match="tasks many and few have different vocabularies"):
        mixture.load_vocabulary()
    spans = dataclasses.replace(second, objective=SpanCorruption())
    mixture = Mixture("both", [first, spans], (1, 1))
    with pytest.raises(UserError, match="different models"):
        mixture.sides(64)
    masked = dataclasses.replace(second, objective=MaskedLM())
    mixture = Mixture("both", [first, masked], (1, 1))
    with pytest.raises(UserError, match="MaskedLM is for encoder-only"):
        mixture.for_family("decoder-only")
