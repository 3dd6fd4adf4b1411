"""Pairs of texts: where both come from, what their label says, and that nothing is lost."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.objectives import MaskedPairs, NextSentence, SentenceOrder, sentences
from t5x_lite.data.objectives.sentences import Sentences, find_runs
from t5x_lite.data.rows import Rows
from t5x_lite.data.vocabularies import ByteVocabulary, Vocabulary
from t5x_lite.errors import UserError

BYTES = ByteVocabulary(0)


class Column:
    def __init__(self, rows):
        self.offsets = np.cumsum([0, *map(len, rows)]).astype(np.uint64)
        self._entries = np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32)

    def slice(self, start, stop):
        return self._entries[start:stop]


class Numbered(Vocabulary):
    """Every token of the corpus has an id of its own, so that each tells where it came from."""

    FIRST = 10

    def __init__(self, tokens):
        self.size, self.eos_id = tokens + self.FIRST, 1
        self.cls_id, self.sep_id, self.mask_id = 4, 5, 6


class Corpus:
    """Documents as lists of their sentences' lengths; a token's id is its place in the stream."""

    def __init__(self, documents):
        sizes = [sum(own) for own in documents]
        self.starts = np.cumsum([0, *sizes])
        self.vocabulary = Numbered(sum(sizes))
        ids = np.split(np.arange(sum(sizes)) + Numbered.FIRST, self.starts[1:-1])
        self._columns = {"text": Column(ids), "sentences": Column(documents)}
        self.ends = np.cumsum([0, *(n for own in documents for n in own)])

    def column(self, name):
        return self._columns[name]

    def document(self, place):
        return int(np.searchsorted(self.starts, place, side="right"))


def random_corpus(documents=40, sentences=9, longest=12, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rng.integers(1, sentences, documents)).tolist()
    return Corpus([rng.integers(1, longest, n).tolist() for n in shapes])


def rows_of(objective, corpus, length, seed=0, packing="none"):
    objective = dataclasses.replace(objective, packing=packing)
    sides = objective.sides(length)
    return Rows(
        lambda: objective.examples(corpus, corpus.vocabulary, sides),
        sides=sides,
        shapes=objective.shapes(sides),
        packing=objective.packing,
        name="memory",
        seed=seed,
    )


@dataclasses.dataclass
class Read:
    """A row as what it was made of: from where to where each text stood in the corpus."""

    first: range
    second: range
    label: int


def read(row, vocabulary):
    """Checks the row's frame, and that it can be restored where it was masked."""
    used = int(row["segments"].sum())
    for name in ("tokens", "targets", "weights", "token_types", "segments"):
        assert not row[name][used:].any()
    targets, types = row["targets"][:used], row["token_types"][:used]
    assert row["positions"][:used].tolist() == list(range(used))
    seps = np.flatnonzero(targets == vocabulary.sep_id)
    assert targets[0] == vocabulary.cls_id
    assert len(seps) == 2
    assert seps[1] == used - 1
    assert types.tolist() == [0] * (seps[0] + 1) + [1] * (used - seps[0] - 1)
    chosen = row["weights"][:used] > 0
    np.testing.assert_array_equal(row["tokens"][:used][~chosen], targets[~chosen])
    assert not np.isin(targets[chosen], vocabulary.special_ids).any()
    assert chosen.sum() == max(1, round(0.15 * (used - 3)))
    parts = targets[1 : seps[0]], targets[seps[0] + 1 : -1]
    spans = [_span(part - Numbered.FIRST) for part in parts]
    assert row["label_weights"] == 1
    return Read(*spans, int(row["labels"]))


def _span(places):
    assert len(places)
    assert (np.diff(places) == 1).all()
    return range(int(places[0]), int(places[-1]) + 1)


def every(rows, epoch=0):
    vocabulary = rows.examples._vocabulary
    return [read(rows.row(epoch, n), vocabulary) for n in range(rows.count())]


def sizes_of(rows):
    """Tokens of each pair, without the frame."""
    return rows.examples.sizes(lambda index: rows._noise(0, index))[:, 0] - 3


corpora = st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(documents=corpora, length=st.integers(8, 40), short=st.sampled_from([0, 0.3, 1]))
def test_in_order_or_swapped_every_token_comes_once(documents, length, short):
    corpus, found = Corpus([*documents, [2]]), []
    for pair in every(rows_of(MaskedPairs(pairs=SentenceOrder(), short=short), corpus, length)):
        first, second = (pair.second, pair.first) if pair.label else (pair.first, pair.second)
        assert first.stop == second.start
        assert corpus.document(first.start) == corpus.document(second.stop - 1)
        found += [*first, *second]
    assert len(found) == len(set(found))
    # A document's last token may be left, which would be a row by itself.
    missing = set(range(int(corpus.starts[-1]))) - set(found)
    assert all(n + 1 in corpus.starts for n in missing)


@settings(max_examples=25, deadline=None)
@given(documents=corpora, length=st.integers(8, 40), short=st.sampled_from([0, 0.3, 1]))
def test_the_second_text_follows_or_is_of_another_document(documents, length, short):
    corpus, firsts = Corpus([*documents, [3], [2, 2]]), []
    for pair in every(rows_of(MaskedPairs(pairs=NextSentence(), short=short), corpus, length)):
        own, other = corpus.document(pair.first.start), corpus.document(pair.second.start)
        assert own == corpus.document(pair.first.stop - 1)
        assert other == corpus.document(pair.second.stop - 1)
        if pair.label:
            assert own != other
        else:
            assert own == other
            assert pair.first.stop == pair.second.start
        firsts += pair.first
    assert len(firsts) == len(set(firsts))


@settings(max_examples=40, deadline=None)
@given(documents=corpora, room=st.integers(4, 40), short=st.sampled_from([0, 0.3, 1]))
def test_runs_are_whole_sentences_of_one_document(documents, room, short):
    corpus = Corpus(documents)
    runs = find_runs(corpus, "", room, short)
    owners = [corpus.document(int(runs.cuts(n)[0])) for n in range(len(runs))]
    place = 0
    for run in range(len(runs)):
        cuts = runs.cuts(run)
        assert set(range(place, int(cuts[0]))) <= set(corpus.starts - 1), "a last token alone"
        place = int(cuts[-1])
        assert 2 <= place - cuts[0] <= room
        assert (np.diff(cuts) > 0).all()
        assert owners[run] == corpus.document(place - 1)
        siblings = runs.siblings(run)
        assert [n for n, own in enumerate(owners) if own == owners[run]] == list(siblings)
        for cut in cuts.tolist():
            if cut not in corpus.ends:  # inside of a sentence: of a long one, which is cut evenly
                n = int(np.searchsorted(corpus.ends, cut))
                assert corpus.ends[n] - corpus.ends[n - 1] > room // 2
        if len(cuts) == 2 and run != siblings[0]:  # alone only where the run before has but two
            assert run == siblings[-1]
            assert len(runs.cuts(run - 1)) == 3
    assert set(range(place, int(corpus.starts[-1]))) <= set(corpus.starts - 1)
    np.testing.assert_array_equal(
        runs.sizes(), [runs.cuts(n)[-1] - runs.cuts(n)[0] for n in range(len(runs))]
    )


def test_a_run_holds_as_many_sentences_as_fit_and_long_ones_are_cut_evenly():
    corpus = Corpus([[4, 5, 1, 6, 2, 1], [25], [10, 1], [2]])
    runs = find_runs(corpus, "", 10, 0)
    sizes = [np.diff(runs.cuts(n)).tolist() for n in range(len(runs))]
    # 6 is above half a row, and so is 10; the last of a document takes one from the run before
    assert sizes == [[4, 5, 1], [3, 3, 2, 1], [5, 5], [5, 5], [5], [5, 5], [2]]
    alone = find_runs(Corpus([[2, 2, 2, 2, 2, 3]]), "", 10, 0)
    assert [np.diff(alone.cuts(n)).tolist() for n in range(2)] == [[2, 2, 2, 2], [2, 3]]


def test_a_passage_is_as_long_as_asked_as_far_as_whole_sentences_go():
    runs = find_runs(Corpus([[3, 3], [4, 2, 3, 5, 1], [9]]), "", 100, 0)
    sentence = dict(zip((6, 10, 12, 15, 20), range(2, 7), strict=True))  # begin → its number
    passage = runs.passage
    assert passage(sentence[6], 6, 100) == (6, 12)
    assert passage(sentence[6], 7, 100) == (6, 12), "6 is nearer than 9"
    assert passage(sentence[6], 8, 100) == (6, 15)
    assert passage(sentence[6], 8, 5) == (6, 11), "cut where there is no more room"
    assert passage(sentence[10], 1, 100) == (10, 12), "one sentence at least"
    assert passage(sentence[20], 1, 100) == (20, 21)
    assert passage(sentence[20], 6, 100) == (15, 21), "begins earlier, for enough to follow"
    assert passage(sentence[12], 50, 100) == (6, 21), "but not in another document"
    assert passage(0, 50, 100) == (0, 6)


def test_half_of_the_seconds_are_random_and_all_documents_take_part():
    corpus = random_corpus(documents=60)
    rows = rows_of(MaskedPairs(), corpus, 40)
    pairs = [pair for epoch in range(6) for pair in every(rows, epoch)]
    labels = np.array([pair.label for pair in pairs])
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels))
    drawn = [corpus.document(pair.second.start) for pair in pairs if pair.label]
    assert len(set(drawn)) > 50
    lengths = np.array([len(pair.second) for pair in pairs])
    # Random seconds are as long as others, or their length would tell.
    error = lengths.std() * np.sqrt(4 / len(lengths))
    assert abs(lengths[labels == 1].mean() - lengths[labels == 0].mean()) < 4 * error
    replaced = lengths[labels == 1].sum() / sum(len(p.first) + len(p.second) for p in pairs)
    assert 0.2 < replaced < 0.3


@pytest.mark.parametrize("share", [0, 0.2, 1])
@pytest.mark.parametrize("pairs", [NextSentence, SentenceOrder])
def test_the_share_is_as_asked(pairs, share):
    corpus = random_corpus()
    rows = rows_of(MaskedPairs(pairs=pairs(share)), corpus, 30)
    labels = [pair.label for epoch in range(4) for pair in every(rows, epoch)]
    error = 4 * np.sqrt(share * (1 - share) / len(labels))
    assert abs(np.mean(labels) - share) <= error


def test_every_epoch_splits_and_replaces_anew():
    corpus = random_corpus(documents=10)
    rows = rows_of(MaskedPairs(), corpus, 40)
    first, again, second = (every(rows, epoch) for epoch in (0, 0, 1))
    assert first == again
    assert sum(a != b for a, b in zip(first, second, strict=True)) > len(first) / 2
    assert every(rows_of(MaskedPairs(), corpus, 40, seed=1)) != first


def test_a_split_falls_between_any_two_sentences():
    corpus = Corpus([[2, 2, 2, 2], [8]])
    rows = rows_of(MaskedPairs(pairs=SentenceOrder(0), short=0), corpus, 20)
    found = np.array([[len(p.first) for p in every(rows, epoch)] for epoch in range(300)])
    assert np.unique(found[:, 0]).tolist() == [2, 4, 6]
    assert abs(np.bincount(found[:, 0])[[2, 4, 6]] - 100).max() < 5 * np.sqrt(100 * 2 / 3)
    assert np.unique(found[:, 1]).tolist() == list(range(1, 8)), "one alone splits anywhere"


def test_some_documents_are_shown_in_short_texts():
    corpus, pairs = Corpus([[3] * 30] * 400), SentenceOrder(0)
    assert set(sizes_of(rows_of(MaskedPairs(pairs=pairs, short=0), corpus, 63))) == {60, 30}
    some = rows_of(MaskedPairs(pairs=pairs), corpus, 63)
    assert sizes_of(some).min() >= 6, "two sentences at least"
    begins = {corpus.document(p.first.start): p for p in reversed(every(some))}
    short = [len(p.first) + len(p.second) for p in begins.values()]
    short = np.array(short)[np.array(short) < 60]
    # 0.1 of the documents, but for those that drew 60 tokens
    assert abs(len(short) / 400 - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 400)
    assert len(set(short.tolist())) > 10


def test_two_seps_and_one_type_where_the_vocabulary_has_them_so():
    corpus = random_corpus(documents=4)
    corpus.vocabulary.between_ids, corpus.vocabulary.second_type = (5, 5), 0  # RoBERTa's
    row = rows_of(MaskedPairs(), corpus, 40).row(0, 0)
    used = row["targets"][row["segments"] == 1]
    seps = np.flatnonzero(used == 5)
    assert seps.tolist() == [seps[0], seps[0] + 1, len(used) - 1]
    assert not row["token_types"].any()


@settings(max_examples=15, deadline=None)
@given(
    documents=corpora,
    length=st.integers(8, 60),
    pairs=st.sampled_from([NextSentence(), SentenceOrder()]),
    epoch=st.integers(0, 2),
)
def test_pairs_that_share_a_row_are_what_they_are_alone(documents, length, pairs, epoch):
    corpus = Corpus([*documents, [3], [2, 2]])
    alone = rows_of(MaskedPairs(pairs=pairs), corpus, length)
    packed = rows_of(MaskedPairs(pairs=pairs), corpus, length, packing="best_fit")
    found = []
    for number in range(packed.count(epoch)):
        row, members = packed.row(epoch, number), packed.plan(epoch).members(number)
        assert row["segments"].max() == len(members)
        for segment in range(1, len(members) + 1):
            mine = row["segments"] == segment
            own = {name: row[name][mine].tolist() for name in SEGMENT}
            example = next(m for m in members if own == one(alone.row(epoch, m)))
            members.remove(example)
            found.append(example)
            if segment == 1:
                assert row["labels"] == alone.row(epoch, example)["labels"]
                assert row["label_weights"] == 1
    assert sorted(found) == list(range(len(alone.examples)))


SEGMENT = ("tokens", "targets", "weights", "positions", "token_types")


def one(row):
    mine = row["segments"] == 1
    return {name: row[name][mine].tolist() for name in SEGMENT}


def test_each_of_the_pairs_in_a_row_is_asked_at_some_time():
    corpus = Corpus([[2, 2]] * 12)
    rows = rows_of(MaskedPairs(pairs=SentenceOrder(0), short=0), corpus, 28, packing="best_fit")
    assert rows.count() == 3, "four of 7 positions in each"
    firsts = np.array(
        [[rows.row(epoch, n)["targets"][1] for n in range(3)] for epoch in range(400)]
    )
    for column in firsts.T:
        counts = np.unique(column, return_counts=True)[1]
        assert len(counts) == 4
        assert abs(counts - 100).max() < 5 * np.sqrt(100 * 3 / 4)


def of_text(*texts, between=sentences.LINES):
    rows = Sentences(between).tokenize([{"text": text} for text in texts], BYTES)
    return [(BYTES.decode(ids), sizes) for ids, sizes in rows]


def test_sentences_are_lines_or_what_a_pattern_says():
    assert of_text("One two.\n\n  Three. Four \n", "", "\n \n", "x") == [
        ("One two.\nThree. Four\n", [9, 12]),
        ("", []),
        ("", []),
        ("x\n", [2]),
    ]
    split = "(?<=[.!?]) +|\n"
    assert of_text("One. Two!  Three\nfour", between=split) == [
        ("One.\nTwo!\nThree\nfour\n", [5, 5, 6, 5])
    ]
    assert Sentences().key(BYTES) != Sentences(split).key(BYTES)


def test_whole_words_of_pairs_begin_at_their_sentences(prepared):
    """Bytes: the last letter of a sentence and the first of the next are in no word together."""
    vocabulary = prepared.own_vocabulary
    rows = Sentences().tokenize([{"text": "ab\ncd"}, {"text": "ef\ngh"}] * 40, vocabulary)
    corpus = Corpus([[1]])
    corpus._columns = {
        "text": Column([r[0] for r in rows]),
        "sentences": Column([r[1] for r in rows]),
    }
    corpus.vocabulary = vocabulary
    rows = rows_of(MaskedPairs(choose="words", density=0.5), corpus, 16)
    for number in range(40):
        row = rows.row(0, number)
        text = "".join(
            vocabulary.piece(t) if w else "_"
            for t, w in zip(row["targets"][:9].tolist(), row["weights"][:9], strict=True)
        )
        for word in ("ab", "cd", "ef", "gh"):
            assert (word[0] in text) == (word in text) == (word[1] in text)


def test_a_task_keeps_where_it_is_cut(prepared, quiet, monkeypatch):
    from t5x_lite.data.prepare import prepare

    objective = MaskedPairs(sentences=" +", choose="words")
    task = dataclasses.replace(prepared, objective=objective)
    prepare(task, quiet)
    once = task.batches(batch_size=4, length=48, seed=0)[0]
    kept = list(task.store("train").folder.glob("plans/*/bounds.npy"))
    assert len(kept) == 1
    monkeypatch.setattr(sentences, "_cut", lambda *_: pytest.fail("cut again"))
    again = dataclasses.replace(task, data_dir=task.data_dir).batches(
        batch_size=4, length=48, seed=0
    )
    for name, value in again[0].items():
        np.testing.assert_array_equal(value, once[name])
    assert once["labels"].shape == once["label_weights"].shape == (4,)
    monkeypatch.undo()
    held_out = task.evaluation(batch_size=8, length=48)
    last = held_out[len(held_out) - 1]
    rows = held_out.tasks[0].count() - 8 * (len(held_out) - 1)
    assert last["label_weights"].sum() == rows < 8, "rows that fill up don't count"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NextSentence(1.5), "random=1.5 must lie between 0 and 1"),
        (lambda: SentenceOrder(-0.1), "swapped=-0.1 must lie"),
        (lambda: MaskedPairs(short=2), "short=2 must lie"),
        (lambda: MaskedPairs(sentences="("), r"sentences='\(' isn't a pattern"),
        (lambda: MaskedPairs(choose="letters"), "choose='letters' is unknown"),
        (lambda: MaskedPairs(packing="split"), "packing='split' is unknown"),
        (lambda: MaskedPairs().sides(7), "length=7 is too small"),
        (lambda: MaskedPairs().for_family("decoder-only"), "encoder-only"),
        (lambda: rows_of(MaskedPairs(), Corpus([[3, 4], []]), 20).count(), "two documents"),
        (lambda: rows_of(MaskedPairs(), Corpus([[], []]), 20).count(), "no examples"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
