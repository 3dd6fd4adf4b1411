"""The command as one process of several, keeping the pieces of batches that its devices got.

    python hosts.py PIECES_FILE train OPTIONS…

Used by test_hosts.py.
"""

import pickle
import sys

import numpy as np

from t5x_lite import cli
from t5x_lite.train import loop

KEPT = 3  # batches


def keep_pieces(path: str) -> None:
    """Writes {entry: [(index, values), …]} of the first batches' addressable shards."""
    on_mesh, kept = loop.on_mesh, []

    def keeping(*args):
        for number, batch in enumerate(on_mesh(*args), 1):
            if number <= KEPT:
                kept.append({name: pieces_of(x) for name, x in batch.items()})
            if number == KEPT:
                with open(path, "wb") as file:
                    pickle.dump(kept, file)
            yield batch

    loop.on_mesh = keeping


def pieces_of(x):
    return [(shard.index, np.asarray(shard.data)) for shard in x.addressable_shards]


if __name__ == "__main__":
    keep_pieces(sys.argv[1])
    sys.exit(cli.main(sys.argv[2:]))
