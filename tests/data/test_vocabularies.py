import dataclasses
import functools

import numpy as np
import pytest
import sentencepiece

from t5x_lite.data.vocabularies import (
    Bytes,
    ByteVocabulary,
    SentencePiece,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
)
from t5x_lite.errors import UserError

TEXTS = [
    "over the hills",
    " leading and  doubled   spaces ",
    "tabs\tand\r\nlines\n\n\nmore\n",
    "naïve café 日本語 🙂🙃 \x00\x7f",
    "",
    "unseen ☃ signs",
]


def lines(count=400):
    rng = np.random.default_rng(0)
    words = ["over", "the", "hills", "and", "far", "away", "naïve", "café", "tom", "the piper's"]
    return [" ".join(rng.choice(words, 8)) for _ in range(count)]


CONFIG = SentencePiece(vocab_size=400, extra_ids=100)


@functools.cache
def trained(model_type="unigram"):
    config = dataclasses.replace(CONFIG, model_type=model_type)
    model = config.train(lines())
    return model, SentencePieceVocabulary(model, config.extra_ids)


@pytest.fixture(params=["bytes", "unigram", "bpe"])
def vocabulary(request):
    return ByteVocabulary(100) if request.param == "bytes" else trained(request.param)[1]


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_is_lost(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_byte_lengths_add_up_to_the_text(vocabulary, text):
    lengths = vocabulary.byte_lengths()
    assert lengths.shape == (vocabulary.size,)
    assert lengths[vocabulary.encode(text)].sum() == len(text.encode())


def test_encoding_many_is_encoding_each(vocabulary):
    many = [list(ids) for ids in vocabulary.encode_all(TEXTS)]
    assert many == [vocabulary.encode(text) for text in TEXTS]


def test_text_never_becomes_a_special_id(vocabulary):
    text = "".join(TEXTS) + "<s></s><mask><pad><extra_id_0><cls>"
    assert not np.isin(vocabulary.encode(text), vocabulary.special_ids).any()
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_special_ids_are_distinct_weightless_and_silent(vocabulary):
    special = vocabulary.special_ids
    assert len(special) == 7 + 100
    assert not vocabulary.byte_lengths()[special].any()
    assert len(vocabulary.ordinary_ids) + len(special) == vocabulary.size
    ids = vocabulary.encode("over")
    control = [i for i in special if i != vocabulary.unk_id]
    assert vocabulary.decode([*control[:3], *ids, *control[3:]]) == "over"


def test_sentinels_count_down_from_the_top(vocabulary):
    assert vocabulary.sentinel_ids == tuple(range(vocabulary.size - 1, vocabulary.size - 101, -1))
    assert vocabulary.piece(vocabulary.size - 1) == "<extra_id_0>"
    assert vocabulary.piece(vocabulary.size - 100) == "<extra_id_99>"


def test_every_id_has_a_name_and_no_other_has(vocabulary):
    names = [vocabulary.piece(token) for token in range(vocabulary.size)]
    assert len(set(names)) == vocabulary.size
    for token in (-1, vocabulary.size):
        with pytest.raises(UserError, match=f"id {token} is outside"):
            vocabulary.piece(token)


def test_byte_ids_are_byt5s():
    """Xue et al. 2022: pad 0, end 1, unknown 2, then the bytes."""
    vocabulary = ByteVocabulary(0)
    assert vocabulary.encode("Life") == [79, 108, 105, 104]
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_ids_are_sentencepieces_own(model_type):
    model, vocabulary = trained(model_type)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert vocabulary.size == processor.get_piece_size() + 100 == CONFIG.vocab_size
    for text in TEXTS:
        assert vocabulary.encode(text) == processor.encode(text)
    ours = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id)
    ids = (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id())
    assert ours == ids == (0, 1, 2, 3)
    assert [processor.piece_to_id(p) for p in ("<cls>", "<sep>", "<mask>")] == [4, 5, 6]
    assert (vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id) == (4, 5, 6)


def test_training_is_deterministic_and_learns_words():
    model, vocabulary = trained()
    assert CONFIG.train(lines()) == model
    assert len(vocabulary.encode("over the hills and far away")) <= 11


def test_a_line_longer_than_the_trainer_takes_is_not_skipped():
    words = " ".join(lines(4000))
    vocabulary = SentencePieceVocabulary(CONFIG.train([words]), 100)
    assert len(vocabulary.encode("over the hills and far away")) <= 11


def test_without_byte_fallback_unknown_signs_are_unknown():
    config = SentencePiece(vocab_size=145, byte_fallback=False)
    vocabulary = SentencePieceVocabulary(config.train(lines()), 100)
    assert vocabulary.unk_id in vocabulary.encode("☃")


def test_a_given_model_must_have_the_size_that_is_bound(tmp_path):
    path = tmp_path / "given.model"
    path.write_bytes(trained()[0])
    given = SentencePiece(vocab_size=400, path=str(path))
    assert load_vocabulary(given, tmp_path).fingerprint == trained()[1].fingerprint
    with pytest.raises(UserError, match="bind vocab_size=400"):
        load_vocabulary(dataclasses.replace(given, vocab_size=401), tmp_path)
    with pytest.raises(UserError, match="can't read the sentencepiece model"):
        load_vocabulary(dataclasses.replace(given, path="none.model"), tmp_path)
    path.write_bytes(b"no model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_vocabulary(given, tmp_path)


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "bytes"])
def test_offsets_are_the_characters_that_ids_stand_for(model_type):
    vocabulary = ByteVocabulary(10)
    if model_type != "bytes":
        vocabulary = SentencePieceVocabulary(trained(model_type)[0], 10)
    text = "  Over the hïlls, é🙂日本 and\n\nfar away "
    ids, offsets = vocabulary.encode_with_offsets(text)
    assert [*ids] == [*vocabulary.encode(text)]
    for begin in range(len(text)):
        for end in (begin + 1, begin + 5):
            inside = (offsets[:, 0] < end) & (offsets[:, 1] > begin)
            covered = offsets[inside]
            # Lossless: what the ids say is exactly the text that they stand for.
            said = vocabulary.decode(np.array(ids)[inside])
            assert said == text[covered[:, 0].min() : covered[:, 1].max()]
            assert covered[:, 0].min() <= begin
            assert covered[:, 1].max() >= min(end, len(text))


def test_a_vocabulary_that_cannot_tell_characters_says_so():
    with pytest.raises(UserError, match="Vocabulary can't tell which characters"):
        Vocabulary().encode_with_offsets("x")


def test_fingerprints_tell_vocabularies_apart():
    unigram, bpe = trained()[0], trained("bpe")[0]
    every = [SentencePieceVocabulary(unigram, 100), SentencePieceVocabulary(unigram, 99)]
    every += [SentencePieceVocabulary(bpe, 100), ByteVocabulary(100), ByteVocabulary(99)]
    assert len({vocabulary.fingerprint for vocabulary in every}) == 5


def test_an_untrained_tokenizer_names_the_command(tmp_path):
    with pytest.raises(UserError, match="t5x_lite tokenizer train"):
        load_vocabulary(SentencePiece(), tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SentencePiece(vocab_size=364), "vocab_size=364 is too small.*at least 428"),
        (lambda: SentencePiece(model_type="word"), "model_type='word'"),
        (lambda: SentencePiece(extra_ids=-1), "extra_ids=-1"),
        (lambda: SentencePiece(sample=0), "sample=0"),
        (lambda: SentencePiece(vocab_size=4000).train(["one", "two"]), "give at most 3[67][0-9] "),
        (lambda: SentencePiece(vocab_size=366).train(lines()), "too small for the text's alph"),
        (lambda: Bytes(extra_ids=-1), "extra_ids=-1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_bpe_too_large_for_its_text_is_refused():
    with pytest.raises(UserError, match="vocab_size=4000") as caught:
        SentencePiece(vocab_size=4000, model_type="bpe").train(["one", "two"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_user_symbol_is_one_id_wherever_it_stands(model_type):
    config = dataclasses.replace(
        CONFIG, model_type=model_type, vocab_size=402, user_symbols=["<think>", "[[x]]"]
    )
    vocabulary = SentencePieceVocabulary(config.train(lines()), config.extra_ids)
    text = "over<think>the [[x]]\nhills<think>"
    ids = vocabulary.encode(text)
    for symbol, count in (("<think>", 2), ("[[x]]", 1)):
        (token,) = {i for i in ids if vocabulary.piece(i) == symbol}
        assert ids.count(token) == count
        assert token not in vocabulary.special_ids
    assert vocabulary.decode(ids) == text
    assert vocabulary.byte_lengths()[ids].sum() == len(text.encode())
    for bad in ([""], ["\n"], ["a", "a"]):
        with pytest.raises(UserError, match="must be different texts"):
            dataclasses.replace(CONFIG, user_symbols=bad)
