import itertools

import numpy as np
import pytest

from t5x_lite.data import flat
from t5x_lite.data.flat import BLOCK, DamagedError, Flat, join

COUNT = 3 * BLOCK // 2 + 77  # of two bytes: four blocks, the last one not full


@pytest.fixture
def stored(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, COUNT).astype(np.uint16)
    cuts = [0, 5, BLOCK, BLOCK, COUNT]
    parts = []
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        parts.append(tmp_path / f"{number}.part")
        parts[-1].write_bytes(values[a:b].tobytes())
    join(parts, tmp_path / "ids")
    return tmp_path / "ids", values


def test_any_slice_is_that_of_the_whole(stored):
    path, values = stored
    read = Flat(path, np.dtype(np.uint16), COUNT)
    assert len(read) == COUNT
    edge = BLOCK // 2
    for a, b in [(0, 0), (0, 1), (edge - 1, edge + 1), (7, COUNT), (COUNT - 1, COUNT)]:
        np.testing.assert_array_equal(read.read(a, b), values[a:b])


def test_every_flipped_bit_is_seen_in_its_block_and_in_no_other(stored):
    path, values = stored
    file = path.with_suffix(".bin")
    whole = file.read_bytes()
    for place in (0, BLOCK, len(whole) - 1):
        broken = bytearray(whole)
        broken[place] ^= 1
        file.write_bytes(broken)
        read = Flat(path, np.dtype(np.uint16), COUNT)
        with pytest.raises(DamagedError, match=rf"changed near byte {place // BLOCK * BLOCK}"):
            read.read(place // 2, place // 2 + 1)
        fine = (place // BLOCK + 1) % 4 * BLOCK // 2
        assert read.read(fine, fine + 3).tolist() == values[fine : fine + 3].tolist()


def test_a_block_is_checked_once(stored, monkeypatch):
    read, calls = Flat(stored[0], np.dtype(np.uint16), COUNT), []
    real = flat.zlib.crc32
    monkeypatch.setattr(flat.zlib, "crc32", lambda x: calls.append(0) or real(x))
    for _ in range(3):
        read.read(1, BLOCK // 2 + 1)
    assert len(calls) == 2


@pytest.mark.parametrize("length", [COUNT - 1, COUNT + 1])
def test_a_file_of_another_length_is_refused(stored, length):
    with pytest.raises(DamagedError, match=f"has {2 * COUNT} bytes of {2 * length}"):
        Flat(stored[0], np.dtype(np.uint16), length)


def test_nothing_at_all_can_be_stored(tmp_path):
    join([], tmp_path / "none")
    assert Flat(tmp_path / "none", np.dtype(np.uint16), 0).read(0, 0).tolist() == []
    with pytest.raises(DamagedError):
        Flat(tmp_path / "missing", np.dtype(np.uint16), 0)
