import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite import checkpoint, folders
from t5x_lite.checkpoint import Checkpointer
from t5x_lite.errors import UserError
from t5x_lite.tensors import digest, flatten

BIG = (640, 512)  # more bytes than get a CRC, so that only the digest can tell


def sharding(devices, *spec):
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("fsdp",)), PartitionSpec(*spec))


def make_tree(seed=0, devices=8):
    rows, whole = sharding(devices, "fsdp"), sharding(devices)
    keys = jax.random.split(jax.random.key(seed), 3)
    put = jax.device_put
    return {
        "params": {
            "layers": {"kernel": put(jax.random.normal(keys[0], (16, 12)), rows)},
            "scale": put(jax.random.normal(keys[1], (24,), jnp.bfloat16), whole),
        },
        "opt_state": {
            "mu": put(jax.random.normal(keys[2], (16, 12)), sharding(devices, None, None)),
            "mask": put(jnp.arange(8) % 3 == seed % 3, rows),
        },
        "ema": {},
        "step": put(jnp.asarray(seed, jnp.int32), whole),
    }


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same_bits(got, want):
    got, want = flatten(got), flatten(want)
    assert list(got) == list(want)
    for path, x in want.items():
        assert got[path].dtype == x.dtype, path
        assert got[path].sharding == x.sharding, path
        assert np.asarray(got[path]).tobytes() == np.asarray(x).tobytes(), path


def write(directory, trees, **options):
    """Checkpoints 10, 20, … of the trees."""
    with Checkpointer(directory, **options) as checkpointer:
        for i, tree in enumerate(trees, start=1):
            checkpointer.save(10 * i, tree, {"i": i})
            checkpointer.wait()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    write(directory, [make_tree(1), make_tree(2)])
    return directory


@pytest.fixture
def copy(two, tmp_path):
    return shutil.copytree(two, tmp_path / "checkpoints")


def reading(directory, lines=None):
    return Checkpointer(
        directory, read_only=True, report=(lines if lines is not None else []).append
    )


def test_restores_every_bit_sharding_and_the_meta(tmp_path):
    tree, meta = make_tree(), {"data": {"cursor": 12345678901, "rate": 0.1}, "text": "ü\n"}
    with Checkpointer(tmp_path / "a" / "checkpoints") as checkpointer:
        assert checkpointer.restore(like(tree)) is None
        assert checkpointer.read_meta() is None
        checkpointer.save(3, tree, meta)
        checkpointer.wait()
        restored = checkpointer.restore(like(tree))
        assert checkpointer.read_meta() == meta
    assert (restored.step, restored.meta) == (3, meta)
    assert restored.tree["ema"] == {}
    assert_same_bits(restored.tree, tree)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (8, 4)])
def test_restores_onto_another_mesh(tmp_path, before, after):
    saved, wanted = make_tree(5, before), make_tree(5, after)
    write(tmp_path, [saved])
    restored = reading(tmp_path).restore(like(wanted)).tree
    assert_same_bits(restored, wanted)
    assert digest(restored) == digest(saved)


def test_restored_arrays_may_be_donated(two):
    # Device buffers on a CPU may alias the host memory that was read, for all devices at once.
    restored = reading(two).restore(like(make_tree(2))).tree["params"]
    bumped = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(restored)
    want = jax.tree.map(lambda x: x + 1, make_tree(2)["params"])
    assert_same_bits(bumped, want)


def test_the_state_may_be_donated_right_after_save(tmp_path):
    @jax.jit
    def fresh(seed):
        return {"x": jax.random.normal(jax.random.key(seed), BIG), "n": jnp.full((3,), seed)}

    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)
    with Checkpointer(tmp_path, keep_last=9) as checkpointer:
        for seed in range(1, 7):
            tree = fresh(seed)
            checkpointer.save(seed, tree, {})
            for _ in range(5):
                tree = overwrite(tree)
            jax.block_until_ready(tree)
    for seed in range(1, 7):
        assert_same_bits(reading(tmp_path).restore(like(fresh(1)), seed).tree, fresh(seed))


# Damage. Whatever happens to one file, what is restored is what was saved.


def all_files(step_folder):
    return sorted(str(p.relative_to(step_folder)) for p in step_folder.rglob("*") if p.is_file())


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damage_to_any_file_is_reported_and_the_one_before_used(two, tmp_path, harm, capfd):
    names = all_files(two / "20")
    assert len(names) > 10
    for i, name in enumerate(names):
        if harm is not Path.unlink and name in folders.COMMIT_MARKERS:
            continue  # nothing reads what these hold
        directory = shutil.copytree(two, tmp_path / str(i))
        harm(directory / "20" / name)
        before, lines = all_files(directory / "20"), []
        restored = reading(directory, lines).restore(like(make_tree(1)))
        assert restored.step == 10, name
        assert_same_bits(restored.tree, make_tree(1))
        assert len(lines) == 1
        assert "\n" not in lines[0]
        assert str(directory / "20") in lines[0]
        assert name in lines[0]
        assert all_files(directory / "20") == before
        assert reading(directory).read_meta() == {"i": 1}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("at", [0.1, 0.4, 0.7, 0.95])
def test_a_flipped_bit_in_a_large_tensor_is_found(tmp_path, at, capfd):
    trees = [{"a": jax.random.normal(jax.random.key(i), BIG), "b": jnp.ones(4)} for i in (1, 2)]
    write(tmp_path, trees)
    largest = max((tmp_path / "20").rglob("*"), key=lambda p: p.stat().st_size)
    assert largest.stat().st_size > folders.SUMMED_BYTES
    assert reading(tmp_path).restore(like(trees[0])).step == 20  # and nothing of this is kept
    flip(largest, at)
    lines = []
    restored = reading(tmp_path, lines).restore(like(trees[0]))
    assert restored.step == 10
    assert_same_bits(restored.tree, trees[0])
    assert re.search(r"20: a (is not what was saved|cannot be read in state/)", lines[0])
    assert capfd.readouterr() == ("", "")


def test_a_digest_that_differs_is_found_on_its_own(copy, monkeypatch):
    monkeypatch.setattr(checkpoint, "digest", lambda tree: {**digest(tree), "step": 0})
    with pytest.raises(UserError, match="step is not what was saved"):
        reading(copy).restore(like(make_tree(2)), 20)


def test_an_empty_step_folder_and_a_stray_file_are_passed_over(copy):
    (copy / "30").mkdir()
    (copy / "40").write_text("")
    lines = []
    assert reading(copy, lines).restore(like(make_tree(2))).step == 20
    assert len(lines) == 1
    assert "30: _CHECKPOINT_METADATA is missing" in lines[0]
    assert reading(copy).all_steps() == [10, 20]


def test_a_changed_dtype_in_the_store_is_found(tmp_path, monkeypatch):
    tree = {"x": jnp.arange(6, dtype=jnp.int32)}
    wanted = {"x": jax.ShapeDtypeStruct((6,), jnp.float32)}
    # The same bits under another dtype have the same digest; only the store tells.
    claimed = {"dtype": "float32", "shape": [6]}
    monkeypatch.setattr(checkpoint, "signature", lambda leaf: claimed)
    write(tmp_path, [tree])
    with pytest.raises(UserError, match=r"x is stored as int32\[6\], saved as float32\[6\]"):
        reading(tmp_path).restore(wanted)


def test_a_checkpoint_of_other_tensors_is_named_and_the_one_before_used(tmp_path):
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(2), "c": jnp.ones(2)}
    other = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3), "d": jnp.ones(2)}
    write(tmp_path, [tree, other])
    lines = []
    assert reading(tmp_path, lines).restore(like(tree)).step == 10
    for part in (
        "a is bfloat16[2, 3] in the checkpoint and float32[2, 3] in the model",
        "b is float32[3] in the checkpoint and float32[2] in the model",
        "c is only in the model",
        "d is only in the checkpoint",
    ):
        assert part in lines[0]


def test_no_good_checkpoint_is_an_error_that_lists_why(copy):
    cut(copy / "10" / "state" / "manifest.ocdbt")
    (copy / "20" / "commit_success.txt").unlink()
    lines = []
    with pytest.raises(UserError) as caught:
        reading(copy, lines).restore(like(make_tree(1)))
    message = str(caught.value)
    assert "step 20: commit_success.txt is missing" in message
    assert re.search(r"step 10: state/manifest.ocdbt has \d+ bytes instead of \d+", message)
    assert "\n" not in message
    assert lines == []
    with pytest.raises(UserError, match="no usable checkpoint"):
        reading(copy).read_meta()


def test_a_newer_format_is_refused(copy):
    path = copy / "20" / folders.RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": checkpoint.FORMAT + 1}))
    (copy / "20" / folders.FILES).unlink()
    folders.list_files(copy / "20")
    with pytest.raises(UserError, match="has format 2, this version reads up to 1: update"):
        reading(copy).restore(like(make_tree(1)))


def test_one_step_may_be_named(copy):
    assert reading(copy).restore(like(make_tree(1)), 10).step == 10
    assert reading(copy).read_meta(10) == {"i": 1}
    with pytest.raises(UserError, match=r"no checkpoint of step 15 in .*; there are \[10, 20\]"):
        reading(copy).restore(like(make_tree(1)), 15)
    flip(copy / "20" / "state" / "_METADATA")
    with pytest.raises(UserError, match="step 20: state/_METADATA is not what was saved"):
        reading(copy).restore(like(make_tree(1)), 20)


def test_a_part_may_be_restored(two):
    part = {"params": like(make_tree(2))["params"]}
    assert_same_bits(
        reading(two).restore(part, partial=True).tree, {"params": make_tree(2)["params"]}
    )
    with pytest.raises(UserError, match="opt_state/mask is only in the checkpoint"):
        reading(two).restore(part)
    with pytest.raises(UserError, match="params/new is only in the model"):
        reading(two).restore({"params": {"new": part["params"]["scale"]}}, partial=True)


# Saving.


@pytest.mark.parametrize(("keep_last", "keep_every"), [(1, None), (3, None), (2, 30)])
def test_keeps_the_last_n_and_every_kth(tmp_path, keep_last, keep_every):
    steps = [10 * i for i in range(1, 9)]
    write(tmp_path, [{"x": jnp.ones(2)}] * 8, keep_last=keep_last, keep_every=keep_every)
    kept = {s for s in steps if keep_every and s % keep_every == 0} | set(steps[-keep_last:])
    assert reading(tmp_path).all_steps() == sorted(kept)


def test_a_later_save_sets_bad_folders_aside_and_counts_only_good_ones(copy):
    cut(copy / "20" / "meta" / "metadata")
    (copy / "30").mkdir()
    write(copy.parent / "other", [{"x": jnp.ones(1)}])
    shutil.copytree(copy.parent / "other" / "10", copy / "40")  # whole, but of another model
    held, lines = all_files(copy / "20"), []
    with Checkpointer(copy, keep_last=2, report=lines.append) as checkpointer:
        assert checkpointer.restore(like(make_tree(1))).step == 10
        assert sorted(p.name for p in copy.iterdir()) == ["10", "20", "30", "40"]  # left alone
        checkpointer.save(30, make_tree(5), {})
        checkpointer.save(40, make_tree(7), {})
    assert sorted(p.name for p in copy.iterdir()) == ["20.bad", "30", "30.bad", "40", "40.bad"]
    assert all_files(copy / "20.bad") == held
    assert sorted(line for line in lines if "set aside" in line) == [
        f"checkpoint {copy / str(step)}: set aside as {step}.bad" for step in (20, 30, 40)
    ]
    assert_same_bits(reading(copy).restore(like(make_tree(7))).tree, make_tree(7))


def test_a_bad_folder_below_the_saved_step_is_set_aside_too(copy):
    flip(copy / "20" / "state" / "_METADATA")
    shutil.copytree(copy / "20", copy / "20.bad")  # of an earlier time
    with Checkpointer(copy, keep_last=2) as checkpointer:
        checkpointer.restore(like(make_tree(1)))
        checkpointer.save(30, make_tree(7), {})
    assert sorted(p.name for p in copy.iterdir()) == ["10", "20.bad", "20.bad.2", "30"]


def test_going_on_from_an_older_step_supersedes_the_newer(copy):
    with Checkpointer(copy) as checkpointer:
        checkpointer.restore(like(make_tree(1)), 10)
        checkpointer.save(10, make_tree(1), {"again": True})  # restored: nothing to save
        checkpointer.save(20, make_tree(8), {})
        checkpointer.save(20, make_tree(9), {})  # saved: nothing to save
    assert sorted(p.name for p in copy.iterdir()) == ["10", "20", "20.superseded"]
    assert reading(copy).read_meta(10) == {"i": 1}
    assert_same_bits(reading(copy).restore(like(make_tree(8))).tree, make_tree(8))


def test_a_kill_just_before_the_commit_leaves_the_one_before(tmp_path):
    script = f"""
        import os, signal, jax.numpy as jnp
        from t5x_lite import folders
        from t5x_lite.checkpoint import Checkpointer
        checkpointer = Checkpointer({str(tmp_path)!r})
        checkpointer.save(1, {{"x": jnp.full(5, 1.0)}}, {{}})
        checkpointer.wait()
        folders.list_files = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        checkpointer.save(2, {{"x": jnp.full(5, 2.0)}}, {{}})
        checkpointer.wait()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2" + folders.TEMPORARY]
    tree = {"x": jnp.full(5, 1.0)}
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(like(tree))
        assert_same_bits(restored.tree, tree)
        checkpointer.save(2, tree, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(tmp_path, capfd, caplog):
    resource = pytest.importorskip("resource")  # a limit on file sizes stands in for the disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tree = {"x": jax.random.normal(jax.random.key(0), BIG)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": tree["x"] * 2}, {})
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpointer.save(2, tree, {})
            with pytest.raises(UserError, match=r"step 2 .*: File too large; free .*: \[1\]") as e:
                checkpointer.save(3, tree, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(e.value)
        assert_same_bits(checkpointer.restore(like(tree)).tree, {"x": tree["x"] * 2})
        checkpointer.save(2, tree, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert capfd.readouterr().err == ""
    assert caplog.records == []


def test_the_stored_names_are_the_paths(two):
    import orbax.checkpoint as ocp

    names = ["opt_state/mask", "opt_state/mu", "params/layers/kernel", "params/scale", "step"]
    with ocp.StandardCheckpointer() as plain:
        assert sorted(plain.metadata(two / "20" / "state").item_metadata) == names
        restored = plain.restore(two / "20" / "state", flatten(like(make_tree(2))))
    assert_same_bits(restored, flatten(make_tree(2)))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": 3}}, "a/b must be a jax array, not int"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, "two tensors have the name 'a/b'"),
        ({"a": jnp.ones((0, 2))}, "a is an empty array"),
    ],
)
def test_a_tree_that_cannot_be_named_is_refused(tmp_path, tree, message):
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises((TypeError, ValueError), match=message),
    ):
        checkpointer.save(1, tree, {})


def test_meta_that_json_lacks_is_refused_at_once(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="not JSON"):
        checkpointer.save(1, {"x": jnp.ones(1)}, {"bad": object()})


# Paths.


def test_paths_that_cannot_hold_checkpoints_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("")
    for path, message in [
        (file, "is not a directory"),
        (file / "below", "is not a directory"),
        (foreign, "is not a checkpoint directory: it holds 'notes.txt' and no step"),
        ("gs://bucket/run", "must be a local path"),
    ]:
        for read_only in (False, True):
            with pytest.raises(UserError, match=message):
                Checkpointer(path, read_only=read_only)
    assert [p.name for p in foreign.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a directory that root cannot write")
def test_a_directory_that_cannot_be_written_is_refused():
    with pytest.raises(UserError, match=r"/proc/checkpoints cannot be written: .*; give another"):
        Checkpointer("/proc/checkpoints")


def test_reading_creates_nothing(tmp_path):
    checkpointer = reading(tmp_path / "none")
    assert checkpointer.restore(like(make_tree())) is None
    assert checkpointer.all_steps() == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="read-only"):
        checkpointer.save(1, make_tree(), {})


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": 0}])
def test_keeping_nothing_is_refused(tmp_path, options):
    with pytest.raises(UserError, match=r"=0 must be at least 1"):
        Checkpointer(tmp_path, **options)


# Old formats.

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("number", range(1, checkpoint.FORMAT + 1))
@pytest.mark.parametrize("devices", [1, 8])
def test_every_format_keeps_loading(number, devices):
    made = runpy.run_path(str(GOLDEN / "make.py"))
    want = jax.device_put(made["tree"](), sharding(devices))
    lines = []
    restored = reading(GOLDEN / f"format_{number}", lines).restore(like(want))
    assert lines == []
    assert (restored.step, restored.meta) == (20, made["META"])
    assert_same_bits(restored.tree, want)
