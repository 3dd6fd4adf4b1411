"""Records in memory as a token store has them, and what makes such records."""

import json

import numpy as np

from tests.data.packed import VOCABULARY

CONTEXT = "Tom, Tom, the piper's son, stole a pig 🙂 and away did run."
NAMES = ("red", "green", "blue")


class InMemory:
    """Tokenised records without a disk; as `TokenStore`."""

    def __init__(self, columns, rows):
        self._columns = columns
        self._rows = [
            tuple(
                np.array(value, np.int32 if dtype is None else dtype)
                for value, dtype in zip(row, columns.values(), strict=True)
            )
            for row in rows
        ]

    def lengths(self, column):
        place = list(self._columns).index(column)
        return np.array([len(row[place]) for row in self._rows], np.int64)

    def read(self, numbers):
        return [self._rows[number] for number in numbers]

    def column(self, name):
        raise NotImplementedError


def tokenised(objective, records, vocabulary=VOCABULARY):
    tokenizer = objective.tokenizer
    return InMemory(tokenizer.columns, tokenizer.tokenize(records, vocabulary))


def all_rows(rows):
    made = [rows.row(0, n) for n in range(rows.count())]
    for row in made:
        assert {name: (a.shape, a.dtype) for name, a in row.items()} == rows.shapes
    return made


def labelled(count=20, longest=30, pair=False, seed=0):
    rng = np.random.default_rng(seed)
    text = lambda: "".join(rng.choice([*"abc é🙂"], rng.integers(1, longest)))  # noqa: E731
    records = [{"text": text(), "label": str(rng.choice(NAMES))} for _ in range(count)]
    return [r | {"text_pair": text()} for r in records] if pair else records


def question(answer, begin=None, context=CONTEXT, ask="Who?"):
    begin = context.index(answer) if begin is None else begin
    answers = json.dumps({"text": [answer], "answer_start": [begin]})
    return {"question": ask, "context": context, "answers": answers}
