"""Parquet beside pyarrow, CSV and TSV beside the csv module; TFDS and Hugging Face's data sets."""

import csv
import datetime
import decimal
import json
import shutil
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from t5x_lite.data.sources import TFDS, HuggingFace, Parquet, Table, Text, base, values
from t5x_lite.errors import UserError
from tests.data.reading import read, records, refusal

ROWS = [
    {"text": f"é {number} " * (number % 7), "n": number, "tags": ["a", None]}
    for number in range(100)
]


# --- Parquet -------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


@pytest.mark.parametrize("part_bytes", [1, 300, 10**9])
@pytest.mark.parametrize("batch_bytes", [1, 200, 10**9])
def test_parquet_gives_the_rows_that_pyarrow_reads(table, monkeypatch, part_bytes, batch_bytes):
    monkeypatch.setattr(base, "PART_BYTES", part_bytes)
    monkeypatch.setattr("t5x_lite.data.sources.tables.BATCH_BYTES", batch_bytes)
    source = Parquet(table)
    found, _ = read(source)
    assert [record for record, _ in found] == parquet.read_table(table).to_pylist()
    assert [str(place) for _, place in found[::50]] == [f"{table}, row 0", f"{table}, row 50"]
    assert len(source.parts()) == {1: 15, 10**9: 1}.get(part_bytes, len(source.parts()))
    for part in source.parts():
        reads = [place.read for _, place in source.records(part, pytest.fail)]
        assert reads == sorted(reads)
        assert 0.9 * part.size <= reads[-1] <= part.size


def test_parquet_reads_the_columns_that_are_named(table):
    assert records(Parquet(table, columns=["n"])) == [{"n": row["n"]} for row in ROWS]
    assert "has no column 'm' (it has text, n, tags)" in refusal(Parquet(table, columns=("m",)))
    assert f"{table}, row 0 has no text field 'm'" in refusal(Parquet(table, field="m"))


def test_other_values_than_json_s_become_text(tmp_path):
    path = str(tmp_path / "a.parquet")
    row = {
        "b": b"bytes \xc3\xa9",
        "t": datetime.datetime(2026, 11, 25, 19, 0, 1),
        "d": datetime.date(2026, 11, 25),
        "m": decimal.Decimal("1.50"),
        "s": {"x": [b"y", None], "f": 0.5},
    }
    parquet.write_table(pa.Table.from_pylist([row]), path)
    (record,) = records(Parquet(path))
    assert record == {
        "b": "bytes é",
        "t": "2026-11-25T19:00:01",
        "d": "2026-11-25",
        "m": "1.50",
        "s": {"x": ["y", None], "f": 0.5},
    }
    assert json.loads(json.dumps(record)) == record
    assert records(Parquet(path, field="b"))[0]["text"] == "bytes é"


@pytest.mark.parametrize("kind", ["string", "binary", "list<string>"])
def test_a_row_that_is_not_utf8_is_named_or_skipped(tmp_path, kind):
    path = str(tmp_path / "a.parquet")
    content = pa.array([b"fine", b"caf\xe9", b"too"], pa.binary())
    if kind != "binary":  # without the check that Arrow leaves to who writes the file
        content = pa.Array.from_buffers(pa.string(), 3, content.buffers())
    if kind == "list<string>":
        content = pa.ListArray.from_arrays([0, 1, 2, 3], content)
    parquet.write_table(pa.table({"n": [0, 1, 2], "text": content}), path)
    assert f"{path}, row 1, field 'text' isn't UTF-8 at byte 3 (0xe9)" in refusal(Parquet(path))
    found, errors = read(Parquet(path, broken="skip"))
    assert [record["n"] for record, _ in found] == [0, 2]
    assert len(errors) == 1


def test_a_torn_parquet_file_is_named_or_skipped_and_counted(table, tmp_path):
    good = Path(table).read_bytes()
    torn = tmp_path / "torn.parquet"
    for content in (good[: len(good) // 2], good[:-3], b"", b"text"):
        torn.write_bytes(content)
        assert f"{torn} is torn (" in refusal(Parquet(str(torn)))
        found, errors = read(Parquet([str(torn), table], broken="skip"))
        assert len(errors) == 1
        assert [record for record, _ in found] == ROWS
    torn.write_bytes(good[:4] + b"\xff" * 400 + good[404:])
    assert f"{torn} is torn (" in refusal(Parquet(str(torn)))


def test_parquet_behind_a_url(table):
    fsspec.filesystem("memory").pipe("/t/a.parquet", Path(table).read_bytes())
    assert records(Parquet("memory://t/a.parquet")) == ROWS
    fsspec.filesystem("memory").store.clear()


# --- CSV and TSV ---------------------------------------------------------------------------------

FIELDS = st.text(st.sampled_from('ab é🙂,;"\t\n'), max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    suffix=st.sampled_from([".csv", ".tsv"]),
    block=st.integers(1, 40),
)
def test_a_table_gives_the_rows_that_were_written(tmp_path_factory, rows, end, suffix, block):
    file = tmp_path_factory.mktemp("law") / f"a{suffix}"
    with file.open("w", newline="") as stream:
        dialect = "excel" if suffix == ".csv" else "excel-tab"
        writer = csv.DictWriter(stream, ["x", "text"], dialect=dialect, lineterminator=end)
        writer.writeheader()
        writer.writerows({"x": x, "text": text} for x, text in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t5x_lite.data.sources.lines.BLOCK_BYTES", block)
        found = records(Table(str(file)))
    with file.open(newline="") as stream:
        assert found == list(csv.DictReader(stream, dialect=dialect))
    assert found == [{"x": x, "text": text} for x, text in rows]


@pytest.fixture
def write(tmp_path):
    def write(content, name="a.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_tables_without_a_header_or_with_quotes_that_mean_nothing(write):
    path = write('1\tit"s\n2\t"so\n', "a.tsv")
    source = Table(path, header=["n", "text"], quote=None)
    assert records(source) == [{"n": "1", "text": 'it"s'}, {"n": "2", "text": '"so'}]
    path = write("\ufeffa;body\n1;x\n\n2;y\n")
    found, _ = read(Table(path, field="body", delimiter=";"))
    assert [record for record, _ in found] == [{"a": "1", "text": "x"}, {"a": "2", "text": "y"}]
    assert [str(place) for _, place in found] == [f"{path}, line 2", f"{path}, line 4"]


def test_a_field_may_be_longer_than_the_csv_module_allows_by_itself(write):
    assert len(records(Table(write("text\n" + "x" * 10**6)))[0]["text"]) == 10**6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"1,2,3", "line 4 has 3 fields where the header has 2"),
        (b"1", "line 4 has 1 fields where the header has 2"),
        (b'"a"b,2', "line 4 isn't a row ("),
        (b'"\xe9"b,2', "line 4 isn't a row ("),
        (b"caf\xe9,2", "isn't UTF-8 at byte 22 (0xe9)"),
        (b'"caf\xe9\n2",x', "isn't UTF-8 at byte 23 (0xe9)"),
    ],
)
def test_a_broken_row_is_named_or_skipped(write, row, message):
    path = write(b'a,text\n10000,"x\ny"\n' + row + b"\n3,w\n")
    assert message in refusal(Table(path))
    found, errors = read(Table(path, broken="skip"))
    assert [record["text"] for record, _ in found] == ["x\ny", "w"]
    assert len(errors) == 1


def test_a_torn_table_and_headers_that_will_not_do(write):
    path = write('a,text\n1,x\n2,"torn')
    assert f"{path}, line 3 isn't a row (unexpected end of data)" in refusal(Table(path))
    assert len(records(Table(path, broken="skip"))) == 1
    path = write("a,a\n1,2\n")
    assert f"{path}, line 1 names column 'a' twice; bind Table.header" in refusal(Table(path))
    found, errors = read(Table(path, broken="skip"))
    assert (found, len(errors)) == ([], 1)
    assert read(Table(write(""))) == ([], [])
    with pytest.raises(UserError, match=r"Table.delimiter=';;' must be one character"):
        Table("a.csv", delimiter=";;")


# --- TFDS ----------------------------------------------------------------------------------------


def test_tfds_reads_what_prepare_wrote(prepared, monkeypatch):
    folder = str(prepared.folder / "text")
    import tensorflow_datasets as tfds

    direct = tfds.builder_from_directory(folder).as_data_source(split="train")
    expected = [{"text": example["text"].decode()} for example in direct]
    for part_bytes, batch_bytes in ((10**9, 10**9), (1000, 100)):
        monkeypatch.setattr(base, "PART_BYTES", part_bytes)
        monkeypatch.setattr("t5x_lite.data.sources.datasets.BATCH_BYTES", batch_bytes)
        source = TFDS(folder)
        assert records(source) == expected
        for part in source.parts():
            reads = [place.read for _, place in source.records(part, pytest.fail)]
            assert reads == sorted(reads)
            assert reads[-1] <= part.size + 1
    assert 3 <= len(TFDS(folder).parts()) < len(expected)
    both = records(TFDS(folder)) + records(TFDS(folder, split="validation"))
    assert sorted(record["text"] for record in both) == sorted(
        record["text"] for record in records(Text(prepared.source.paths))
    )
    assert records(TFDS(folder, split="train[3:5]")) == expected[3:5]
    message = refusal(TFDS(folder, field="body"))
    assert f"{folder}, record 0 has no text field 'body' (it has text); bind TFDS.field" in message
    assert "TFDS can't give" in refusal(TFDS(folder, split="test"))


@pytest.mark.parametrize("damage", ["header", "chunk", "record", "index", "half", "block", "end"])
def test_a_torn_record_of_tfds_is_named_or_skipped(prepared, tmp_path, damage):
    folder = shutil.copytree(prepared.folder / "text", tmp_path / "text")
    (file,) = folder.glob("text-train.array_record*")
    expected = records(TFDS(str(folder)))
    good = file.read_bytes()
    stop = {"half": 1000, "block": 2**16, "end": len(good) - 1}.get(damage)
    if stop is None:
        at = {"header": 100, "chunk": 150, "record": 2000, "index": 2**16}[damage]
        content = good[:at] + bytes(byte ^ 0xFF for byte in good[at : at + 4]) + good[at + 4 :]
    else:
        content = good[:stop]
    file.write_bytes(content)
    message = refusal(TFDS(str(folder)))
    assert f"{folder}, record " in message
    assert "is torn (" in message
    found, errors = read(TFDS(str(folder), broken="skip"))
    assert 1 <= len(errors) <= (2 if damage in ("header", "chunk", "record") else len(expected))
    assert len(found) + len(errors) == len(expected)
    assert all(record in expected for record, _ in found)


def test_an_unknown_tfds_name_and_a_url_are_refused(tmp_path):
    source = TFDS("no_such_data_set_anywhere", tfds_dir=str(tmp_path))
    assert "TFDS can't give 'no_such_data_set_anywhere'" in refusal(source)
    assert "copy gs://bucket/data to one first" in refusal(TFDS("gs://bucket/data"))


def test_values_of_tfds_become_json():
    import numpy as np

    example = {
        "id": np.int64(3),
        "score": np.float32(0.5),
        "answers": {"text": np.array([b"a", "é".encode()], object), "start": np.array([1, 2])},
        "ok": np.bool_(True),
    }
    made = values.json_value(example)
    assert made == {
        "id": 3,
        "score": 0.5,
        "answers": {"text": ["a", "é"], "start": [1, 2]},
        "ok": True,
    }
    assert json.loads(json.dumps(made)) == made


# --- Hugging Face's datasets ---------------------------------------------------------------------


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def test_hugging_face_s_data_sets_give_what_the_library_reads(
    quiet_datasets, tmp_path, monkeypatch
):
    folder = str(tmp_path / "saved")
    saved = quiet_datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(folder)
    for part_bytes, batch_bytes in ((10**9, 10**9), (300, 100)):
        monkeypatch.setattr(base, "PART_BYTES", part_bytes)
        monkeypatch.setattr("t5x_lite.data.sources.datasets.BATCH_BYTES", batch_bytes)
        assert records(HuggingFace(folder)) == saved.to_list()
        for part in HuggingFace(folder).parts():
            reads = [place.read for _, place in HuggingFace(folder).records(part, pytest.fail)]
            assert reads == sorted(reads)
            assert 0.9 * part.size <= reads[-1] <= part.size + 1
    assert 5 <= len(HuggingFace(folder).parts()) < len(ROWS)
    assert records(HuggingFace(folder, columns=("n",)))[7] == {"n": 7}
    found, _ = read(HuggingFace(folder))
    assert str(found[3][1]) == f"{folder}, record 3"
    assert "has no text field 'body'" in refusal(HuggingFace(folder, field="body"))
    quiet_datasets.DatasetDict({"dev": saved.select([5, 3])}).save_to_disk(str(tmp_path / "dict"))
    assert records(HuggingFace(str(tmp_path / "dict"), split="dev")) == [ROWS[5], ROWS[3]]
    assert "datasets can't give" in refusal(HuggingFace(str(tmp_path / "dict"), split="train"))


def test_a_folder_of_files_is_a_data_set_of_hugging_face_s(quiet_datasets, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    source = HuggingFace(str(folder))
    assert records(source) == ROWS
    assert source.stamp() == HuggingFace(str(folder)).stamp()
    assert source.name.endswith("files")
    assert "datasets can't give" in refusal(HuggingFace(str(tmp_path / "none")))


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 't5x_lite[datasets]'" in refusal(HuggingFace("me/data"))
