import itertools

import numpy as np
import pytest

from t5x_lite.data.streams import Documentwise, RoomyParts, Stream, Windows

ROWS = [[10, 11], [], [12], [13, 14, 15], []]


@pytest.mark.parametrize(("before", "after"), [((), ()), ((3,), (1,)), ((3, 4), ())])
def test_reading_anywhere_is_slicing_the_whole(in_memory, before, after):
    rows = [[*before, *row, *after] for row in ROWS]
    ids = list(itertools.chain(*rows))
    numbers = [number for number, row in enumerate(rows) for _ in row]
    stream = Stream(in_memory(ROWS), before, after)
    assert len(stream) == len(ids)
    for start, stop in itertools.product(range(len(ids) + 2), range(len(ids) + 3)):
        piece = stream.read(start, stop)
        np.testing.assert_array_equal(piece.ids, ids[start:stop])
        np.testing.assert_array_equal(piece.documents, numbers[start:stop])


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("frame", [((), ()), ((3,), (1,))])
@pytest.mark.parametrize(
    "cut",
    [
        lambda stream, overlap: Windows(stream, 4, overlap),
        lambda stream, overlap: Documentwise(stream, 4, overlap),
        lambda stream, overlap: RoomyParts(stream, 4, overlap, room=1),
    ],
    ids=["windows", "documents", "roomy"],
)
def test_pieces_hold_everything_once_and_have_their_sizes(in_memory, cut, frame, overlap):
    rows = [[10, 11], [], [12, 13, 14, 15, 16, 17, 18, 19, 20], [21], [22, 23, 24, 25]]
    stream = Stream(in_memory(rows), *frame)
    pieces = cut(stream, overlap)
    held = [pieces.read(index) for index in range(len(pieces))]
    assert [len(piece.ids) - overlap for piece in held] == pieces.sizes().tolist()
    whole = [[*frame[0], *row, *frame[1]] for row in rows]
    if isinstance(pieces, Windows):
        expected = list(itertools.chain(*whole))
        expected = expected[: len(expected) - overlap]
    else:
        expected = list(itertools.chain(*(row[: len(row) - overlap] for row in whole)))
        assert all(len(set(piece.documents)) == 1 for piece in held)
        # Only what is longer than a row is cut.
        numbers = [piece.documents[0] for piece in held]
        long = [n for n, row in enumerate(whole) if len(row) - overlap > 4]
        assert {n for n in numbers if numbers.count(n) > 1} == set(long)
    found = [piece.ids[: len(piece.ids) - overlap] for piece in held]
    np.testing.assert_array_equal(np.concatenate(found), expected)
