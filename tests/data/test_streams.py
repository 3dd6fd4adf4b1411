import itertools

import numpy as np
import pytest

from t5x_lite.data.streams import Stream

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
