import dataclasses
import functools
import types

import numpy as np
import pytest

from t5x_lite.data.converters import assemble
from t5x_lite.data.objectives import (
    UL2,
    CausalLM,
    FillInTheMiddle,
    MaskedLM,
    PrefixLM,
    SpanCorruption,
    corrupt,
    mask_tokens,
    random_spans,
)
from t5x_lite.data.vocabularies import ByteVocabulary, SentencePiece, SentencePieceVocabulary
from t5x_lite.errors import UserError
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.t5 import t5_1_1
from t5x_lite.serve.answers import make_batch
from t5x_lite.serve.reader import Reader

TEXT = "The café opens at nine — and\nthe cat of the house sleeps, 42 cats in all."
SENTINELS = 40


@functools.cache
def make_vocabulary(kind):
    if kind == "bytes":
        return ByteVocabulary(SENTINELS)
    lines = ["the cat sat on the mat and the dog ran", TEXT, "a house of cats, a mat of dogs"] * 20
    model = SentencePiece(vocab_size=338, extra_ids=SENTINELS).train(lines)
    return SentencePieceVocabulary(model, SENTINELS)


@pytest.fixture(params=["bytes", "pieces"])
def vocabulary(request):
    return make_vocabulary(request.param)


def reader(preset, vocabulary, **options):
    return Reader(preset("tiny", vocab_size=vocabulary.size + 5), vocabulary, **options)


def join(segments):
    return "".join(text for text, _ in segments)


def test_a_decoder_continues_a_document_from_its_start(vocabulary):
    read = reader(llama, vocabulary)
    assert read.encode("") == [vocabulary.bos_id]
    assert read.encode("The cat") == [vocabulary.bos_id, *vocabulary.encode("The cat")]


def test_prompt_and_continuation_make_the_text_again(vocabulary):
    read = reader(llama, vocabulary)
    for cut in range(1, len(TEXT)):
        written = [*vocabulary.encode(TEXT[cut:]), vocabulary.eos_id]
        segments = read.answer(read.encode(TEXT[:cut]), written)
        assert segments == ((TEXT[:cut], False), (TEXT[cut:], True))


class Stripping(ByteVocabulary):
    """As models of sentencepiece with a dummy prefix do (T5's, Llama's)."""

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


def test_what_is_written_keeps_the_space_that_its_vocabulary_strips_from_a_text():
    vocabulary = Stripping(SENTINELS)
    read = reader(llama, vocabulary)
    segments = read.answer(read.encode("the"), vocabulary.encode(" cat"))
    assert segments == (("the", False), (" cat", True))
    read = reader(t5_1_1, vocabulary)
    written = [vocabulary.sentinel_ids[0], *vocabulary.encode(" dog")]
    segments = read.answer(read.encode("the<extra_id_0> ran"), written)
    assert segments == (("the", False), (" dog", True), (" ran", False))


@pytest.mark.parametrize("seed", range(4))
def test_the_targets_of_span_corruption_restore_its_text(vocabulary, seed):
    """What a model is trained to write, read back, is the text that was corrupted."""
    read, ids = reader(t5_1_1, vocabulary), np.array(vocabulary.encode(TEXT), np.int32)
    noise = random_spans(len(ids), 0.3, 3, np.random.default_rng(seed))
    inputs, targets = corrupt(ids, noise, np.array(vocabulary.sentinel_ids, np.int32))
    segments = read.answer([*inputs.tolist(), 1], [*targets.tolist(), 1])
    assert join(segments) == TEXT
    assert sum(new for _, new in segments) == len(targets) - noise.sum()


@pytest.mark.parametrize("seed", range(4))
def test_masks_with_their_tokens_are_the_text_again(vocabulary, seed):
    read, ids = reader(bert, vocabulary), np.array(vocabulary.encode(TEXT), np.int32)
    objective = MaskedLM(masked=1.0, randomised=0.0)
    noisy, chosen = mask_tokens(ids, vocabulary, objective, np.random.default_rng(seed))
    right = {int(place): [int(ids[place])] for place in np.flatnonzero(chosen)}
    assert (noisy[chosen] == vocabulary.mask_id).all()
    assert join(read.replace(noisy.tolist(), right)) == TEXT


def test_marks_become_ids_without_the_space_before_them():
    pieces = make_vocabulary("pieces")
    read = reader(t5_1_1, pieces)
    ids = [pieces.encode("the"), pieces.encode(" sat"), pieces.encode(" mat")]
    first, second = pieces.sentinel_ids[:2]
    expected = [*ids[0], first, *ids[1], second, *ids[2], pieces.eos_id]
    assert read.encode("the <extra_id_0> sat <extra_id_1> mat") == expected
    assert read.encode("the<extra_id_0> sat<extra_id_1> mat") == expected
    read = reader(bert, pieces)
    expected = [pieces.cls_id, *ids[0], pieces.mask_id, *ids[1], pieces.sep_id]
    assert read.encode("the <mask> sat") == expected
    # A byte stands for itself alone: the space before it is another.
    letters = make_vocabulary("bytes")
    assert len(reader(bert, letters).encode("the <mask> sat")) == len("the ? sat") + 2


def test_a_sentinel_that_nothing_fills_stays(vocabulary):
    read = reader(t5_1_1, vocabulary)
    first, second, third = vocabulary.sentinel_ids[:3]
    ids = read.encode("the<extra_id_0> and<extra_id_1> ran")
    # A sentinel that isn't in the prompt, and one that comes twice.
    written = [second, *vocabulary.encode(" dog"), third, *vocabulary.encode(" no")]
    written += [second, *vocabulary.encode(" cat"), vocabulary.eos_id]
    assert first not in written
    expected = (("the<extra_id_0> and", False), (" dog", True), (" ran", False))
    assert read.answer(ids, written) == expected


def test_a_prompt_without_sentinels_is_continued_where_spans_are_what_was_learned(vocabulary):
    ids = reader(t5_1_1, vocabulary, corrupts_spans=True).encode("the cat")
    assert ids == [*vocabulary.encode("the cat"), vocabulary.sentinel_ids[0], vocabulary.eos_id]
    plain = reader(t5_1_1, vocabulary)
    ids = plain.encode("the cat")
    assert ids == [*vocabulary.encode("the cat"), vocabulary.eos_id]
    # Otherwise the answer is a text of its own.
    assert plain.answer(ids, vocabulary.encode("a dog")) == (("a dog", True),)


ASCII = TEXT.encode("ascii", "ignore").decode()


def training_row(objective, vocabulary, length):
    """The first row that a model is trained on, of a text of one document."""
    ids = np.array(vocabulary.encode(ASCII), np.int32)
    text = types.SimpleNamespace(offsets=np.array([0, len(ids)]), slice=lambda a, b: ids[a:b])
    store = types.SimpleNamespace(column=lambda _: text)
    sides = objective.sides(length)
    segments = objective.examples(store, vocabulary, sides).segments(0, np.random.default_rng(0))
    row = assemble(segments, objective.shapes(sides))
    return {name: values.tolist() for name, values in row.items()}


def test_prompts_are_framed_as_the_rows_of_training_are():
    letters, length = make_vocabulary("bytes"), len(ASCII) + 2
    row = training_row(CausalLM(), letters, length)
    read = reader(llama, letters).encode(ASCII)
    assert make_batch(llama("tiny"), [read])["tokens"][0].tolist() == row["tokens"][:-1]

    def written(ids, marks):
        return "".join(marks.get(i) or chr(i - 3) for i in ids)

    row = training_row(MaskedLM(masked=1.0, randomised=0.0), letters, 42)
    prompt = written(row["tokens"][1:-1], {letters.mask_id: "<mask>"})
    batch = make_batch(bert("tiny"), [reader(bert, letters).encode(prompt)])
    assert batch["tokens"][0].tolist() == row["tokens"]
    row = training_row(SpanCorruption(), letters, 42)
    marks = {token: f"<extra_id_{n}>" for n, token in enumerate(letters.sentinel_ids)}
    prompt = written(row["encoder_tokens"][:-1], marks)
    batch = make_batch(t5_1_1("tiny"), [reader(t5_1_1, letters).encode(prompt)])
    assert batch["encoder_tokens"][0].tolist() == row["encoder_tokens"]
    assert batch["tokens"][0].tolist() == row["tokens"][:1]


@pytest.mark.parametrize("preset", [llama, t5_1_1, bert])
def test_an_answer_holds_no_special_ids(vocabulary, preset):
    banned = reader(preset, vocabulary).banned()
    allowed = set(np.flatnonzero(~banned).tolist())
    ends = set() if preset is bert else {vocabulary.eos_id}
    sentinels = set(vocabulary.sentinel_ids) if preset is t5_1_1 else set()
    assert allowed == set(vocabulary.ordinary_ids.tolist()) | ends | sentinels
    assert len(banned) == preset("tiny", vocab_size=vocabulary.size + 5).physical_vocab


def test_what_a_family_cannot_read_is_refused(vocabulary):
    for preset in (t5_1_1, bert):
        with pytest.raises(UserError, match="empty"):
            reader(preset, vocabulary).encode(" \n")
    with pytest.raises(UserError, match="no <mask>"):
        reader(bert, vocabulary).encode("the cat")
    with pytest.raises(UserError, match=f"<extra_id_{SENTINELS}>.* {SENTINELS} sentinels"):
        reader(t5_1_1, vocabulary).encode(f"the <extra_id_{SENTINELS}>")
    with pytest.raises(UserError, match=f"{vocabulary.size} ids and the model 100"):
        Reader(llama("tiny", vocab_size=100), vocabulary)


PREFIX = {"reads_sentinels": True, "reads_prefix": True}


def test_a_decoder_that_denoises_fills_the_sentinels_of_its_prompt(vocabulary):
    read = reader(llama, vocabulary, corrupts_spans=True, **PREFIX)
    first, second = vocabulary.sentinel_ids[:2]
    the, sat = vocabulary.encode("the"), vocabulary.encode(" sat")
    assert read.encode("the<extra_id_0> sat") == [vocabulary.bos_id, *the, first, *sat]
    assert read.encode("the") == [vocabulary.bos_id, *the, first]
    written = [first, *vocabulary.encode(" cat"), second, *vocabulary.encode(" here"), 1]
    segments = read.answer(read.encode("the<extra_id_0> sat<extra_id_1>"), written)
    assert join(segments) == "the cat sat here"
    assert not read.banned()[[first, second]].any()
    causal = reader(llama, vocabulary)
    assert causal.banned()[[first, second]].all()
    assert not causal.reads_prefix
    assert first not in causal.encode("the<extra_id_0> sat")


def test_what_a_decoder_continues_has_no_sentinel_added(vocabulary):
    read = reader(llama, vocabulary, **PREFIX)
    ids = read.encode("the")
    assert ids == [vocabulary.bos_id, *vocabulary.encode("the")]
    segments = read.answer(ids, [*vocabulary.encode(" cat"), 1])
    assert segments == (("the", False), (" cat", True))


def test_a_prompt_to_fill_in_the_middle_is_as_a_row_of_training(vocabulary):
    objective = FillInTheMiddle(rate=1, spm=0)
    row = training_row(objective, vocabulary, len(ASCII) + 8)
    middle = row["tokens"].index(vocabulary.sentinel_ids[2])
    given, written = row["tokens"][1 : middle + 1], row["targets"][middle:]
    written = written[: written.index(vocabulary.eos_id) + 1]
    marks = {token: f"<extra_id_{n}>" for n, token in enumerate(vocabulary.sentinel_ids)}
    places = [n for n, token in enumerate(given) if token in marks]
    prefix, suffix = given[places[0] + 1 : places[1]], given[places[1] + 1 : places[2]]
    parts = [vocabulary.decode(ids) for ids in (prefix, suffix)]
    prompt = f"<extra_id_0>{parts[0]}<extra_id_1>{parts[1]}<extra_id_2>"
    read = reader(llama, vocabulary, reads_sentinels=True)
    ids = read.encode(prompt)
    assert ids[0] == vocabulary.bos_id
    assert [i for i in ids if i in marks] == list(vocabulary.sentinel_ids[:3])
    assert vocabulary.decode(ids) == "".join(parts)
    assert join(read.answer(ids, written)) == prompt + vocabulary.decode(written)
    assert read.banned()[list(marks)].all(), "a middle has no sentinels"


@pytest.mark.parametrize("objective", [PrefixLM(), UL2(family="decoder-only")])
def test_a_prefix_of_training_is_a_prompt_s(objective):
    letters = make_vocabulary("bytes")
    row = training_row(dataclasses.replace(objective, packing="none"), letters, 160)
    prefix = sum(row["prefix"])
    batch = make_batch(llama("tiny"), [row["tokens"][:prefix]], is_prefix=True)
    assert batch["prefix"].tolist() == [[1] * prefix]
    assert row["prefix"] == [1] * prefix + [0] * (160 - prefix)
