import dataclasses
import importlib.util
import json
import types

import pytest

from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import TFDS, Chitchat, JsonLines, Text
from t5x_lite.errors import UserError


def texts(source):
    return [text for text, _ in source.documents()]


def refusal(source):
    with pytest.raises(UserError) as caught:
        texts(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    ("documents_by", "expected"),
    [
        ("blank_line", ["one\ntwo", "three", "four"]),
        ("line", ["one", "two", "three", "four"]),
        ("file", ["one\ntwo\n\n \nthree", "four"]),
    ],
)
def test_text_ends_documents_where_it_says(write, documents_by, expected):
    paths = [write("a.txt", "\none\ntwo\n\n \nthree\n"), write("b.txt", "four")]
    assert texts(Text(paths, documents_by)) == expected


def test_a_byte_order_mark_is_no_text(write):
    assert texts(Text(write("a.txt", b"\xef\xbb\xbfone"))) == ["one"]


def test_patterns_give_their_files_in_order(write, tmp_path):
    for name in ("2.txt", "1.txt", "3.md"):
        write(name, name)
    assert texts(Text(str(tmp_path / "*.txt"))) == ["1.txt", "2.txt"]
    assert texts(Text([str(tmp_path / "3.md"), str(tmp_path / "?.txt")])) == [
        "3.md",
        "1.txt",
        "2.txt",
    ]


def test_progress_ends_at_the_whole(write):
    source = Text([write("a.txt", "one\n\ntwo\n\n"), write("b.txt", "three")])
    assert [read for _, read in source.documents()] == [5, 10, 15]
    assert source.total_bytes() == 15


def test_json_lines_give_their_field(write):
    lines = [{"text": "one\ntwo"}, {"text": "  "}, {"text": "é", "n": 1}]
    path = write("a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert texts(JsonLines(path)) == ["one\ntwo", "é"]
    path = write("b.jsonl", json.dumps({"content": "here"}))
    assert texts(JsonLines(path, field="content")) == ["here"]


def test_bytes_that_are_not_utf8_are_named(write):
    path = write("a.txt", b"fine\n" * 3 + b"caf\xe9\n")
    assert refusal(Text(path)).startswith(f"{path} isn't UTF-8 at byte 18 (0xe9)")
    path = write("b.jsonl", b'{"text": "\xff"}')
    assert f"{path} isn't UTF-8 at byte 10 (0xff)" in refusal(JsonLines(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2 isn't JSON"),
        ('{"body": "x"}', "line 2 has no text field 'text' (it has body)"),
        ('{"text": 3}', "line 2 has no text field 'text' (it has text)"),
        ("[1]", "line 2 has no text field 'text' (it has no object)"),
    ],
)
def test_json_lines_name_file_and_line(write, line, message):
    path = write("a.jsonl", '{"text": "fine"}\n' + line)
    assert f"{path}, {message}" in refusal(JsonLines(path))


def test_missing_files_and_unknown_words_are_refused(tmp_path):
    assert "no file none.txt" in refusal(Text("none.txt"))
    assert "no file" in refusal(JsonLines(str(tmp_path / "*.jsonl")))
    with pytest.raises(UserError, match="paths is empty"):
        Text([])
    with pytest.raises(UserError, match="documents_by='page'"):
        Text("a.txt", documents_by="page")


def test_the_stamp_tells_a_changed_file(write):
    before = Text(write("a.txt", "one two")).stamp()
    assert Text(write("a.txt", "one two")).stamp() == before
    assert Text(write("a.txt", "one tow")).stamp() != before


def test_tfds_reads_what_prepare_wrote(byte_task, quiet):
    prepare(byte_task, quiet)
    folder = str(byte_task.folder / "text")
    both = texts(TFDS(folder)) + texts(TFDS(folder, split="validation"))
    assert sorted(both) == sorted(texts(byte_task.source))
    assert "no text field 'body' (it has text)" in refusal(TFDS(folder, field="body"))
    assert "TFDS can't give" in refusal(TFDS(folder, split="test"))


def test_an_unknown_tfds_name_is_refused(tmp_path):
    source = TFDS("no_such_data_set_anywhere", tfds_dir=str(tmp_path))
    assert "TFDS can't give 'no_such_data_set_anywhere'" in refusal(source)


def test_chitchat_is_a_dialogue_a_document(monkeypatch, write, tmp_path):
    turns = [[{"text": "hi"}, {"text": "there"}], [{"text": "hello"}]]
    write("dataset.json", json.dumps({"a": {"messages": turns}, "b": {"messages": []}}))
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert texts(Chitchat()) == ["hi\nthere\nhello"]
    write("dataset.json", "{broken")
    assert "reinstall" in refusal(Chitchat())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "t5x_lite[demo]" in refusal(Chitchat())


@pytest.mark.parametrize("source", [Text("a.txt"), JsonLines(["a", "b"]), TFDS("c"), Chitchat()])
def test_descriptions_are_json_and_tell_configs_apart(source):
    described = source.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == type(source).__name__
    for field in dataclasses.fields(source):
        assert field.name in described
