"""The verbs of conversion: there and back, training on, and every kind of broken source."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5x_lite import cli
from t5x_lite.checkpoint import Checkpointer
from t5x_lite.errors import UserError
from t5x_lite.hub.convert import from_hf, to_hf
from t5x_lite.tensors import flatten
from t5x_lite.train import loop
from t5x_lite.train.restore import restore_params

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden"
SPEC = importlib.util.spec_from_file_location("resumable", HERE.parent / "train" / "resumable.py")
resumable = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(resumable)


@pytest.fixture
def source(tmp_path):
    """A published Llama to break."""
    return pathlib.Path(shutil.copytree(GOLDEN / "llama", tmp_path / "source"))


def edit_config(source, **changes):
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(source, change):
    path = source / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(source):
    """Splits the tensors over two files."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in tensors if files[n] == file}, source / file)
    index = {"weight_map": files}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def only_a_pickle(source):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def truncate(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(source):
    path = source / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def lose_a_shard(source):
    shard(source)
    (source / "part-1.safetensors").unlink()


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "no config": (lambda s: (s / "config.json").unlink(), "config.json cannot be read"),
    "not JSON": (lambda s: (s / "config.json").write_text("{"), "config.json isn't JSON"),
    "unknown family": (
        lambda s: edit_config(s, model_type="mamba"),
        "model_type 'mamba' is unknown",
    ),
    "unknown field": (lambda s: edit_config(s, hyper=3), "doesn't know: hyper=3"),
    "unknown value": (lambda s: edit_config(s, hidden_act="relu"), "hidden_act='relu'"),
    "unknown scaling": (
        lambda s: edit_config(s, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "'spiral'",
    ),
    "missing field": (lambda s: edit_config(s, hidden_size=None), "no 'hidden_size'"),
    "sizes that don't divide": (
        lambda s: edit_config(s, num_key_value_heads=3),
        "heads=4 must be a multiple of kv_heads=3",
    ),
    "missing tensor": (lambda s: edit_tensors(s, lambda t: t.pop(UP)), UP),
    "unused tensor": (
        lambda s: edit_tensors(s, lambda t: t.update(more=t[UP])),
        "more. config.json",
    ),
    "other shape": (
        lambda s: edit_tensors(s, lambda t: t.update({UP: t[UP][:-1].copy()})),
        f"{UP} in ",
    ),
    "other dtype": (
        lambda s: edit_tensors(s, lambda t: t.update({UP: t[UP].astype(np.int8)})),
        "is int8; weights must be float32",
    ),
    "truncated": (truncate, "model.safetensors is truncated or corrupt"),
    "corrupt": (corrupt_header, "model.safetensors is truncated or corrupt"),
    "lost shard": (lose_a_shard, "lacks part-1.safetensors, which holds"),
    "pickle": (only_a_pickle, "pytorch_model.bin, which is a pickle and could run code"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "has neither model.safetensors"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_source_is_one_line_and_leaves_nothing(source, tmp_path, kind, capsys):
    change, message = BROKEN[kind]
    change(source)
    assert cli.main(["convert", "from-hf", str(source), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_there_is_left_alone(source, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    for verb in ("from-hf", "to-hf"):
        given = str(source)
        if verb == "to-hf":
            given = str(tmp_path / "converted")
            from_hf(str(source), given)
        assert cli.main(["convert", verb, given, str(tmp_path / "run")]) == 2
        assert "is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", [".", "../nowhere/", "/nowhere", "a/b/c"])
def test_a_source_that_is_no_folder_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        from_hf(name, str(tmp_path / "run"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_of_any_float_dtype_come_back_bit_for_bit(source, tmp_path, dtype):
    import ml_dtypes

    kinds = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
    of = {UP: np.dtype(np.float32)}  # one stays apart, as a router's bias does
    edit_tensors(
        source, lambda t: t.update({n: v.astype(of.get(n, kinds[dtype])) for n, v in t.items()})
    )
    edit_config(source, dtype=dtype)
    before = load_file(source / "model.safetensors")
    shard(source)
    assert cli.main(["convert", "from-hf", str(source), str(tmp_path / "run")]) == 0
    assert cli.main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype == of.get(name, kinds[dtype])
        assert after[name].tobytes() == value.tobytes()


def test_large_models_are_written_in_shards(source, tmp_path, monkeypatch):
    monkeypatch.setattr("t5x_lite.hub.convert.SHARD_BYTES", 1500)
    model = from_hf(str(source), str(tmp_path / "run"))
    to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before, files = load_file(source / "model.safetensors"), set(index["weight_map"].values())
    assert len(files) > 2
    assert set(index["weight_map"]) == set(before)
    for file in files:
        for name, value in load_file(tmp_path / "out" / file).items():
            assert index["weight_map"][name] == file
            np.testing.assert_array_equal(value, before[name])
    again = from_hf(str(tmp_path / "out"), str(tmp_path / "again"))
    assert again == model


def write_pretraining(source, dtype=np.float32):
    """BERT as pretrained, with a pooler and a next-sentence head; gives its tensors."""
    shutil.copytree(GOLDEN / "bert", source)
    rng = np.random.default_rng(0)

    def change(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(dtype)
        width = tensors["bert.embeddings.word_embeddings.weight"].shape[1]
        for name, outputs in (("bert.pooler.dense", width), ("cls.seq_relationship", 2)):
            tensors[f"{name}.weight"] = rng.standard_normal((outputs, width)).astype(dtype)
            # Of a dtype of its own, and with bits that no other one holds.
            tensors[f"{name}.bias"] = rng.standard_normal(outputs).astype(np.float64)
        # What older versions stored besides: copies of tied tensors, and a buffer.
        tied = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}
        tensors |= {f"cls.predictions.decoder.{n}": tensors[o].copy() for n, o in tied.items()}
        tensors["bert.embeddings.position_ids"] = np.arange(20)[None]

    edit_tensors(source, change)
    edit_config(source, architectures=["BertForMaskedLM"])  # as bert-base-uncased's
    return load_file(source / "model.safetensors")


COPIES = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
BUFFER = {"bert.embeddings.position_ids"}


def all_tensors(folder):
    """Of all shards; each is where the index says."""
    tensors = {f: load_file(f) for f in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
        assert places == {name: f.name for f, held in tensors.items() for name in held}
    return {name: value for held in tensors.values() for name, value in held.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_heads_that_are_not_read_come_back_bit_for_bit(tmp_path, monkeypatch, shards, dtype):
    before = write_pretraining(tmp_path / "source", dtype)
    if shards:
        shard(tmp_path / "source")
        monkeypatch.setattr("t5x_lite.hub.convert.SHARD_BYTES", 200)
    model = from_hf(str(tmp_path / "source"), str(tmp_path / "run"))
    to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"))
    after = all_tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > (20 if shards else 0)
    assert set(before) - set(after) == COPIES | BUFFER
    assert not set(after) - set(before)
    for name, value in after.items():
        assert value.dtype == before[name].dtype, name
        assert value.tobytes() == before[name].tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    # An export is a source as good as the first one.
    from_hf(str(tmp_path / "out"), str(tmp_path / "again"))
    to_hf(model, str(tmp_path / "again"), str(tmp_path / "out2"), dtype="bfloat16")
    again = all_tensors(tmp_path / "out2")
    assert set(again) == set(after)
    assert {value.dtype.name for value in again.values()} == {"bfloat16"}


def test_kept_tensors_are_written_in_shards_too(tmp_path, monkeypatch):
    write_pretraining(tmp_path / "source")
    files = []

    def save(tensors, path, metadata):
        files.append(list(tensors))
        save_file(tensors, path, metadata)

    monkeypatch.setattr("t5x_lite.hub.convert.SHARD_BYTES", 1)
    monkeypatch.setattr("safetensors.numpy.save_file", save)
    from_hf(str(tmp_path / "source"), str(tmp_path / "run"))
    assert sorted(files) == [[f"{n}.{p}"] for n in ("bert.pooler.dense", "cls.seq_relationship")
                             for p in ("bias", "weight")]  # fmt: skip


def test_a_head_stored_twice_is_refused(tmp_path):
    write_pretraining(tmp_path / "source")

    def change(tensors):
        tensors["pooler.dense.bias"] = tensors["bert.pooler.dense.bias"] + 1

    edit_tensors(tmp_path / "source", change)
    with pytest.raises(UserError, match=r"tensors that the model doesn't: pooler\.dense\.bias"):
        from_hf(str(tmp_path / "source"), str(tmp_path / "run"))


def test_a_head_that_is_not_of_floats_is_refused(tmp_path):
    write_pretraining(tmp_path / "source")

    def change(tensors):
        tensors["bert.pooler.dense.weight"] = np.ones((8, 8), np.int8)

    edit_tensors(tmp_path / "source", change)
    with pytest.raises(UserError, match=r"bert\.pooler\.dense\.weight in .* is int8"):
        from_hf(str(tmp_path / "source"), str(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_was_published_of_another_model_is_refused(tmp_path):
    write_pretraining(tmp_path / "source")
    model = from_hf(str(tmp_path / "source"), str(tmp_path / "run"))
    path = tmp_path / "run" / "published" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 48}))
    message = r"published is of another model than the run's: vocab_size: 48 → 41\. .* away"
    with pytest.raises(UserError, match=message):
        to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    path.parent.rename(tmp_path / "elsewhere")
    to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"))
    names = set(all_tensors(tmp_path / "out"))
    assert not any("pooler" in name or "seq_relationship" in name for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]


def as_sentence_embedding(source):
    steps = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (source / "modules.json").write_text(json.dumps(steps))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_names_of_a_sentence_embedding_stay_as_published(tmp_path, prefix):
    before = write_pretraining(tmp_path / "source")
    before = {name.replace("bert.", prefix): value for name, value in before.items()}
    save_file(before, tmp_path / "source" / "model.safetensors")
    as_sentence_embedding(tmp_path / "source")
    model = from_hf(str(tmp_path / "source"), str(tmp_path / "run"))
    to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"))
    after = all_tensors(tmp_path / "out")
    missing = {"cls.predictions.decoder.weight", f"{prefix}embeddings.position_ids"}
    assert set(before) - set(after) == missing
    assert not set(after) - set(before)
    assert all(value.tobytes() == before[name].tobytes() for name, value in after.items())


def test_a_sentence_embedding_trained_here_has_all_that_its_class_has(tmp_path):
    shutil.copytree(GOLDEN / "bert-pooler", tmp_path / "source")
    as_sentence_embedding(tmp_path / "source")
    model = from_hf(str(tmp_path / "source"), str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "published")
    to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"))
    before, after = (all_tensors(tmp_path / folder) for folder in ("source", "out"))
    assert {name: v.shape for name, v in before.items()} == {n: v.shape for n, v in after.items()}
    for name, value in after.items():
        assert np.any(value) != name.startswith("pooler."), name


def test_a_config_that_names_no_class_goes_out_as_it_came(tmp_path):
    """As TinyBERT's, whose tensors are of more than one class."""
    write_pretraining(tmp_path / "source")
    edit_config(tmp_path / "source", architectures=None)
    model = from_hf(str(tmp_path / "source"), str(tmp_path / "run"))
    to_hf(model, str(tmp_path / "run"), str(tmp_path / "out"))
    before, after = (all_tensors(tmp_path / folder) for folder in ("source", "out"))
    assert set(before) - set(after) == {"cls.predictions.decoder.weight"} | BUFFER
    assert not set(after) - set(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps that keeps no average, exported and converted."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    arguments = resumable.arguments(folder / "data", folder / "run", "gpt2")
    arguments |= {"steps": 3, "microbatches": 1, "ema_decay": None, "eval_period": None}
    loop.train(**arguments)
    to_hf(arguments["model"], arguments["model_dir"], str(folder / "out"))
    from_hf(str(folder / "out"), str(folder / "converted"))
    return folder, arguments


def test_a_run_of_ones_own_goes_out_and_comes_back(trained):
    folder, arguments = trained
    before, _ = restore_params(arguments["model"], arguments["model_dir"])
    shape = resumable.SHAPES["gpt2"]
    model = resumable.PRESETS["gpt2"]("small", **shape)
    after, step = restore_params(model, str(folder / "converted"))
    assert step == 0
    for path, value in flatten(before).items():
        rows = shape["vocab_size"] if path == "embedder/embedding" else None  # not its padding
        np.testing.assert_array_equal(flatten(after)[path][:rows], value[:rows], err_msg=path)


def losses(model_dir):
    lines = (pathlib.Path(model_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["loss"] for row in rows if "loss" in row]


def test_training_begins_with_converted_parameters(trained, tmp_path):
    folder, arguments = trained
    # In the converted folder itself, and in one of its own; a run without them begins elsewhere.
    own = pathlib.Path(shutil.copytree(folder / "converted", tmp_path / "own"))
    runs = {own: {}, tmp_path / "new": {"init_from": str(folder / "converted")}, tmp_path / "x": {}}
    for model_dir, more in runs.items():
        loop.train(**arguments | {"model_dir": str(model_dir), "steps": 2, **more})
    assert losses(own) == losses(tmp_path / "new")
    assert losses(tmp_path / "x")[0] > losses(own)[0] + 0.01
    with Checkpointer(own / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [0, 2]
    # Resumed, it goes on from its own checkpoint.
    loop.train(**arguments | {"model_dir": str(own), "steps": 3})
    assert len(losses(own)) == 3


def test_the_command_needs_no_more_than_the_folder(trained, tmp_path):
    folder, _ = trained
    command = [sys.executable, "-m", "t5x_lite", "convert", "to-hf", "converted", "exported"]
    shutil.copytree(folder / "converted", tmp_path / "converted")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    a, b = (load_file(f / "model.safetensors") for f in (folder / "out", tmp_path / "exported"))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
