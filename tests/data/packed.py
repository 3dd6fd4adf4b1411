"""Rows of an objective over documents in memory, and what the model reads and writes in them."""

import dataclasses

from t5x_lite.data.rows import Rows
from t5x_lite.data.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary(100)
BOS, EOS = VOCABULARY.bos_id, VOCABULARY.eos_id


def rows_of(objective, store, length, vocabulary=VOCABULARY, seed=0):
    """`Rows`, as a task makes them."""
    sides = objective.sides(length)
    return Rows(
        lambda: objective.examples(store, vocabulary, sides),
        sides=sides,
        shapes=objective.shapes(sides),
        packing=objective.packing,
        name="memory",
        seed=seed,
    )


@dataclasses.dataclass
class Read:
    """One segment of a row."""

    inputs: list  # what is given, without begin and end marks
    targets: list  # what bears loss


def by_example(rows, epoch=0):
    """{example: its segments as `Read`} of an epoch; each row is checked against its shapes."""
    found = {}
    for number in range(rows.count(epoch)):
        row = rows.row(epoch, number)
        assert {name: (a.shape, a.dtype) for name, a in row.items()} == rows.shapes
        members = rows.plan(epoch).members(number)
        reads = read_segments(row)
        reads = [reads] if len(members) == 1 else [[read] for read in reads]
        for example, its in zip(members, reads, strict=True):
            assert example not in found
            found[example] = its
    return found


def read_segments(row):
    """A row's segments, in order."""
    return [_read(row, number) for number in range(1, int(row["segments"].max()) + 1)]


def _read(row, number):
    mine = row["segments"] == number
    targets, weights = row["targets"][mine], row["weights"][mine]
    positions = row["positions"][mine].tolist()
    assert positions == list(range(len(positions)))
    if "encoder_tokens" in row:
        inputs = row["encoder_tokens"][row["encoder_segments"] == number]
        assert inputs[-1] == EOS
        assert row["tokens"][mine].tolist() == [0, *targets[:-1]]
        return Read(inputs[:-1].tolist(), targets[weights > 0].tolist())
    if "prefix" not in row:
        return Read([], targets[weights > 0].tolist())
    tokens, prefix = row["tokens"][mine], row["prefix"][mine]
    given = int(prefix.sum())
    assert prefix[:given].all()
    assert not weights[: given - 1].any()
    return Read(tokens[1:given].tolist(), targets[weights > 0].tolist())
