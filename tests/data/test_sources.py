"""Plain text and JSON lines, how they are cut in parts, and what is broken in them."""

import bz2
import codecs
import dataclasses
import gzip
import importlib.util
import json
import lzma
import types

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5x_lite.data.sources import (
    TFDS,
    Checkout,
    Chitchat,
    Html,
    HuggingFace,
    JsonLines,
    Parquet,
    Table,
    Text,
    Warc,
    base,
    corpus,
    lines,
)
from t5x_lite.errors import UserError
from tests.data.reading import read, refusal


def texts(source):
    return [record["text"] for record, _ in read(source)[0]]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


# --- text ----------------------------------------------------------------------------------------


def paragraphs_of(content):
    """The plain reading: a document is a run of lines that aren't white space."""
    found, run = [], []
    for line in [*content.removeprefix("\ufeff").split("\n"), ""]:
        if line.strip():
            run.append(line)
        elif run:
            found.append("\n".join(run).strip("\r\n"))
            run = []
    return found


def lines_of(content):
    found = content.removeprefix("\ufeff").split("\n")
    return [line.strip("\r\n") for line in found if line.strip()]


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


PIECES = [
    "a",
    "é",
    "🙂",
    "\n",
    "\n",
    "\n\n",
    "\r\n",
    " ",
    "\t",
    "\u3000",
    "\u2028",
    "\x1c",
    "long " * 9,
]
CONTENTS = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(max_examples=200, deadline=None)
@example(content="\nab", has_bom=True, part=4, block=4, by="blank_line")  # a blank line of a mark
@given(
    content=CONTENTS,
    has_bom=st.booleans(),
    part=st.integers(4, 40),  # more than a byte order mark
    block=st.integers(1, 40),
    by=st.sampled_from(["blank_line", "line"]),
)
def test_the_parts_give_what_the_whole_file_holds(
    tmp_path_factory, content, has_bom, part, block, by
):
    file = tmp_path_factory.mktemp("law") / "a.txt"  # lines are counted once in a file
    content = "\ufeff" * has_bom + content
    file.write_bytes(content.encode())
    source = Text(str(file), by)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "PART_BYTES", part)
        patch.setattr(lines, "BLOCK_BYTES", block)
        patch.setattr(lines, "PAST_BYTES", block)
        found, _ = read(source)
        assert all(one.size <= part for one in source.parts())
    whole = {"blank_line": paragraphs_of, "line": lines_of}[by](content)
    assert [record["text"] for record, _ in found] == whole
    numbered = content.removeprefix("\ufeff").split("\n")
    for record, place in found:
        line = int(str(place).removeprefix(f"{file}, line "))
        assert numbered[line - 1].strip("\r\n") == record["text"].split("\n")[0].strip("\r\n")


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.dictionaries(st.sampled_from("ab"), st.text(max_size=9)), max_size=9),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    is_ascii=st.booleans(),
    part=st.integers(1, 60),
    block=st.integers(1, 60),
)
def test_json_lines_of_all_parts_are_those_of_the_file(
    tmp_path_factory, values, end, is_ascii, part, block
):
    file = tmp_path_factory.getbasetemp() / "law.jsonl"
    content = end.join(json.dumps(value, ensure_ascii=is_ascii) for value in values)
    file.write_bytes(content.encode(errors="replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "PART_BYTES", part)
        patch.setattr(lines, "BLOCK_BYTES", block)
        found, _ = read(JsonLines(str(file)))
    plain = file.read_bytes().decode().split("\n")
    assert [record for record, _ in found] == [json.loads(one) for one in plain if one.strip()]


def test_white_space_is_what_python_takes_for_it():
    for code in range(0xD800):  # there is none above
        is_blank = lines.BLANK_LINE.fullmatch(chr(code).encode()) is not None
        assert is_blank == (chr(code).isspace() and code != 10), hex(code)


def test_a_byte_order_mark_is_no_text(write):
    assert texts(Text(write("a.txt", codecs.BOM_UTF8 + b"one"))) == ["one"]
    assert texts(Text(write("b.txt", codecs.BOM_UTF8 + b"one\n"), "file")) == ["one"]
    assert texts(JsonLines(write("a.jsonl", codecs.BOM_UTF8 + b'{"text": "one"}'))) == ["one"]


def test_patterns_give_their_files_in_order(write, tmp_path):
    for name in ("2.txt", "1.txt", "3.md"):
        write(name, name)
    assert texts(Text(str(tmp_path / "*.txt"))) == ["1.txt", "2.txt"]
    assert texts(Text([str(tmp_path / "3.md"), str(tmp_path / "?.txt")])) == [
        "3.md",
        "1.txt",
        "2.txt",
    ]


def test_small_files_share_a_part_and_large_ones_are_cut(write, monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", 10)
    small = [write(f"{number}.txt", "abc\n") for number in range(5)]
    large = write("large.txt", "abcd\n" * 5)
    parts = Text([*small, large]).parts()
    assert [len(part.pieces) for part in parts] == [2, 2, 1, 1, 1, 1]
    assert sum(part.size for part in parts) == 5 * 4 + 25
    assert [piece[1:] for part in parts[3:] for piece in part.pieces] == [
        (0, 10),
        (10, 20),
        (20, 25),
    ]
    assert parts == Text([*small, large]).parts()


def test_progress_grows_up_to_each_part_s_size(write, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 4)
    source = Text([write("a.txt", "one\n\ntwo\n\n"), write("b.txt", "three")])
    (part,) = source.parts()
    found = [place.read for _, place in read(source)[0]]
    assert found == sorted(found)
    assert found[-1] == part.size == 15


def test_a_document_longer_than_many_parts_is_given_once(write):
    text = ("é" * 49 + "\n") * 2_000  # scaled: 100 parts, each of 20 blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "PART_BYTES", len(text.encode()) // 100)
        patch.setattr(lines, "BLOCK_BYTES", len(text.encode()) // 2_000)
        assert texts(Text(write("a.txt", "one\n\n" + text + "\ntwo"))) == ["one", text[:-1], "two"]
        line = json.dumps({"text": text})
        path = write("a.jsonl", '{"text": "one"}\n' + line + '\n{"text": "two"}')
        assert texts(JsonLines(path)) == ["one", text, "two"]


# --- JSON lines ----------------------------------------------------------------------------------


def test_json_lines_give_whole_records_and_one_field_as_text(write):
    rows = [{"text": "one\ntwo"}, {"text": "é", "n": 1, "tags": ["a", {"b": None}]}]
    path = write("a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n \n")
    assert [record for record, _ in read(JsonLines(path))[0]] == rows
    path = write("b.jsonl", json.dumps({"content": "here", "text": "other", "n": 1}))
    (pair,), _ = read(JsonLines(path, field="content"))
    assert pair[0] == {"text": "here", "n": 1}
    path = write("c.jsonl", json.dumps({"question": "1+1?"}))
    assert read(JsonLines(path))[0][0][0] == {"question": "1+1?"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2 isn't JSON"),
        ('{"text": "torn', "line 2 isn't JSON"),
        ("[" * 100_000, "line 2 isn't JSON"),
        ('{"body": "x"}', "line 2 has no text field 'text' (it has body); bind JsonLines.field"),
        ('{"text": 3}', "line 2 has no text field 'text' (it has text)"),
        ('{"text": null}', "line 2 has no text field 'text' (it has text)"),
        ("{}", "line 2 has no text field 'text' (it has none)"),
        ("[1]", "line 2 is no JSON object but list; put it in one"),
        ("NaN", "line 2 is no JSON object but float"),
    ],
)
def test_a_broken_line_is_named_or_skipped_and_counted(write, line, message):
    path = write("a.jsonl", '{"text": "fine"}\n' + line + '\n{"text": "too"}\n')
    assert f"{path}, {message}" in refusal(JsonLines(path, "text"))
    found, errors = read(JsonLines(path, "text", broken="skip"))
    assert [record["text"] for record, _ in found] == ["fine", "too"]
    assert len(errors) == 1
    assert f"{path}, {message}" in errors[0]


def test_line_numbers_are_those_of_the_file_in_every_part(write, monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", 30)
    rows = ["", *(json.dumps({"text": "x" * n}) for n in range(20)), "oops", "", "{}"]
    path = write("a.jsonl", "\n".join(rows))
    source = JsonLines(path, broken="skip")
    assert len(source.parts()) > 10
    found, errors = read(source)
    assert [str(place) for _, place in found] == [
        f"{path}, line {number}" for number in [*range(2, 22), 24]
    ]
    assert errors[0].startswith(f"{path}, line 22 isn't JSON")


# --- what is broken ------------------------------------------------------------------------------


def test_bytes_that_are_not_utf8_are_named_or_their_document_is_skipped(write):
    path = write("a.txt", b"fine\n\n" + b"fine\n" * 2 + b"caf\xe9\n\nlast")
    assert refusal(Text(path)).startswith(f"{path} isn't UTF-8 at byte 19 (0xe9)")
    found, errors = read(Text(path, broken="skip"))
    assert [record["text"] for record, _ in found] == ["fine", "last"]
    assert len(errors) == 1
    assert texts(Text(path, "line", broken="skip")) == ["fine", "fine", "fine", "last"]
    assert texts(Text(path, "file", broken="skip")) == []
    path = write("b.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n{"text": "last"}')
    assert f"{path} isn't UTF-8 at byte 27 (0xff)" in refusal(JsonLines(path))
    assert texts(JsonLines(path, broken="skip")) == ["fine", "last"]
    # what CPython alone would let pass: half a surrogate pair in UTF-8
    path = write("c.jsonl", b'{"text": "\xed\xa0\x80"}')
    assert "isn't UTF-8 at byte 10 (0xed)" in refusal(JsonLines(path))


def test_empty_input_gives_no_records(write):
    empty = write("a.txt", "")
    for by in ("blank_line", "line", "file"):
        assert texts(Text([empty, write("b.txt", " \n\u3000\r\n")], by)) == []
    assert read(JsonLines(empty))[0] == []
    assert texts(Text([empty, write("c.txt", "one"), empty])) == ["one"]


def test_missing_files_and_unknown_words_are_refused(tmp_path):
    assert "no file none.txt (seen from" in refusal(Text("none.txt"))
    assert "no file" in refusal(JsonLines(str(tmp_path / "*.jsonl")))
    with pytest.raises(UserError, match="paths is empty"):
        Text([])
    with pytest.raises(UserError, match="documents_by='page'"):
        Text("a.txt", documents_by="page")
    with pytest.raises(UserError, match="broken='ignore' is unknown; use 'error' or 'skip'"):
        Text("a.txt", broken="ignore")


# --- compressed and remote -----------------------------------------------------------------------

COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zstd(content):
    from backports import zstd

    return zstd.compress(content)


@pytest.mark.parametrize("end", [*COMPRESSORS, ".zst"])
def test_compressed_files_are_read_and_torn_ones_named(write, monkeypatch, end):
    monkeypatch.setattr(base, "PART_BYTES", 100)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1000)
    compress = COMPRESSORS.get(end, zstd)
    rows = [json.dumps({"text": f"{n} {n**7} {n**9}"}) for n in range(1000)]
    good = compress("\n".join(rows).encode())
    path = write("a.jsonl" + end, good)
    source = corpus(path)
    assert isinstance(source, JsonLines)
    assert len(source.parts()) == 1
    found, _ = read(source)
    assert [record for record, _ in found] == [json.loads(row) for row in rows]
    assert found[-1][1].read == len(good) == source.parts()[0].size
    after = write("b.jsonl", rows[0])
    for content in (good[: len(good) // 2], b"\x00" + good, good[:-1]):
        write("a.jsonl" + end, content)
        assert f"{path} is torn (" in refusal(source)
        found, errors = read(JsonLines([path, after], broken="skip"))
        assert len(errors) == 1
        assert [record for record, _ in found] == [
            *(json.loads(row) for row in rows[: len(found) - 1]),
            json.loads(rows[0]),
        ]


@pytest.fixture
def remote():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_urls_are_read_through_fsspec(remote, monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", 12)
    content = "one\ntwo\n\nthree and four\n\n\nfive é\n"
    remote.pipe({"/c/b.txt": content.encode(), "/c/a.txt": b"zero", "/c/x.jsonl": b'{"text": "j"}'})
    source = corpus("memory://c/*.txt")
    assert texts(source) == ["zero", *paragraphs_of(content)]
    assert source.stamp().keys() == {"memory:///c/a.txt", "memory:///c/b.txt"}
    assert texts(corpus("memory://c/x.jsonl")) == ["j"]
    assert str(read(source)[0][-1][1]) == "memory:///c/b.txt, line 7"
    assert "no file memory://c/none.txt;" in refusal(Text("memory://c/none.txt"))
    remote.pipe({"/c/t.jsonl.gz": gzip.compress(b'{"text": "j"}')[:-9]})
    assert "memory:///c/t.jsonl.gz is torn" in refusal(JsonLines("memory://c/t.jsonl.gz"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/a.txt", "pip install gcsfs"),
        ("s3://bucket/a.txt", "pip install s3fs"),
        ("nothing://a.txt", "can't read nothing://a.txt: Protocol not known: nothing"),
    ],
)
def test_a_url_without_its_driver_says_what_to_install(url, message):
    assert message in refusal(Text(url))


def test_a_driver_s_own_errors_name_the_url(monkeypatch, remote):
    class NoCredentialsError(Exception):
        pass

    def fail(*args, **kwargs):
        raise NoCredentialsError("Unable to locate credentials\nsee manual")

    monkeypatch.setattr(type(remote), "isfile", fail)
    message = refusal(Text("memory://c/a.txt"))
    assert message == "can't read memory://c/a.txt: Unable to locate credentials."


# --- every source --------------------------------------------------------------------------------


def test_the_stamp_tells_a_changed_file(write):
    before = Text(write("a.txt", "one two")).stamp()
    assert Text(write("a.txt", "one two")).stamp() == before
    assert Text(write("a.txt", "one tow")).stamp() != before


def test_chitchat_is_a_dialogue_a_document(monkeypatch, write, tmp_path):
    turns = [[{"text": "hi"}, {"text": "there"}], [{"text": "hello"}]]
    write("dataset.json", json.dumps({"a": {"messages": turns}, "b": {"messages": []}}))
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert texts(Chitchat()) == ["hi\nthere\nhello", ""]
    write("dataset.json", "{broken")
    assert "reinstall" in refusal(Chitchat())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "t5x_lite[demo]" in refusal(Chitchat())


@pytest.mark.parametrize(
    "source",
    [
        Text("a.txt"),
        JsonLines(["a", "b"]),
        TFDS("c"),
        Chitchat(),
        Parquet("a"),
        Table("a"),
        HuggingFace("a", columns=("text",)),
        Checkout("a"),
        Warc("a"),
        Html("a"),
    ],
    ids=lambda source: type(source).__name__,
)
def test_descriptions_are_json_and_tell_configs_apart(source):
    described = source.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == type(source).__name__
    for field in dataclasses.fields(source):
        assert field.name in described
    assert dataclasses.replace(source, broken="skip").describe() != described


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("chitchat", Chitchat()),
        ("my/a.txt", Text("my/a.txt")),
        (["a.md", "b"], Text(["a.md", "b"])),
        ("my/*", Text("my/*")),
        ("a.jsonl", JsonLines("a.jsonl", "f")),
        ("gs://b/a.json.gz", JsonLines("gs://b/a.json.gz", "f")),
        ("gs://b/a", Text("gs://b/a")),
        ("a.parquet", Parquet("a.parquet", "f")),
        ("a.CSV", Table("a.CSV", "f")),
        ("a*.tsv.xz", Table("a*.tsv.xz", "f")),
        ("a.warc.gz", Warc("a.warc.gz")),
        ("a.warc.wet.gz", Warc("a.warc.wet.gz")),
        ("a.html", Html("a.html")),
        ("hf:me/data", HuggingFace("me/data", split="s", field="f")),
        ("ag_news_subset", TFDS("ag_news_subset", "f", "s")),
    ],
)
def test_a_text_s_name_says_what_it_is(text, source):
    assert corpus(text, "f", split="s") == source


def test_files_of_two_kinds_and_folders_of_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is a folder of neither .*; name its files by a pattern"):
        corpus(str(tmp_path))
    with pytest.raises(
        UserError, match=r"a.jsonl, b.txt: .* JsonLines and Text; give those of one"
    ):
        corpus(["a.jsonl", "b.txt"])
    with pytest.raises(UserError, match=r"corpus.text is empty"):
        corpus([])
