"""Labels, numbers and spans of texts: rows computed by hand."""

import json

import numpy as np
import pytest

from t5x_lite.data.objectives import (
    Classification,
    ExtractiveQA,
    Regression,
    count_labels,
    read_labels,
)
from t5x_lite.data.objectives.classification import longest_first
from t5x_lite.errors import UserError
from tests.data.packed import BOS, EOS, VOCABULARY, rows_of
from tests.data.tokenised import CONTEXT, NAMES, all_rows, labelled, question, tokenised

CLS, SEP = VOCABULARY.cls_id, VOCABULARY.sep_id

# --- classification and regression ---------------------------------------------------------------


def test_a_row_is_cls_text_sep_and_its_label():
    records = labelled()
    objective = Classification(NAMES)
    for record, row in zip(
        records, all_rows(rows_of(objective, tokenised(objective, records), 128)), strict=True
    ):
        ids = [CLS, *VOCABULARY.encode(record["text"]), SEP]
        assert row["tokens"][: len(ids)].tolist() == ids
        assert row["segments"].tolist() == [1] * len(ids) + [0] * (128 - len(ids))
        assert NAMES[row["labels"]] == record["label"]
        assert row["label_weights"] == 1
        assert set(row) == {"tokens", "segments", "positions", "labels", "label_weights"}


def test_a_pair_has_types_and_loses_the_end_of_the_longer_text():
    records = labelled(40, 40, pair=True)
    objective = Classification(NAMES, pair=True)
    rows = rows_of(objective, tokenised(objective, records), 33)
    assert "are longer than 33 tokens and are trimmed" in rows.note
    for record, row in zip(records, all_rows(rows), strict=True):
        first, second = (VOCABULARY.encode(record[n]) for n in ("text", "text_pair"))
        a, b = longest_first(len(first), len(second), 30)
        ids = [CLS, *first[:a], SEP, *second[:b], SEP]
        assert row["tokens"][: len(ids)].tolist() == ids
        assert row["token_types"].tolist() == [0] * (a + 2) + [1] * (b + 1) + [0] * (33 - len(ids))
        assert row["segments"].sum() == len(ids)


def test_longest_first_is_that_of_the_tokenizers_library():
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    sizes = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    for room in (8, 9):
        tokenizer.enable_truncation(room, strategy="longest_first")
        ours = longest_first(*map(np.array, zip(*sizes, strict=True)), room)
        for n, (a, b) in enumerate(sizes):
            which = tokenizer.encode("a " * a, "b " * b).sequence_ids
            assert (ours[0][n], ours[1][n]) == (which.count(0), which.count(1)), (a, b)
            assert longest_first(a, b, room) == (ours[0][n], ours[1][n])


def test_a_decoder_reads_bos_text_eos():
    objective = Classification(NAMES, pair=True).for_family("decoder-only")
    store = tokenised(objective, [{"text": "ab", "text_pair": "c", "label": "blue"}])
    row = rows_of(objective, store, 9).row(0, 0)
    a, b, c = VOCABULARY.encode("abc")
    assert row["tokens"].tolist() == [BOS, a, b, EOS, c, EOS, 0, 0, 0]
    assert row["labels"] == 2
    assert "token_types" not in row


@pytest.mark.parametrize(
    ("objective", "label", "expected"),
    [
        (Classification(3), "2", 2),
        (Classification(NAMES), " green ", 1),
        (Regression(), "-2.5", -2.5),
        (Regression(), "3", 3.0),
    ],
)
def test_labels_are_names_or_numbers(objective, label, expected):
    store = tokenised(objective, [{"text": "x", "label": label}])
    row = rows_of(objective, store, 8).row(0, 0)
    assert row["labels"] == expected
    assert row["labels"].dtype == (np.float32 if isinstance(objective, Regression) else np.int32)


@pytest.mark.parametrize(
    ("objective", "label", "message"),
    [
        (Classification(3), "3", "label '3' of 'what is it' isn't a whole number from 0 to 2"),
        (Classification(3), "-1", "isn't a whole number from 0 to 2"),
        (Classification(3), "red", "isn't a whole number from 0 to 2"),
        (Classification(("a", "b", "c", "d")), "e", r"isn't one of 4 \(a, b, c, …\); mend it"),
        (Regression(), "much", "isn't a number"),
        (Regression(), "nan", "isn't a number"),
    ],
)
def test_a_label_that_is_none_is_refused(objective, label, message):
    with pytest.raises(UserError, match=message) as caught:
        tokenised(objective, [{"text": "what is it", "label": label}])
    assert "\n" not in str(caught.value)


def test_names_of_labels_are_a_files_lines(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("red\n green \n\nblue\n")
    assert read_labels(str(file)) == NAMES
    assert read_labels(["a", "b"]) == ("a", "b")
    assert [count_labels(labels) for labels in (str(file), NAMES, 7)] == [3, 3, 7]
    with pytest.raises(UserError, match="can't read the labels' names"):
        read_labels(str(tmp_path / "none.txt"))


# --- extractive question answering ---------------------------------------------------------------


def test_the_span_holds_the_answer():
    objective = ExtractiveQA()
    answers = ["Tom", "a pig", "🙂", "run.", CONTEXT]
    store = tokenised(objective, [question(answer) for answer in answers])
    for answer, row in zip(answers, all_rows(rows_of(objective, store, 128)), strict=True):
        asked = [CLS, *VOCABULARY.encode("Who?"), SEP]
        read = [*asked, *VOCABULARY.encode(CONTEXT), SEP]
        assert row["tokens"][: len(read)].tolist() == read
        types = [0] * len(asked) + [1] * (len(read) - len(asked))
        assert row["token_types"][: len(read)].tolist() == types
        begin, end = row["spans"]
        assert VOCABULARY.decode(row["tokens"][begin : end + 1]) == answer
        assert row["label_weights"] == 1


@pytest.mark.parametrize("stride", [1, 5, 16, 500])
def test_windows_cover_the_context_and_mark_the_answer_where_it_is_whole(stride):
    objective = ExtractiveQA(stride=stride, question_length=8)
    ids = VOCABULARY.encode(CONTEXT)
    store = tokenised(objective, [question("a pig"), question("away", context="far away")])
    rows = rows_of(objective, store, 8 + 19)
    room = 27 - 3 - 4
    *windows, short = all_rows(rows)
    assert "windows" in rows.note
    answer = VOCABULARY.encode("a pig")
    starts, marked = [], 0
    for n, row in enumerate(windows):
        start = n * min(stride, room)
        starts.append(start)
        seen = row["tokens"][row["token_types"] == 1][:-1].tolist()
        assert seen == ids[start : start + room]
        place = next((i for i in range(len(seen)) if seen[i : i + 5] == answer), None)
        if place is None:
            assert row["spans"].tolist() == [0, 0]
        else:
            marked += 1
            assert row["spans"].tolist() == [place + 6, place + 10]
    assert starts[-1] + room >= len(ids) > starts[-1] - min(stride, room) + room
    assert marked or stride == 500
    assert VOCABULARY.decode(short["tokens"][slice(*(short["spans"] + [0, 1]))]) == "away"


@pytest.mark.parametrize("answers", ['{"text": [], "answer_start": []}', "[]"])
def test_what_has_no_answer_points_at_cls(answers):
    objective = ExtractiveQA()
    record = {"question": "Why?", "context": CONTEXT, "answers": answers}
    row = rows_of(objective, tokenised(objective, [record]), 128).row(0, 0)
    assert row["spans"].tolist() == [0, 0]
    assert row["tokens"][0] == CLS


def test_answers_may_be_a_list_of_objects():
    record = question("a pig")
    listed = json.dumps([{"text": "a pig", "answer_start": CONTEXT.index("a pig")}])
    tokenizer = ExtractiveQA().tokenizer
    answers = [
        tokenizer.tokenize([r], VOCABULARY)[0][2] for r in (record, record | {"answers": listed})
    ]
    assert answers[0] == answers[1]


def test_a_long_question_is_trimmed_and_counted():
    objective = ExtractiveQA(question_length=8)
    rows = rows_of(objective, tokenised(objective, [question("pig", ask="q" * 30)]), 128)
    assert rows.row(0, 0)["token_types"].tolist().index(1) == 8 + 2
    assert "1 questions are longer than 8 tokens and are trimmed" in rows.note


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (question("pig", 3), "its answer 'pig' isn't at character 3 of the context"),
        (question("Tom", -61), "isn't at character -61"),
        (question("Tom") | {"answers": "pig"}, "aren't"),
        (question("Tom") | {"answers": '{"text": ["Tom"]}'}, "aren't"),
    ],
)
def test_a_wrong_answer_is_refused(record, message):
    with pytest.raises(UserError, match=message) as caught:
        ExtractiveQA().tokenizer.tokenize([record], VOCABULARY)
    assert "\n" not in str(caught.value)
