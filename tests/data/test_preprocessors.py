"""What is done to records before they are stored."""

import pytest

from t5x_lite.data.preprocessors import Each, Keep, Rename, Split, Template, apply
from t5x_lite.data.sources import Place
from t5x_lite.errors import UserError

PLACE = Place("a.jsonl", "record", 7, 0, 0)


def made(record, *steps):
    return apply(steps, record, PLACE)


def test_fields_get_other_names_and_the_rest_stays():
    record = {"question": "q", "answer": "a", "n": 1}
    renamed = made(record, Rename({"question": "inputs", "answer": "targets"}))
    assert renamed == [{"inputs": "q", "targets": "a", "n": 1}]
    assert made({"a": 1, "b": 2}, Rename({"a": "b", "b": "a"})) == [{"a": 2, "b": 1}]


def test_templates_are_filled_and_braces_can_be_written():
    record = {"en": "cat", "de": {"text": ["Katze"]}}
    step = Template(inputs="{{}} English: {en}", targets="{de[text][0]}")
    assert made(record, step) == [record | {"inputs": "{} English: cat", "targets": "Katze"}]


def test_templates_see_values_and_nothing_of_python():
    for reach in ("{en.__class__}", "{en[0].upper}"):
        with pytest.raises(UserError, match=r"Template\.text wants"):
            made({"en": "cat"}, Template(text=reach))


def test_records_are_kept_by_a_pattern():
    records = [{"text": text} for text in ("a cat", "a dog", "cats")]
    found = [one for record in records for one in made(record, Keep("text", r"\bcat"))]
    assert found == [records[0], records[2]]


def test_a_line_is_split_in_fields():
    step = Split("IN: (.*) OUT: (.*)")
    record = {"text": "IN: jump twice OUT: JUMP JUMP\n"}
    assert made(record, step) == [record | {"inputs": "jump twice", "targets": "JUMP JUMP"}]


def test_each_element_of_a_list_becomes_a_record():
    record = {"title": "t", "parts": ["one", {"text": "two", "n": 2}]}
    assert made(record, Each("parts")) == [
        {"title": "t", "text": "one"},
        {"title": "t", "text": "two", "n": 2},
    ]
    assert made({"parts": []}, Each("parts")) == []


def test_steps_follow_each_other():
    steps = (Each("parts"), Keep("text", "o"), Template(targets="{text}!"))
    found = made({"parts": ["one", "six", "two"]}, *steps)
    assert [record["targets"] for record in found] == ["one!", "two!"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Rename({"b": "c"}), "no field 'b' (it has a)"),
        (Template(inputs="{b}"), "Template.inputs wants 'b', the record has a"),
        (Keep("b", "x"), "no field 'b'"),
        (Split("x(.)(.)", field="a"), "'text' doesn't match Split.pattern"),
        (Each("a"), "field 'a' is no list but str"),
    ],
)
def test_a_record_that_will_not_do_is_named(step, message):
    with pytest.raises(UserError) as caught:
        made({"a": "text"}, step)
    assert str(caught.value).startswith(f"{PLACE}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Template(), "no inputs, targets or text"),
        (lambda: Template(text="{a"), "Template.text '{a'"),
        (lambda: Keep("a", "("), "isn't a pattern"),
        (lambda: Split("("), "isn't a pattern"),
        (lambda: Split("(.*)"), "1 groups for 2 fields"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
