"""Tokenizers of runs of our own: what `convert to-hf` writes, what it says it doesn't, and why.

tests/parity/parity_exported_tokenizers.py compares them with `transformers`.
"""

import dataclasses
import importlib.util
import io
import json
import pathlib

import gin
import jax
import numpy as np
import pytest
import sentencepiece

from t5x_lite import cli
from t5x_lite.checkpoint import write_one_by_one
from t5x_lite.data import imported
from t5x_lite.data.vocabularies import Bytes, Imported, SentencePiece, load_vocabulary
from t5x_lite.errors import UserError
from t5x_lite.hub import tokenizer as exported
from t5x_lite.hub.convert import to_hf
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.t5 import t5_1_1
from t5x_lite.tensors import flatten
from t5x_lite.train.identity import model_identity


def beside(path):
    """A module of the tests."""
    file = pathlib.Path(__file__).parent.parent / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


published, resumable = beside("data/published.py"), beside("train/resumable.py")
SHAPE = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "hidden": 16}
MODEL = llama("tiny", **SHAPE, vocab_size=500)
TEXT = "over the hills\nand  far"


def of(vocabulary, data_dir):
    """A task with a vocabulary; an export needs no more of it."""
    return dataclasses.replace(resumable.tiny_task(data_dir), vocabulary=vocabulary)


def write_run(folder, vocabulary, model=MODEL):
    """A checkpoint of zeros, as `train` leaves it."""
    shapes, _ = parameters.abstract(model)
    leaves = (
        (f"params/{path}", jax.device_put(np.zeros(leaf.shape, leaf.dtype)))
        for path, leaf in flatten(shapes).items()
    )
    meta = {"model": model_identity(model), "params_only": True}
    write_one_by_one(
        folder / "checkpoints", 0, leaves, meta | {"vocabulary": vocabulary.fingerprint}
    )


def trained(data_dir, **options):
    config = SentencePiece(vocab_size=320, extra_ids=10, **options)
    task = of(config, data_dir)
    task.folder.mkdir(parents=True)
    (task.folder / "tokenizer.model").write_bytes(config.train(published.LINES))
    about = json.dumps({"config": dataclasses.asdict(config)})
    (task.folder / "tokenizer.json").write_text(about)
    return task


def export(tmp_path, task, model=MODEL, **options):
    if not (tmp_path / "run").exists():
        write_run(tmp_path / "run", task.load_vocabulary(), model)
    to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"), task=task, **options)
    return tmp_path / "out"


@pytest.mark.parametrize("model", [MODEL, t5_1_1("tiny", width=16)], ids=lambda m: m.kind)
@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_an_exported_run_comes_back_with_its_ids(tmp_path, kind, model):
    task = of(Bytes(7), tmp_path)
    if kind != "bytes":
        task = trained(tmp_path / "data", model_type=kind)
    how = "nearest" if kind == "unigram" else "exact"
    before, after = (
        task.load_vocabulary(),
        imported.load(export(tmp_path, task, model, tokenizer=how)),
    )
    assert after.encode(TEXT) == before.encode(TEXT)
    assert after.decode(after.encode(TEXT)) == TEXT
    assert (after.size, after.sentinel_ids) == (before.size, before.sentinel_ids)
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (ids["eos_token_id"], ids["pad_token_id"]) == (before.eos_id, before.pad_id)
    assert ids.get("decoder_start_token_id") == (0 if model.encoder else None)


def test_a_unigram_model_says_why_it_has_no_exact_one(tmp_path, capsys):
    out = export(tmp_path, trained(tmp_path / "data"))
    said = capsys.readouterr().out
    assert "no tokenizer is written: sentencepiece adds" in said
    assert "--tokenizer nearest" in said
    assert (out / "model.safetensors").exists()
    assert not [*out.glob("*token*"), *out.glob("generation*")]


def test_another_vocabulary_than_the_runs_is_refused(tmp_path):
    task = trained(tmp_path / "data", model_type="bpe")
    write_run(tmp_path / "run", of(Bytes(7), tmp_path).load_vocabulary())
    with pytest.raises(UserError, match="vocabulary: bytes-7"):
        export(tmp_path, task)
    assert not (tmp_path / "out").exists()


def test_weights_go_out_without_a_vocabulary_that_is_gone(tmp_path, capsys):
    task = trained(tmp_path / "data", model_type="bpe")
    write_run(tmp_path / "run", task.load_vocabulary())
    (task.folder / "tokenizer.model").unlink()
    again = of(task.vocabulary, tmp_path / "data")
    assert (export(tmp_path, again) / "model.safetensors").exists()
    assert "no tokenizer is written: " in capsys.readouterr().out


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be exact or nearest"):
        to_hf(MODEL, str(tmp_path), str(tmp_path / "out"), tokenizer="near")


# --- imported ------------------------------------------------------------------------------------


def test_an_imported_tokenizer_goes_out_for_a_model_of_another_type(tmp_path):
    """Its class would be taken from the model's type: it is named, and tokenizer.json made."""
    for kind in ("gpt2_merges", "bert_words", "llama3"):
        folder = tmp_path / kind
        published.KINDS[kind](folder / "source")
        config = json.loads((folder / "source" / "config.json").read_text())
        published.write(folder / "source", "config.json", config | {"model_type": "gpt2x"})
        if kind == "gpt2_merges":
            said = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "x"}
            published.write(folder / "source", "tokenizer_config.json", said)
        task = of(Imported(str(folder / "source")), folder)
        before, after = task.load_vocabulary(), imported.load(export(folder, task))
        assert (folder / "out" / "tokenizer.json").exists()
        config = json.loads((folder / "out" / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (config.get("chat_template") == "x") == (kind == "gpt2_merges")
        for text in published.DIFFICULT + published.SPECIAL:
            assert after.encode(text) == before.encode(text)
        for role in ("pad", "eos", "bos", "unk", "cls", "sep", "mask"):
            assert getattr(after, f"{role}_id") == getattr(before, f"{role}_id"), (kind, role)
        assert after.prefix_ids == before.prefix_ids


def test_files_of_the_same_type_go_out_as_they_are(tmp_path):
    published.KINDS["llama_pieces"](tmp_path / "source")
    task = of(Imported(str(tmp_path / "source")), tmp_path)
    out = export(tmp_path, task)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert imported.load(out).encode(TEXT) == task.load_vocabulary().encode(TEXT)


@pytest.mark.parametrize("kind", ["t5_pieces", "byt5"])
def test_files_whose_meaning_the_models_type_decides_stay_behind(tmp_path, kind, capsys):
    published.KINDS[kind](tmp_path / "source")
    out = export(tmp_path, of(Imported(str(tmp_path / "source")), tmp_path))
    assert "depends on the model's type, which is now llama" in capsys.readouterr().out
    assert not [*out.glob("*token*"), *out.glob("*.model")]


# --- sentencepiece models that others trained ----------------------------------------------------


def given(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(published.LINES), model_writer=model, minloglevel=2, num_threads=1,
        hard_vocab_limit=False, vocab_size=400, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    config = SentencePiece(vocab_size=size, extra_ids=0, path=str(path))
    return load_vocabulary(config, path.parent)


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False,
         "add_dummy_prefix": False, "model_type": "bpe"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises the text"),
        ({"remove_extra_whitespaces": True}, "adds or removes spaces"),
        ({"add_dummy_prefix": True}, "adds or removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "adds or removes spaces"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined symbols of several characters"),
    ],
)
def test_what_the_library_would_read_otherwise_stays_behind(tmp_path, changes, why):
    exported.make(given(tmp_path / "a.model", **PLAIN), "decoder-only")
    vocabulary = given(tmp_path / "b.model", **PLAIN | changes)
    with pytest.raises(exported.UnlikeError, match=why):
        exported.make(vocabulary, "decoder-only")


def test_a_merge_that_is_missing_is_noticed(tmp_path, monkeypatch):
    vocabulary = given(tmp_path / "a.model", **PLAIN)
    merges = exported.Pieces.merges
    monkeypatch.setattr(exported.Pieces, "merges", lambda self: merges(self)[1:])
    with pytest.raises(exported.UnlikeError, match=r"it would cut .* differently"):
        exported.make(vocabulary, "decoder-only")


# --- through the command -------------------------------------------------------------------------


def test_the_command_finds_the_vocabulary_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = trained(tmp_path / "data", model_type="bpe")
    write_run(tmp_path / "run", task.load_vocabulary())
    (tmp_path / "run" / "config.gin").write_text(
        "include 'gin_configs/runs/verbs.gin'\n"
        "include 'gin_configs/tasks/causal_lm.gin'\n"
        "include 'gin_configs/models/llama/tiny.gin'\n"
        "VOCAB_SIZE = 320\nCORPUS = 'tiny'\nTEXT = 'text.txt'\n"
        "vocabularies.SentencePiece.extra_ids = 10\n"
        "vocabularies.SentencePiece.model_type = 'bpe'\n"
        "llama.llama.vocab_size = 500\n"
        + "".join(f"llama.llama.{name} = {value}\n" for name, value in SHAPE.items())
    )
    try:
        assert cli.main(["convert", "to-hf", "run", "out"]) == 0
    finally:
        gin.clear_config()
    assert imported.load(tmp_path / "out").encode(TEXT) == task.load_vocabulary().encode(TEXT)
    assert "no tokenizer" not in capsys.readouterr().out
