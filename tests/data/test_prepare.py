import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from t5x_lite.data.prepare import prepare, train_tokenizer
from t5x_lite.data.sources import Checkout, JsonLines, Text
from t5x_lite.data.text_store import TextShard, TextStore
from t5x_lite.data.token_store import TokenShard
from t5x_lite.data.vocabularies import ByteVocabulary, SentencePiece
from t5x_lite.errors import UserError


def said(verb, task):
    console = Console(file=io.StringIO(), width=80)
    verb(task, console)
    return console.file.getvalue()


def everything(folder):
    """Content of every file, and when it was written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def documents(task):
    text = TextStore.open(task.folder, task.text_config)
    splits = ("train", "validation")
    return {s: [t["text"] for chunk in text.chunks(s) for t in chunk] for s in splits}


@pytest.fixture
def piece_task(byte_task):
    return dataclasses.replace(byte_task, vocabulary=SentencePiece(vocab_size=400))


def test_stored_tokens_are_the_encoded_documents_in_order(piece_task, quiet):
    prepare(piece_task, quiet)
    vocabulary = piece_task.load_vocabulary()
    for split, texts in documents(piece_task).items():
        store = piece_task.store(split)
        assert len(store) == len(texts)
        for (ids,), text in zip(store.read(range(len(store))), texts, strict=True):
            assert ids.dtype == np.int32
            assert ids.tolist() == vocabulary.encode(text)
        assert store.read(range(3, 5))[1][0].tolist() == vocabulary.encode(texts[4])
        assert [len(ids) for (ids,) in store.read([4, 0, 4])] == store.lengths("text")[
            [4, 0, 4]
        ].tolist()
    assert "tensorflow" not in sys.modules


def test_the_split_loses_and_doubles_nothing_and_keeps_order(piece_task, quiet):
    prepare(piece_task, quiet)
    splits = documents(piece_task)
    (part,) = piece_task.source.parts()
    source = [record["text"] for record, _ in piece_task.source.records(part, pytest.fail)]
    assert sorted(splits["train"] + splits["validation"]) == sorted(source)
    assert splits["train"] == [text for text in source if text in set(splits["train"])]
    assert 4 <= len(splits["validation"]) <= 22  # a fifth of 60, within four standard deviations


def test_a_grown_corpus_keeps_its_split_and_copies_stay_on_one_side(byte_task, corpus, quiet):
    prepare(byte_task, quiet)
    before = documents(byte_task)
    corpus.write_text("\n\n".join(["a new first one", corpus.read_text(), corpus.read_text()]))
    grown = dataclasses.replace(byte_task, name="grown")
    prepare(grown, quiet)
    after = documents(grown)
    for split in before:
        assert set(before[split]) <= set(after[split])
    assert not set(after["train"]) & set(after["validation"])


def test_again_does_nothing_and_says_so(piece_task):
    first = said(prepare, piece_task)
    before = everything(piece_task.folder)
    again = said(prepare, piece_task)
    assert everything(piece_task.folder) == before
    assert "storing" in first
    assert "training" in first
    assert [line.split(": ")[1].split()[0] for line in again.splitlines()] == [
        "text",
        "tokenizer",
        "tokens",
    ]
    assert again.count("there") == 3
    assert said(train_tokenizer, piece_task).count("there") == 2


def test_preparing_twice_elsewhere_gives_the_same_files(piece_task, tmp_path, quiet):
    other = dataclasses.replace(piece_task, data_dir=str(tmp_path / "other"))
    for task in (piece_task, other):
        prepare(task, quiet)
    left, right = everything(piece_task.folder), everything(other.folder)
    assert left.keys() == right.keys()
    for name in left:
        if not name.endswith("tokenizer.model") and "array_record" not in name:
            assert left[name][0] == right[name][0], name
    assert piece_task.store("train").digest == other.store("train").digest


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(byte_task, tmp_path):
    assert "\x1b[" not in said(prepare, byte_task)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    prepare(dataclasses.replace(byte_task, data_dir=str(tmp_path / "other")), console)
    assert "━" in console.file.getvalue()


@pytest.mark.parametrize("stage", ["text", "tokenizer", "tokens"])
def test_what_fails_halfway_leaves_nothing_and_is_mended_by_running_again(
    piece_task, monkeypatch, quiet, stage
):
    place = {
        "text": "t5x_lite.data.text_store.kept",
        "tokenizer": "t5x_lite.data.prepare._lines_of",
        "tokens": "t5x_lite.data.token_store.as_bytes",
    }[stage]
    calls = []

    def stopped(*_):
        calls.append(0)
        if len(calls) == 2 or stage == "tokenizer":
            raise KeyboardInterrupt
        return b"" if stage == "tokens" else {"text": "one"}

    with monkeypatch.context() as patch:
        patch.setattr(place, stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(piece_task, quiet)
    left = {path.name for path in piece_task.folder.iterdir()} - {".lock"}
    done = {"text": set(), "tokenizer": {"text"}}
    done["tokens"] = {"text", "tokenizer.json", "tokenizer.model"}
    assert left == done[stage]
    prepare(piece_task, quiet)
    assert piece_task.batches(batch_size=2, length=8, seed=0)[0]


def test_what_a_killed_run_left_is_replaced(byte_task, quiet):
    beside = byte_task.folder / "text.partial"
    beside.mkdir(parents=True)
    (beside / "half").write_text("half")
    prepare(byte_task, quiet)
    assert not beside.exists()
    assert not (byte_task.folder / "text" / "half").exists()


def test_few_documents_still_split_and_one_cannot(tmp_path, byte_task, quiet):
    file = tmp_path / "few.txt"

    def attempt(name, content, fraction):
        file.write_text(content)
        task = dataclasses.replace(
            byte_task, name=name, source=Text(str(file)), validation_fraction=fraction
        )
        prepare(task, quiet)
        return {split: len(texts) for split, texts in documents(task).items()}

    few = "one\n\ntwo\n\nthree\n\n"
    assert attempt("little", few, 1e-6) == {"train": 2, "validation": 1}
    assert attempt("much", few, 1 - 1e-6) == {"train": 1, "validation": 2}
    for content, count in (("", 0), (" \n\n \n", 0), ("one", 1), ("one\n\none\n\none", 3)):
        with pytest.raises(UserError, match=f"few.txt has {count} records, {min(count, 1)} diff"):
            attempt(f"bad{count}{len(content)}", content, 0.5)
        assert not (byte_task.folder.parent / f"bad{count}{len(content)}" / "text").exists()


def refusal(verb, task, quiet):
    with pytest.raises(UserError) as caught:
        verb(task, quiet)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_config_on_the_same_store_is_refused_with_the_difference(
    piece_task, corpus, tmp_path, quiet
):
    prepare(piece_task, quiet)
    before = everything(piece_task.folder)
    fraction = dataclasses.replace(piece_task, validation_fraction=0.5)
    assert "validation_fraction 0.2 → 0.5" in refusal(prepare, fraction, quiet)
    by_line = dataclasses.replace(piece_task, source=Text(str(corpus), documents_by="line"))
    assert "documents_by 'blank_line' → 'line'" in refusal(prepare, by_line, quiet)
    larger = dataclasses.replace(piece_task, vocabulary=SentencePiece(vocab_size=390))
    assert "vocab_size 400 → 390" in refusal(train_tokenizer, larger, quiet)
    assert "vocab_size 400 → 390" in refusal(lambda t, _: t.load_vocabulary(), larger, quiet)
    assert everything(piece_task.folder) == before


def test_a_changed_input_is_refused_and_a_missing_one_is_not_needed(piece_task, corpus, quiet):
    prepare(piece_task, quiet)
    content = corpus.read_text()
    corpus.write_text(content.replace("hills", "holls"))
    assert "changed since" in refusal(prepare, piece_task, quiet)
    corpus.unlink()
    prepare(piece_task, quiet)
    assert piece_task.batches(batch_size=2, length=8, seed=0)[0]


def test_a_tokenizer_of_another_text_is_refused(piece_task, corpus, quiet):
    import shutil

    prepare(piece_task, quiet)
    shutil.rmtree(piece_task.folder / "text")
    corpus.write_text(corpus.read_text() + "\n\nmore")
    assert "was trained on another text" in refusal(prepare, piece_task, quiet)


def test_nothing_is_kept_of_a_broken_corpus(byte_task, corpus, quiet):
    corpus.write_bytes(b"fine\n\n" * 300 + b"\xff")
    assert f"{corpus} isn't UTF-8 at byte 1800 (0xff)" in refusal(prepare, byte_task, quiet)
    assert {path.name for path in byte_task.folder.iterdir()} == {".lock"}


def test_a_disk_that_cannot_be_written_is_named(byte_task, tmp_path, quiet):
    (tmp_path / "file").write_text("")
    task = dataclasses.replace(byte_task, data_dir=str(tmp_path / "file"))
    message = refusal(prepare, task, quiet)
    assert f"can't write {tmp_path / 'file'}" in message
    assert "data_dir" in message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("stage", ["text", "tokens"])
def test_a_full_disk_is_named_and_nothing_half_written_stays(byte_task, monkeypatch, quiet, stage):
    name = {
        "text": "text-train.array_record-00000-of-00001",
        "tokens": "shards/train-text-00000.part",
    }
    real = Path.mkdir

    def mkdir(self, *args, **kwargs):
        real(self, *args, **kwargs)
        place = self.parent / name[stage]
        if self.name == "shards" and self.parent.name.startswith(stage) and not place.exists():
            place.symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "can't write" in refusal(prepare, byte_task, quiet)
    assert not list(byte_task.folder.glob(f"{stage}*"))


@pytest.mark.parametrize("damage", ["cut", "missing", "other", "flipped", "index"])
def test_a_damaged_store_is_named_and_never_read_as_tokens(byte_task, quiet, damage):
    prepare(byte_task, quiet)
    (folder,) = byte_task.folder.glob("tokens-*")
    entries = folder / "train-text.bin"
    content = bytearray(entries.read_bytes())
    if damage == "cut":
        entries.write_bytes(content[:1000])
    elif damage == "missing":
        entries.unlink()
    elif damage == "other":
        entries.write_bytes((folder / "validation-text.bin").read_bytes())
    elif damage == "flipped":
        content[100] ^= 4
        entries.write_bytes(content)
    else:
        offsets = np.load(folder / "train-text.offsets.npy")
        np.save(folder / "train-text.offsets.npy", 2 * offsets)
    with pytest.raises(UserError, match=f"{folder} is damaged") as caught:
        [byte_task.batches(batch_size=8, length=64, seed=0)[step] for step in range(40)]
    assert "\n" not in str(caught.value)


@pytest.fixture
def many_parts(byte_task, monkeypatch):
    """A task whose source has about ten parts."""
    monkeypatch.setattr("t5x_lite.data.sources.base.PART_BYTES", 700)
    assert len(byte_task.source.parts()) > 5
    return byte_task


def test_parts_give_the_store_that_one_gives(many_parts, monkeypatch, tmp_path, quiet):
    prepare(many_parts, quiet)
    cut = documents(many_parts)
    assert len(list((many_parts.folder / "text").glob("text-train*"))) > 5
    monkeypatch.setattr("t5x_lite.data.sources.base.PART_BYTES", 2**20)
    whole = dataclasses.replace(many_parts, data_dir=str(tmp_path / "whole"))
    prepare(whole, quiet)
    assert cut == documents(whole)
    left, right = many_parts.store("train"), whole.store("train")
    everyone = [3, 40, 2, *range(len(left))]
    for (one,), (other,) in zip(left.read(everyone), right.read(everyone), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not list(many_parts.folder.rglob("*.partial"))


@pytest.mark.parametrize("stage", ["text", "tokens"])
def test_a_killed_preparation_goes_on_with_the_missing_shards(
    many_parts, monkeypatch, tmp_path, quiet, stage
):
    whole = dataclasses.replace(many_parts, data_dir=str(tmp_path / "whole"))
    prepare(whole, quiet)
    kind = {"text": "text_store.TextShard", "tokens": "token_store.TokenShard"}[stage]
    real = {"text": TextShard, "tokens": TokenShard}[stage].write

    def write(shard):
        if shard.number == 3:
            raise KeyboardInterrupt
        real(shard)

    with monkeypatch.context() as patch:
        patch.setattr(f"t5x_lite.data.{kind}.write", write)
        with pytest.raises(KeyboardInterrupt):
            prepare(many_parts, quiet, workers=1)
    (partial,) = many_parts.folder.glob("*.partial")
    finished = everything(partial / "shards")
    assert len([name for name in finished if name.endswith("json")]) == 3
    written = []
    monkeypatch.setattr(
        f"t5x_lite.data.{kind}.write", lambda shard: (written.append(shard.number), real(shard))
    )
    prepare(many_parts, quiet, workers=1)
    assert written == list(range(3, len(many_parts.source.parts())))
    assert many_parts.store("train").digest == whole.store("train").digest
    assert documents(many_parts) == documents(whole)


def test_workers_give_the_store_that_one_process_gives(many_parts, tmp_path, quiet):
    prepare(many_parts, quiet, workers=1)
    shared = dataclasses.replace(many_parts, data_dir=str(tmp_path / "shared"))
    prepare(shared, quiet, workers=2)
    assert shared.store("train").digest == many_parts.store("train").digest
    with pytest.raises(UserError, match="workers=0"):
        prepare(many_parts, quiet, workers=0)


def test_held_out_records_can_come_from_a_source_of_their_own(byte_task, tmp_path, quiet):
    (tmp_path / "held.txt").write_text("one\n\ntwo")
    own = dataclasses.replace(byte_task, validation_source=Text(str(tmp_path / "held.txt")))
    prepare(own, quiet)
    found = documents(own)
    assert found["validation"] == ["one", "two"]
    assert len(found["train"]) == 60
    assert len(own.store("validation")) == 2


def test_an_empty_split_is_named_with_its_source(byte_task, tmp_path, quiet):
    (tmp_path / "blank.txt").write_text("\n\n")
    own = dataclasses.replace(byte_task, validation_source=Text(str(tmp_path / "blank.txt")))
    message = refusal(prepare, own, quiet)
    assert f"{tmp_path / 'blank.txt'} has no records for the validation split" in message
    assert not list(own.folder.glob("text*"))


def test_an_id_beyond_the_vocabulary_is_refused(byte_task, monkeypatch, quiet):
    monkeypatch.setattr(
        ByteVocabulary, "encode_all", lambda self, texts: [[self.size]] * len(texts)
    )
    assert "gave id 363 and the vocabulary has 363" in refusal(prepare, byte_task, quiet)
    assert not list(byte_task.folder.glob("tokens*"))


def test_broken_records_are_counted_where_they_are_to_be_skipped(byte_task, tmp_path):
    file = tmp_path / "some.jsonl"
    lines = [json.dumps({"text": f"{n} over the hills"}) for n in range(30)]
    lines[3:3] = ["{no json", json.dumps({"other": 1}), json.dumps({"text": "\ud800"})]
    file.write_text("\n".join(lines))
    strict = dataclasses.replace(byte_task, source=JsonLines(str(file)))
    assert f"{file}, line 4" in refusal(prepare, strict, Console(quiet=True))
    lenient = dataclasses.replace(strict, source=JsonLines(str(file), broken="skip"))
    text = said(prepare, lenient)
    assert "skipped 3 broken records" in text
    assert f"{file}, line 5 has no field 'text' (it has other)" in text
    assert sum(map(len, documents(lenient).values())) == 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals are Unix's")
def test_a_killed_parent_leaves_no_worker(tmp_path):
    """Workers that a kill left behind would write the shards of the run that goes on."""
    program = (
        "import multiprocessing, os, signal, sys, time\n"
        "from t5x_lite.data.prepare import _follow\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = context.Pool(1, _follow, (os.getpid(),))\n"
        "    print(pool.apply(os.getpid), flush=True)\n"
        "    pool.apply_async(time.sleep, (60,))\n    time.sleep(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "parent.py").write_text(program)
    command = [sys.executable, str(tmp_path / "parent.py")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # A file: a pipe would be waited for until the worker, which has it too, ends.
    with (tmp_path / "out").open("w") as out:
        subprocess.run(command, stdout=out, env=env, check=False)
    worker = int((tmp_path / "out").read_text())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, 9)
    pytest.fail("the worker lives on")


def test_what_a_tree_has_beside_text_is_counted(byte_task, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for n in range(20):
        (tree / f"{n}.py").write_text(f"x = {n}\n")
    (tree / "picture.bin").write_bytes(b"\0\1")
    text = said(prepare, dataclasses.replace(byte_task, source=Checkout(str(tree))))
    assert "left out: 1 binary" in text
