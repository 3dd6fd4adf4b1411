"""Text to text beside seqio's rows, and what all supervised objectives share."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from t5x_lite.data.objectives import Classification, ExtractiveQA, Regression, TextToText
from t5x_lite.data.objectives.base import measured_sizes
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes, ByteVocabulary
from t5x_lite.errors import UserError
from tests.data.packed import BOS, EOS, VOCABULARY, rows_of
from tests.data.tokenised import (
    CONTEXT,
    NAMES,
    InMemory,
    all_rows,
    labelled,
    question,
    tokenised,
)

SEQIO = json.loads(Path(__file__).with_name("golden").joinpath("seqio.json").read_text())
NO_NOISE = np.random.default_rng(0)

# --- text to text --------------------------------------------------------------------------------

PAIRS = {"inputs": None, "targets": None}
DECODER = TextToText(family="decoder-only")
FAMILIES = {
    "encoder-decoder": TextToText(targets_length=7),
    "causal": DECODER,
    "both_ways": dataclasses.replace(DECODER, inputs_see="both_ways"),
}
IDS = {
    "encoder_input_tokens": "encoder_tokens",
    "encoder_segment_ids": "encoder_segments",
    "encoder_positions": "encoder_positions",
    "decoder_input_tokens": "tokens",
    "decoder_target_tokens": "targets",
    "decoder_loss_weights": "weights",
    "decoder_segment_ids": "segments",
    "decoder_positions": "positions",
    "decoder_causal_attention": "prefix",
}


def of_seqio(converter, is_comparable):
    cases = [c for c in SEQIO["converters"] if c["converter"] == converter and is_comparable(c)]
    assert len(cases) >= 4
    return cases


def ends(example):
    """Ends with eos, or is so long that none is left."""
    return all(ids[-1] == EOS or len(ids) >= 10 for ids in example.values())


def store_of(case):
    rows = [[ids[:-1] if ids[-1] == EOS else ids for ids in e.values()] for e in case["examples"]]
    return InMemory(PAIRS, rows)


def with_ids(start_id, bos_id):
    vocabulary = ByteVocabulary(100)
    vocabulary.start_id, vocabulary.bos_id = start_id, bos_id
    return vocabulary


def seqio_rows(case):
    """Each row under the names of ours."""
    names = [name for name in IDS if name in case["outputs"]]
    count = len(case["outputs"][names[0]])
    return [{IDS[name]: case["outputs"][name][n] for name in names} for n in range(count)]


def assert_row(ours, expected):
    for name, values in expected.items():
        if name == "tokens":
            # Seqio begins the padding by its bos, and unpacked it leaves the last target there.
            values = np.where(ours["segments"] > 0, values, 0)
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@pytest.mark.parametrize(
    "case",
    of_seqio("EncDec", lambda c: all(map(ends, c["examples"]))),
    ids=lambda c: f"{c['lengths']}{c['arguments']}",
)
def test_an_encoder_decoders_rows_are_seqios(case):
    packing = "best_fit" if case["arguments"]["pack"] else "none"
    lengths = case["lengths"]
    objective = TextToText(targets_length=lengths["targets"], packing=packing)
    vocabulary = with_ids(case["arguments"].get("bos_id", 0), None)
    rows = rows_of(objective, store_of(case), lengths["inputs"], vocabulary)
    compare_with_seqio(rows, case)


@pytest.mark.parametrize(
    "case",
    of_seqio(
        "PrefixLM",
        lambda c: (
            all(map(ends, c["examples"])) and c["arguments"].get("loss_on_targets_only", True)
        ),
    ),
    ids=lambda c: f"{c['lengths']}{c['arguments']}",
)
@pytest.mark.parametrize("inputs_see", ["both_ways", "causal"])
def test_a_decoders_rows_are_seqios_prefix_lm(case, inputs_see):
    packing = "best_fit" if case["arguments"]["pack"] else "none"
    lengths = case["lengths"]
    objective = TextToText(
        targets_length=lengths["targets"],
        inputs_see=inputs_see,
        end_inputs=True,
        family="decoder-only",
        packing=packing,
    )
    rows = rows_of(objective, store_of(case), sum(lengths.values()), with_ids(0, None))
    compare_with_seqio(rows, case, {"prefix"} if inputs_see == "causal" else set())


def compare_with_seqio(rows, case, without=frozenset()):
    """Every example's segment; and every row that holds the same ones, as seqio packs in order."""
    ours = {}
    for number in range(rows.count()):
        row, members = rows.row(0, number), rows.plan(0).members(number)
        ours |= {example: (row, place) for place, example in enumerate(members, 1)}
        if members in case["rows"]:
            theirs = seqio_rows(case)[case["rows"].index(members)]
            assert_row(row, {name: v for name, v in theirs.items() if name not in without})
    assert len(ours) == len(case["examples"])
    for members, theirs in zip(case["rows"], seqio_rows(case), strict=True):
        for place, example in enumerate(members, 1):
            row, number = ours[example]
            for name in set(theirs) - without - {"segments", "encoder_segments"}:
                side = "encoder_segments" if name.startswith("encoder") else "segments"
                mine = row[name][row[side] == number].tolist()
                # Unpacked rows have no segments of seqio's.
                begin = theirs[side].index(place) if side in theirs else 0
                assert mine == theirs[name][begin : begin + len(mine)], name


def text_examples(count=60, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(3, 259, rng.integers(0, longest)).tolist() for _ in range(2)]
        for _ in range(count)
    ]


def read_pairs(row, objective):
    """(inputs, targets) of every segment, as the model reads and learns them."""
    pairs = []
    for number in range(1, int(row["segments"].max()) + 1):
        mine = row["segments"] == number
        targets = row["targets"][mine & (row["weights"] > 0)].tolist()
        if objective.family == "encoder-decoder":
            inputs = row["encoder_tokens"][row["encoder_segments"] == number].tolist()
            assert row["tokens"][mine].tolist() == [VOCABULARY.start_id, *targets[:-1]]
            assert (row["weights"][mine] == 1).all()
        else:
            inputs = row["targets"][mine & (row["weights"] == 0)].tolist()
            assert row["tokens"][mine].tolist() == [BOS, *inputs, *targets][:-1]
            assert row["targets"][mine].tolist() == inputs + targets
            if "prefix" in row:
                expected = [1] * (len(inputs) + 1) + [0] * (len(targets) - 1)
                assert row["prefix"][mine].tolist() == expected
        positions = row["positions"][mine].tolist()
        assert positions == list(range(len(positions)))
        pairs.append((inputs, targets))
    padding = row["segments"] == 0
    assert not any(row[name][padding].any() for name in ("tokens", "targets", "weights"))
    return pairs


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_example_is_in_one_row_and_whole_where_it_fits(family, packing):
    objective = dataclasses.replace(FAMILIES[family], packing=packing, targets_length=None)
    examples = text_examples()
    length = 64
    rows = rows_of(objective, InMemory(PAIRS, examples), length)
    found = [pair for row in all_rows(rows) for pair in read_pairs(row, objective)]
    end = [EOS] if family == "encoder-decoder" else []
    assert sorted(found) == sorted((i + end, [*t, EOS]) for i, t in examples)
    assert rows.note == ""
    assert (rows.count() < len(examples) / 1.5) == (packing == "best_fit")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [2, 8, 21])
def test_only_what_cannot_fit_is_trimmed_and_that_at_its_end(family, length):
    objective = dataclasses.replace(FAMILIES[family], packing="none", targets_length=None)
    examples = text_examples(longest=40)
    rows = rows_of(objective, InMemory(PAIRS, examples), length)
    trimmed = 0
    for row, (inputs, targets) in zip(all_rows(rows), examples, strict=True):
        wanted = inputs + ([EOS] if family == "encoder-decoder" else []), [*targets, EOS]
        ((seen, learnt),) = read_pairs(row, objective)
        assert (seen, learnt) == (wanted[0][: len(seen)], wanted[1][: len(learnt)])
        is_whole = (seen, learnt) == wanted
        trimmed += not is_whole
        assert learnt
        if is_whole:
            continue
        if family == "encoder-decoder":
            full = [(seen, wanted[0]), (learnt, wanted[1])]
            assert all(len(kept) == length or kept == whole for kept, whole in full)
        else:
            assert len(seen) + len(learnt) == length  # no room is left empty
            assert len(learnt) >= min(len(wanted[1]), length // 2)
            assert len(seen) >= min(len(wanted[0]), length - max(length // 2, 1))
    assert 0 < trimmed < len(examples) or length == 2
    assert f"{trimmed} are longer than" in rows.note
    assert "are trimmed" in rows.note


def test_a_decoders_targets_get_the_length_that_is_given():
    store = InMemory(PAIRS, [[range(10, 30), range(40, 60)], [range(10, 13), range(40, 60)]])
    objective = dataclasses.replace(DECODER, targets_length=4, packing="none")
    rows = rows_of(objective, store, 12)
    first, second = (read_pairs(row, objective)[0] for row in all_rows(rows))
    assert first == (list(range(10, 18)), list(range(40, 44)))
    assert second == (list(range(10, 13)), list(range(40, 49)))


def test_too_long_ones_can_be_left_out_and_are_counted():
    examples = text_examples(longest=40)
    objective = dataclasses.replace(DECODER, too_long="drop")
    rows = rows_of(objective, InMemory(PAIRS, examples), 32)
    found = [pair for row in all_rows(rows) for pair in read_pairs(row, objective)]
    fitting = [(i, [*t, EOS]) for i, t in examples if len(i) + len(t) + 1 <= 32]
    assert sorted(found) == sorted(fitting)
    left_out = len(examples) - len(fitting)
    assert rows.note == f"of 60 examples {left_out} are longer than 32 tokens and are left out"


def test_a_decoder_begins_with_padding_where_there_is_no_bos():
    vocabulary = with_ids(0, None)
    row = rows_of(DECODER, InMemory(PAIRS, [[[7], [8]]]), 4, vocabulary).row(0, 0)
    assert row["tokens"].tolist() == [0, 7, 8, 0]
    assert row["targets"].tolist() == [7, 8, EOS, 0]


def test_for_family_sets_the_family_and_the_tokens_stay_the_same():
    assert TextToText().for_family("decoder-only").sides(16) == {"tokens": 16}
    assert TextToText().for_family("encoder-decoder").sides(16)["encoder_tokens"] == 16
    ours = {TextToText(family=f).tokenizer.key(VOCABULARY) for f in TextToText.families}
    assert len(ours) == 1
    with pytest.raises(UserError, match="encoder-only"):
        TextToText().for_family("encoder-only")


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 24, 200])
@pytest.mark.parametrize(
    "objective",
    [
        *FAMILIES.values(),
        TextToText(targets_length=5),
        Classification(NAMES),
        Classification(NAMES, pair=True),
        Classification(NAMES, pair=True, too_long="drop"),
        Classification(NAMES, pair=True, family="decoder-only"),
        ExtractiveQA(stride=3, question_length=4),
    ],
    ids=repr,
)
def test_sizes_are_what_segments_take(objective, length):
    """Plans are made of sizes alone: one that is wrong would overflow a row, or leave it empty."""
    records = [
        r | question("a pig", ask="q" * n) | {"inputs": r["text"], "targets": r["text_pair"]}
        for n, r in enumerate(labelled(25, 20, pair=True))
    ]
    store, sides = tokenised(objective, records), objective.sides(length)
    examples = objective.examples(store, VOCABULARY, sides)
    noise = lambda index: NO_NOISE  # noqa: E731
    assert examples.are_sizes_fixed
    sizes = examples.sizes(noise)
    assert len(sizes) == len(examples) > 0
    np.testing.assert_array_equal(sizes, measured_sizes(examples, noise))
    assert (sizes <= list(sides.values())).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextToText(packing="split"), "packing='split'"),
        (lambda: TextToText(too_long="cut"), "too_long='cut'"),
        (lambda: TextToText(inputs_see="all"), "inputs_see='all'"),
        (lambda: TextToText(targets_length=0), "targets_length=0"),
        (lambda: TextToText().sides(1), "length=1"),
        (lambda: TextToText(family="encoder-only"), "family='encoder-only'"),
        (lambda: Classification(1), "labels=1"),
        (lambda: Classification(("a", "b", "a")), "'a' is given twice"),
        (lambda: Classification(too_long="cut"), "too_long='cut'"),
        (lambda: Classification().sides(4), "length=4"),
        (lambda: Regression().for_family("encoder-decoder"), "encoder-decoder"),
        (lambda: ExtractiveQA(stride=0), "stride=0"),
        (lambda: ExtractiveQA().sides(64), "length=64 leaves no room"),
        (lambda: ExtractiveQA().for_family("decoder-only"), "decoder-only"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (TextToText(), "eos_id"),
        (Classification(), "sep_id"),
        (Classification(family="decoder-only"), "eos_id"),
        (ExtractiveQA(), "cls_id"),
    ],
)
def test_a_vocabulary_without_a_needed_id_is_refused(objective, name):
    vocabulary = ByteVocabulary(100)
    setattr(vocabulary, name, None)
    columns = objective.tokenizer.columns
    with pytest.raises(UserError, match=name):
        objective.examples(InMemory(columns, []), vocabulary, objective.sides(128))


def test_tasks_are_prepared_and_read_in_batches(tmp_path, quiet):
    file = tmp_path / "a.jsonl"
    records = [
        question("a pig", ask=f"Q{n}?")
        | {"text": f"{n}", "label": n % 3, "inputs": f"{n}", "targets": "x" * n}
        | {"answers": {"text": ["a pig"], "answer_start": [CONTEXT.index("a pig")]}}
        for n in range(30)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    for objective in (TextToText(), Classification(3), Regression(), ExtractiveQA()):
        name = type(objective).__name__
        task = Task(name, JsonLines(str(file)), Bytes(), objective, str(tmp_path / "data"), 0.2)
        prepare(task, quiet)
        batches = task.batches(batch_size=4, length=96, seed=0)
        batch = batches[3]
        assert {n: (a.shape, a.dtype) for n, a in batch.items()} == batches.shapes
        evaluation = task.evaluation(batch_size=4, length=96)
        weights = "weights" if "weights" in batch else "label_weights"
        assert np.concatenate([b[weights].reshape(-1) for b in evaluation]).sum() > 0
        assert batches.notes == []
    short = dataclasses.replace(task, objective=TextToText(), name="TextToText")
    notes = short.batches(batch_size=4, length=20, seed=0).notes
    assert notes[0].startswith("TextToText: of ")
    assert notes[0].endswith("are longer than 20 inputs or 20 targets and are trimmed")
