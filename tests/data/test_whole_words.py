"""Words are masked whole; where they begin, beside the `tokenizers` library's own splitting."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data import imported
from t5x_lite.data.objectives import MaskedLM, mask_tokens
from t5x_lite.data.objectives.masked import choose_words
from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    SentencePiece,
    SentencePieceVocabulary,
    Vocabulary,
)
from t5x_lite.data.whole_words import word_edges

LINES = [
    "Don't stop: the (quick) fox_trot costs $3.50!",
    "naïve café, 東京タワー is tall; привет мир",
    "hello   world - a re-entrant function_name2",
]
WORDS = MaskedLM(choose="words")


def words_of(vocabulary, text):
    """The text of each word, as the vocabulary tells them apart."""
    ids = np.array(vocabulary.encode(text), np.int32)
    numbers = np.cumsum(vocabulary.word_edges.starts(ids))
    return [vocabulary.decode(ids[numbers == n]).strip() for n in range(1, numbers[-1] + 1)]


def train(model, trainer, pre_tokenizer, folder, decoder, normalizer=None):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(LINES * 3, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer, imported.load(folder)


def wordpiece(folder):
    """BERT's own, which splits words, marks and Chinese characters."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=special, show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    split, apart = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    return train(model, trainer, split, folder, decoders.WordPiece(), apart)


def byte_level(folder):
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return train(models.BPE(), trainer, split, folder, decoders.ByteLevel())


@pytest.mark.parametrize("text", LINES)
def test_words_of_wordpiece_are_those_of_bert_s_tokenizer(tmp_path, text):
    tokenizer, vocabulary = wordpiece(tmp_path / "wordpiece")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    expected = np.diff(encoding.word_ids, prepend=-1) > 0
    assert 5 < expected.sum() < len(expected)
    found = vocabulary.word_edges.starts(np.array(encoding.ids))
    # It keeps kana together, which have no spaces either.
    kana = [any(0x3040 <= ord(c) < 0x3100 for c in text[a:b]) for a, b in encoding.offsets]
    np.testing.assert_array_equal(found | kana, expected | kana)


def test_words_of_byte_level_bpe_begin_at_spaces_and_marks(tmp_path):
    _, vocabulary = byte_level(tmp_path / "bytes")
    assert words_of(vocabulary, LINES[0]) == [
        *("Don", "'t", "stop", ":", "the", "(", "quick", ")", "fox", "_", "trot", "costs"),
        *("$", "3", ".", "50", "!"),
    ]
    assert words_of(vocabulary, "ab cd\nef") == ["ab", "cd", "", "ef"]


def test_words_of_sentencepiece_begin_at_spaces_line_ends_and_marks():
    model = SentencePiece(vocab_size=330, extra_ids=4).train(LINES * 20)
    vocabulary = SentencePieceVocabulary(model, 4)
    for line in LINES[::2]:
        expected = re.findall(r"[^\W_]+|[^\w\s]|_", line)
        assert [word for word in words_of(vocabulary, line) if word] == expected
    ends = words_of(vocabulary, "the fox\ntall")
    assert ends == ["the", "fox", "", "tall"], "a line's end is no part of a word"


def test_words_of_bytes_begin_at_spaces_and_marks():
    vocabulary = ByteVocabulary(0)
    assert words_of(vocabulary, "naïve café, x") == ["naïve", "café", ",", "x"]
    special = np.array([*vocabulary.encode("ab"), vocabulary.sep_id, *vocabulary.encode("cd")])
    assert vocabulary.word_edges.starts(special).tolist() == [True, False, True, True, False]


def test_edges_of_each_kind_of_spelling():
    spellings = ["", " a", "a", " ", "\n", "a ", "'s", "東京", " ", "が", " (", "…", "x\n"]
    edges = word_edges(spellings, np.array([8]))
    begins = [0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0]
    ends = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert edges.begins.tolist() == list(map(bool, begins))
    assert edges.ends.tolist() == list(map(bool, ends))
    assert np.flatnonzero(edges.leads).tolist() == [3]
    assert edges.starts(np.array([2, 3, 7, 3, 2, 4, 2])).tolist() == [
        *(True, True, False, True, False, True, True)
    ]


class Words(Vocabulary):
    """Ids below 500 begin a word, those above continue it."""

    size, eos_id, mask_id = 1000, 1, 2

    def piece(self, token):
        return f"\N{LOWER ONE EIGHTH BLOCK}{token}" if int(token) < 500 else f"x{token}"


VOCABULARY = Words()


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.sampled_from([0, 1, *range(3, 20), *range(500, 540)]), max_size=60),
    seed=st.integers(0, 99),
    density=st.sampled_from([0.05, 0.15, 0.5, 0.9]),
)
def test_no_word_is_split_and_no_other_would_fit(ids, seed, density):
    ids = np.array(ids, np.int32)
    objective = dataclasses.replace(WORDS, density=density)
    noisy, chosen = mask_tokens(ids, VOCABULARY, objective, np.random.default_rng(seed))
    np.testing.assert_array_equal(noisy[~chosen], ids[~chosen])
    special = np.isin(ids, VOCABULARY.special_ids)
    assert not chosen[special].any()
    words, before = [], None
    for place, token in enumerate(ids.tolist()):
        if not special[place]:
            if token < 500 or before is None or special[before]:
                words.append([])
            words[-1].append(place)
        before = place
    most = min((~special).sum(), max(1, round(density * (~special).sum())))
    assert all(chosen[word].all() or not chosen[word].any() for word in words)
    assert chosen.sum() <= most
    left = [len(word) for word in words if not chosen[word].any()]
    assert most - chosen.sum() < min(left, default=np.inf)


def test_every_word_is_as_likely_whatever_its_length():
    places, words = np.arange(12), np.repeat(np.arange(6), [1, 3, 2, 1, 3, 2])
    rng, counts = np.random.default_rng(0), np.zeros(12)
    for _ in range(4000):
        counts[choose_words(places, words, 11, rng)] += 1
    # Of 11 of 12 tokens, the first word that doesn't fit is left: a long one more often.
    assert counts[1] == counts[2] == counts[3]
    single = [choose_words(places, words, 3, np.random.default_rng(n)) for n in range(2000)]
    firsts = np.bincount(words[np.concatenate(single)], minlength=6) / [1, 3, 2, 1, 3, 2]
    assert firsts.min() > 2000 / 6 - 4 * np.sqrt(2000 / 6)


def test_pieces_of_a_word_meet_their_own_fates():
    """As in BERT's code: which token becomes the mask is drawn for each piece."""
    ids = np.tile(np.array([10, 500, 501], np.int32), 4000)
    noisy, chosen = mask_tokens(ids, VOCABULARY, WORDS, np.random.default_rng(0))
    assert chosen.sum() == 1800
    masked = (noisy == VOCABULARY.mask_id)[chosen].reshape(-1, 3)
    assert abs(masked.mean() - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 1800)
    assert abs(masked.all(axis=1).mean() - 0.8**3) < 0.08


def test_a_masked_row_begins_a_word_where_a_document_begins(in_memory):
    """The second document begins with a piece that would continue a word."""
    store, sides = in_memory([[10, 500], [501, 502]] * 30), {"tokens": 6}
    objective = MaskedLM(choose="words", density=0.5)
    examples = objective.examples(store, VOCABULARY_WITH_ENDS, sides)
    seen = set()
    for index in range(len(examples)):
        segment = examples.segments(index, np.random.default_rng(index))[0]
        seen.add(tuple(segment["weights"][1:5].astype(int)))
    assert seen == {(1, 1, 0, 0), (0, 0, 1, 1)}


VOCABULARY_WITH_ENDS = Words()
VOCABULARY_WITH_ENDS.cls_id, VOCABULARY_WITH_ENDS.sep_id = 3, 1
