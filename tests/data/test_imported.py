"""Imported tokenizers; tests/parity/parity_tokenizers.py compares them with transformers."""

import functools
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers

from t5x_lite.data import imported
from t5x_lite.data.piece_vocabulary import PieceVocabulary
from t5x_lite.data.vocabularies import Bytes, ByteVocabulary, Imported, load_vocabulary
from t5x_lite.errors import UserError
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.t5 import t5_1_1
from t5x_lite.serve.answers import make_batch
from t5x_lite.serve.reader import Reader

spec = importlib.util.spec_from_file_location(
    "published", pathlib.Path(__file__).with_name("published.py")
)
published = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)
TEXTS = published.DIFFICULT + published.LEADING + published.SPECIAL
LOSSLESS = ("gpt2", "llama3", "roberta", "llama_pieces", "gemma_pieces", "gpt2_merges",
            "roberta_merges", "byt5")  # fmt: skip


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        published.KINDS[kind](folder)
        return folder

    return make


@pytest.fixture(scope="session")
def vocabulary_of(folder_of):
    return functools.cache(lambda kind: imported.load(folder_of(kind)))


@pytest.fixture(params=published.KINDS)
def kind(request):
    return request.param


@pytest.fixture
def vocabulary(kind, vocabulary_of):
    return vocabulary_of(kind)


# --- the interface -------------------------------------------------------------------------------


def test_encoding_many_is_encoding_each(vocabulary):
    assert vocabulary.encode_all(TEXTS) == [vocabulary.encode(text) for text in TEXTS]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_no_text_is_lost(vocabulary):
    marks_spaces = isinstance(vocabulary, PieceVocabulary)  # and so reads its mark as a space
    for text in published.DIFFICULT + published.LEADING:
        expected = text.replace("\u2581", " ") if marks_spaces else text
        assert vocabulary.decode(vocabulary.encode(text)) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "roberta", "roberta_merges", "byt5_flagged"])
def test_byte_lengths_of_byte_level_bpe_add_up_to_the_text(vocabulary):
    lengths = vocabulary.byte_lengths()
    for text in published.DIFFICULT + published.LEADING:
        assert lengths[vocabulary.encode(text)].sum() == len(text.encode()), text


@pytest.mark.parametrize("kind", ["unigram", "t5_pieces", "xlmr_pieces", "llama_pieces"])
def test_byte_lengths_of_pieces_count_the_space_before_a_text(vocabulary):
    text = "over the hills"
    assert vocabulary.byte_lengths()[vocabulary.encode(text)].sum() == len(text) + 1


def test_byte_lengths_of_words_count_the_space_before_each(vocabulary_of):
    words = vocabulary_of("bert")
    assert words.byte_lengths()[words.encode("over the hills")].sum() == len(" over the hills")


def test_special_ids_are_distinct_weightless_and_silent(vocabulary, kind):
    special = vocabulary.special_ids
    assert not vocabulary.byte_lengths()[special].any()
    assert vocabulary.byte_lengths().shape == (vocabulary.size,)
    assert len(vocabulary.ordinary_ids) + len(special) == vocabulary.size
    ids = vocabulary.encode("over the hills")
    silent = [i for i in special if i != vocabulary.unk_id]
    space = " " if kind == "gpt2_spaced" else ""  # which it puts before every text
    assert vocabulary.decode([*silent[:3], *ids, *silent[3:]]) == f"{space}over the hills"


def test_every_id_has_a_name_and_no_other_has(vocabulary):
    names = [vocabulary.piece(token) for token in range(vocabulary.size)]
    assert len(set(names)) == vocabulary.size
    assert all(vocabulary.piece(np.int32(i)) == name for i, name in enumerate(names))
    for token in (-1, vocabulary.size):
        with pytest.raises(UserError, match=f"id {token} is outside"):
            vocabulary.piece(token)


def test_special_tokens_in_a_text_are_read_as_such_and_by_encode_plain_as_text(vocabulary):
    silent = [i for i in vocabulary.special_ids.tolist() if i != vocabulary.unk_id]
    for i in silent:
        text = f"over{vocabulary.piece(i)}the"
        assert i in vocabulary.encode(text), text
        plain = vocabulary.encode_plain(text)
        assert not set(silent) & set(plain), text
        if vocabulary.unk_id not in plain:
            assert vocabulary.decode(plain).replace(" ", "") == text.lower().replace(" ", "")


def test_our_own_vocabularies_know_only_plain_text():
    vocabulary = ByteVocabulary(5)
    assert vocabulary.encode_plain("</s>") == vocabulary.encode("</s>")


# --- which ids are special -----------------------------------------------------------------------


def roles(vocabulary):
    named = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id)
    return (*named, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # pad, eos, bos, unk, cls, sep, mask
        ("gpt2", (0, 0, 0, None, None, None, None)),  # from config.json alone
        ("llama3", (331, 3, 0, None, None, None, None)),  # the pad stands in no tokenizer.json
        ("qwen", (0, 2, 0, None, None, None, None)),
        ("roberta", (1, 2, 0, 3, 0, 2, 320)),
        ("bert", (0, None, None, 1, 2, 3, 4)),  # from the tokens' usual names alone
        ("unigram", (0, 1, None, 2, None, None, None)),
        ("t5_pieces", (0, 1, None, 2, None, None, None)),
        ("llama_pieces", (2, 2, 1, 0, None, None, None)),  # pads with its end, having no pad
        ("gemma_pieces", (0, 1, 2, 3, None, None, 4)),
        ("bert_words", (0, None, None, 1, 2, 3, 4)),  # from the class's defaults alone
        ("bert_cased", (0, None, None, 1, 2, 3, 4)),
        ("gpt2_merges", (0, 0, 0, 0, None, None, None)),
        ("gpt2_spaced", (320, 0, 0, 0, None, None, None)),  # the pad stands in no vocab.json
        ("roberta_merges", (1, 2, 0, 3, 0, 2, 320)),
        ("byt5", (0, 1, None, 2, None, None, None)),
    ],
)
def test_roles_are_those_of_the_files(vocabulary, expected):
    assert roles(vocabulary) == expected


def test_fairseqs_ids_are_one_higher_with_its_special_ids_first(vocabulary_of, folder_of):
    vocabulary = vocabulary_of("xlmr_pieces")
    assert roles(vocabulary) == (1, 2, 0, 3, 0, 2, vocabulary.size - 1)
    model = folder_of("xlmr_pieces") / "sentencepiece.bpe.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert vocabulary.size == processor.get_piece_size() + 2
    text = "over the hills"
    assert vocabulary.encode(text) == [i + 1 for i in processor.encode(text)]
    assert vocabulary.encode("a<mask> b")[1] == vocabulary.mask_id


@pytest.mark.parametrize(
    ("kind", "prefix", "stops"),
    [
        ("gpt2", (), (0,)),
        ("llama3", (0,), (3, 1)),  # its post-processor's begin; generation_config.json's ends
        ("qwen", (), (2,)),
        ("roberta", (0,), (2,)),
        ("unigram", (), (1,)),
        ("t5_pieces", (), (1,)),
        ("llama_pieces", (1,), (2,)),  # tokenizer_config.json's add_bos_token
        ("bert_words", (2,), ()),
        ("gpt2_merges", (), (0,)),
        ("gpt2_spaced", (0,), (0,)),
        ("roberta_merges", (0,), (2,)),
        ("byt5", (), (1,)),
    ],
)
def test_what_begins_and_ends_a_text(vocabulary, prefix, stops):
    assert (vocabulary.prefix_ids, vocabulary.stop_ids) == (prefix, stops)


def test_add_bos_token_decides_against_the_post_processor(folder_of, tmp_path):
    for add, prefix in ((True, (0,)), (False, ())):
        folder = copy(folder_of("llama3"), tmp_path / str(add), add_bos_token=add)
        assert imported.load(folder).prefix_ids == prefix


@pytest.mark.parametrize("kind", ["unigram", "t5_pieces"])
def test_sentinels_count_down_from_the_top(vocabulary):
    top = vocabulary.size - 1
    assert vocabulary.sentinel_ids == tuple(range(top, top - 10, -1))
    assert vocabulary.piece(top) == "<extra_id_0>"
    assert vocabulary.encode("<extra_id_1>")[-1] == top - 1
    assert set(vocabulary.sentinel_ids) <= set(vocabulary.special_ids.tolist())


def test_byt5s_sentinels_count_up_after_its_bytes(vocabulary_of):
    byt5, fewer = vocabulary_of("byt5"), vocabulary_of("byt5_flagged")
    assert (byt5.size, fewer.size) == (384, 269)
    assert byt5.sentinel_ids == tuple(range(259, 384))
    text = "a </s> b<extra_id_1>"
    assert byt5.encode(text) == [100, 1, 101, 260]  # its ends take the spaces around them
    assert fewer.encode(text) == [100, 35, 1, 35, 101, 260]
    assert byt5.encode_plain("</s>") == [byte + 3 for byte in b"</s>"]


def test_a_mask_takes_the_space_before_it_where_the_files_do_not_say(folder_of, tmp_path):
    folder = copy(folder_of("roberta_merges"), tmp_path / "new")
    (folder / "special_tokens_map.json").unlink()
    space = imported.load(folder).encode(" ")
    for where, kept in ((folder, []), (folder_of("roberta_merges"), [])):
        assert imported.load(where).encode("a <mask>")[1:] == [*kept, 320]
    plain = published.ROBERTA_MAP | {"mask_token": published.flagged("<mask>")}
    published.write(folder, "special_tokens_map.json", plain)
    assert imported.load(folder).encode("a <mask>")[1:] == [*space, 320]


def test_older_files_say_how_words_are_normalised(folder_of, tmp_path):
    folder = copy(folder_of("bert_words"), tmp_path / "new")
    words = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text(
        "\n".join([*words, "Over", "\u00e9", "E", "e", "\u6f22"]) + "\n"
    )
    ids = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    over, unknown = ids["over"], ids["[UNK]"]
    cases = [
        ({}, "Over \u00c9", [over, ids["e"]]),
        ({"do_lower_case": False}, "Over \u00e9", [ids["Over"], ids["\u00e9"]]),
        ({"do_lower_case": False, "strip_accents": True}, "Over \u00c9", [ids["Over"], ids["E"]]),
        ({"strip_accents": False}, "Over \u00c9", [over, ids["\u00e9"]]),
        ({}, "\u6f22\u6f22", [ids["\u6f22"]] * 2),
        ({"tokenize_chinese_chars": False}, "\u6f22\u6f22", [unknown]),
    ]
    prints = set()
    for config, text, expected in cases:
        published.write(folder, "tokenizer_config.json", config)
        assert imported.load(folder).encode(text) == expected, config
        prints.add(imported.load(folder).fingerprint)
    assert len(prints) == len({json.dumps(config) for config, *_ in cases})


def test_sentinels_are_a_hundred_where_only_the_family_says_so(folder_of, tmp_path):
    folder = copy(folder_of("t5_pieces"), tmp_path / "new")
    (folder / "tokenizer_config.json").unlink()
    assert len(imported.load(folder).sentinel_ids) == 100


def test_an_older_token_map_counts_where_the_newer_form_is_missing(folder_of, tmp_path):
    folder = copy(folder_of("llama3"), tmp_path / "new")
    published.write(folder, "special_tokens_map.json", {"eos_token": {"content": "<|end|>"}})
    assert imported.load(folder).eos_id == 1
    added = {"0": {"content": "<|begin|>", "special": True, "normalized": False}}
    copy(folder, tmp_path / "newer", added_tokens_decoder=added)
    assert imported.load(tmp_path / "newer").eos_id == 3


def test_a_decoder_may_start_with_another_id(folder_of, tmp_path):
    folder = copy(folder_of("unigram"), tmp_path / "new")
    assert imported.load(folder).start_id == 0
    published.write(folder, "config.json", {"decoder_start_token_id": 2})
    assert imported.load(folder).start_id == 2
    published.write(folder, "generation_config.json", {"decoder_start_token_id": 1})
    assert imported.load(folder).start_id == 1


# --- expected ids --------------------------------------------------------------------------------


def test_small_byte_level_bpe(tmp_path):
    letters = ["<s>", "a", "b", "c", "\u0120", "\u00c3", "\u00a9", "ab", "\u0120c", "abc"]
    model = tokenizers.models.BPE(
        vocab={name: i for i, name in enumerate(letters)},
        merges=[("a", "b"), ("\u0120", "c"), ("ab", "c")],
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    published.save(tmp_path, tokenizer, {"bos_token": "<s>"})
    vocabulary = imported.load(tmp_path)
    assert vocabulary.encode("abc ab c\u00e9") == [9, 4, 7, 8, 5, 6]
    assert vocabulary.encode("<s>ab") == [0, 7]
    assert vocabulary.encode_plain("<s>ab") == [7]  # it has no letters for the rest
    assert vocabulary.decode([0, 9, 8, 5, 6]) == "abc c\u00e9"
    assert [vocabulary.piece(i) for i in (0, 5, 8)] == ["<s>", "<0xC3>", " c"]
    assert vocabulary.byte_lengths().tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 2, 3]


def test_a_text_of_pieces_begins_anew_after_a_special_token(vocabulary_of):
    spaced = {"llama_pieces": False, "gemma_pieces": False}
    spaced |= {"llama_legacy": True, "t5_pieces": True, "xlmr_pieces": True}
    for kind, begins_anew in spaced.items():
        pieces = vocabulary_of(kind)
        end = pieces.piece(pieces.eos_id)
        ids = pieces.encode(f"over{end}the")
        first = pieces.encode("over")
        assert ids[: len(first) + 1] == [*first, pieces.eos_id]
        names = [pieces.piece(i) for i in ids[len(first) + 1 :]]
        assert "".join(names) == ("\u2581the" if begins_anew else "the"), kind


def test_the_longest_name_wins_and_takes_the_spaces_that_its_flags_say(folder_of, tmp_path):
    added = {
        "500": {"content": "<x>", "lstrip": True, "special": True},
        "501": {"content": "<x><y>", "rstrip": True, "special": False},
    }
    pieces = imported.load(
        copy(folder_of("llama_pieces"), tmp_path / "x", added_tokens_decoder=added)
    )
    a, b = pieces.encode("a"), pieces.encode("</s>b")[1:]
    assert pieces.encode("a  <x>b") == [*a, 500, *b]
    assert pieces.encode("a<x><y>  b") == [*a, 501, *b]
    assert pieces.decode([*a, 500, 501, *b]) == "a<x><y>b"  # one is special, one is text
    assert (pieces.size, pieces.piece(450)) == (502, "<unused 450>")


def test_small_wordpiece(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s", "sat", "."]
    model = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    published.save(tmp_path, tokenizer, {"mask_token": "[MASK]", "pad_token": "[PAD]"})
    vocabulary = imported.load(tmp_path)
    assert vocabulary.encode("Cats  sat, [MASK].") == [5, 6, 7, 1, 4, 8]
    assert vocabulary.encode_plain("[MASK]") == [1, 1, 1]
    assert vocabulary.decode([5, 6, 7, 4, 8]) == "cats sat."


def test_holes_between_ids_have_names_and_count(tmp_path):
    words = {"a": 0, "b": 1, "c": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    published.save(tmp_path, tokenizer, None)
    vocabulary = imported.load(tmp_path)
    assert (vocabulary.size, vocabulary.piece(7), vocabulary.piece(3)) == (8, "c", "<unused 3>")
    assert vocabulary.pad_id == 0  # borrowed from the unknown word


def test_truncation_and_padding_of_the_file_are_off(folder_of, tmp_path):
    folder = copy(folder_of("bert"), tmp_path / "new")
    before = imported.load(folder).encode("over the hills and far away")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = imported.load(folder)
    assert vocabulary.encode("over the hills and far away") == before
    assert vocabulary.encode_all(["over the hills and far away"]) == [before]


# --- the files -----------------------------------------------------------------------------------


def copy(folder, target, **config):
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if config:
        file = target / "tokenizer_config.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        published.write(target, file.name, before | config)
    return target


def test_the_config_loads_what_its_path_holds(folder_of, tmp_path):
    folder = folder_of("bert")
    vocabulary = load_vocabulary(Imported(str(folder)), tmp_path)
    assert vocabulary.fingerprint == imported.load(folder).fingerprint
    assert Imported("a") == Imported("a") != Bytes()


def test_a_fingerprint_is_of_the_files_but_not_of_the_chat_template(folder_of, tmp_path):
    folder = folder_of("llama3")
    same = imported.load(folder).fingerprint
    assert imported.load(copy(folder, tmp_path / "copy")).fingerprint == same
    assert imported.load(copy(folder, tmp_path / "chat", chat_template="x")).fingerprint == same
    other = imported.load(copy(folder, tmp_path / "other", eos_token="<|end|>")).fingerprint
    assert other != same
    assert imported.load(folder_of("gpt2")).fingerprint not in (same, other)


def test_tokenizer_json_wins(folder_of, tmp_path):
    folder = copy(folder_of("t5_pieces"), tmp_path / "both")
    (folder / "tokenizer.json").write_bytes((folder_of("gpt2") / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").unlink()
    gpt2 = imported.load(folder_of("gpt2"))
    assert imported.load(folder).encode("over") == gpt2.encode("over")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither tokenizer.json nor spiece.model.*bind Imported.path"),
        ({"tokenizer.json": "{"}, "can't be read by tokenizers"),
        ({"tokenizer.json": "{}"}, "can't be read by tokenizers"),
        ({"spiece.model": "no model"}, "not a sentencepiece model"),
        ({"spiece.model": "", "tokenizer_config.json": "{"}, "tokenizer_config.json can't be read"),
        ({"spiece.model": "", "tokenizer_config.json": "[]"}, "holds no JSON object"),
        (
            {"spiece.model": "", "tokenizer_config.json": {"tokenizer_class": "AlbertTokenizer"}},
            "belongs to a AlbertTokenizer.*tokenizer.json is needed",
        ),
        (
            {"vocab.txt": "a", "tokenizer_config.json": {"tokenizer_class": "BertweetTokenizer"}},
            "vocab.txt belongs to a BertweetTokenizer.*tokenizer.json is needed",
        ),
        ({"vocab.txt": "a\n[CLS]"}, r"has no '\[SEP\]', the tokenizer's sep_token"),
        (
            {"vocab.txt": "a", "tokenizer_config.json": {"do_basic_tokenize": False}},
            "do_basic_tokenize=False.*tokenizer.json is needed",
        ),
        ({"vocab.json": {"a": 0}, "merges.txt": ""}, "whose class nothing names"),
        (
            {"vocab.json": "{", "merges.txt": "", "config.json": {"model_type": "gpt2"}},
            "vocab.json can't be read by tokenizers",
        ),
        ({"vocab.json": {"a": 0}}, "has neither tokenizer.json nor"),
        (
            {
                "tokenizer_config.json": {
                    "tokenizer_class": "ByT5Tokenizer",
                    "added_tokens_decoder": {"9": {"content": "<x>"}},
                }
            },
            "gives '<x>' the id 9, and ByT5's tokenizer None",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, files, message):
    for name, content in files.items():
        published.write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        imported.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama3", "llama_pieces"])
def test_files_of_two_releases_are_refused(folder_of, tmp_path, kind):
    wrong = {"9": {"content": "<|begin|>" if kind == "llama3" else "<s>", "special": True}}
    folder = copy(folder_of(kind), tmp_path / "new", added_tokens_decoder=wrong)
    with pytest.raises(UserError, match="the id 9"):
        imported.load(folder)


def test_a_missing_library_names_the_extra(folder_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"tokenizers is missing; .*t5x_lite\[hub\]"):
        imported.load(folder_of("gpt2"))
    imported.load(folder_of("t5_pieces"))  # sentencepiece alone is enough


# --- prompts -------------------------------------------------------------------------------------


def read(vocabulary, preset, prompt):
    return Reader(preset("tiny", vocab_size=vocabulary.size + 7), vocabulary).encode(prompt)


def test_a_decoder_begins_as_the_tokenizer_does(vocabulary_of):
    for kind in ("gpt2", "qwen"):
        plain = vocabulary_of(kind)
        assert read(plain, llama, "over") == plain.encode("over")
        assert read(plain, llama, "") == [plain.bos_id]  # a document from its start
    for kind in ("llama3", "llama_pieces"):
        begun = vocabulary_of(kind)
        assert read(begun, llama, "over") == [begun.bos_id, *begun.encode("over")]
        assert read(begun, llama, "") == [begun.bos_id]


def test_masks_are_written_as_the_vocabulary_or_t5x_lite_writes_them(vocabulary_of):
    for kind in ("bert", "roberta", "xlmr_pieces"):
        vocabulary = vocabulary_of(kind)
        name = vocabulary.piece(vocabulary.mask_id)
        ids = read(vocabulary, bert, f"over {name} hills")
        assert ids == read(vocabulary, bert, "over <mask> hills")
        assert ids.count(vocabulary.mask_id) == 1
        assert (ids[0], ids[-1]) == (vocabulary.cls_id, vocabulary.sep_id)
    with pytest.raises(UserError, match="no <mask>"):
        read(vocabulary, bert, "over")


def test_an_encoders_text_is_framed_as_the_tokenizer_does(vocabulary_of, folder_of, tmp_path):
    vocabulary = vocabulary_of("t5_pieces")
    ids = read(vocabulary, t5_1_1, "over <extra_id_0> hills")
    first, second = vocabulary.encode("over"), vocabulary.encode("hills")
    assert ids == [*first, vocabulary.sentinel_ids[0], *second, vocabulary.eos_id]
    framed = vocabulary_of("roberta")  # as BART's
    assert read(framed, t5_1_1, "over") == [0, *framed.encode("over"), 2]
    folder = copy(folder_of("unigram"), tmp_path / "new")
    published.write(folder, "config.json", {"decoder_start_token_id": 2})
    started = imported.load(folder)
    reader = Reader(t5_1_1("tiny"), started)
    batch = make_batch(t5_1_1("tiny"), [[5]], start_id=reader.start_id)
    assert batch["tokens"].tolist() == [[2]]


def test_every_end_may_be_written_and_no_other_special_id(vocabulary_of):
    vocabulary = vocabulary_of("llama3")
    reader = Reader(llama("tiny", vocab_size=vocabulary.size), vocabulary)
    allowed = set(np.flatnonzero(~reader.banned()).tolist())
    assert reader.stop_ids == (3, 1)
    assert allowed == {*vocabulary.ordinary_ids.tolist(), 3, 1}


def test_borrowed_padding_bans_no_word(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    published.save(tmp_path, tokenizer, None)
    vocabulary = imported.load(tmp_path)
    assert vocabulary.pad_id == 0
    assert vocabulary.special_ids.tolist() == []


# --- characters, and pairs -----------------------------------------------------------------------


def test_offsets_are_where_the_ids_text_stands(vocabulary):
    """In order, within the text, and no letter belongs to none."""
    for text in TEXTS:
        ids, offsets = vocabulary.encode_with_offsets(text)
        assert [*ids] == [*vocabulary.encode(text)]
        assert offsets.shape == (len(ids), 2)
        assert ((offsets >= 0) & (offsets <= len(text))).all()
        assert (np.diff(offsets[:, 0]) >= 0).all()
        assert (offsets[:, 1] >= offsets[:, 0]).all()
        held = {n for begin, end in offsets.tolist() for n in range(begin, end)}
        missing = [text[n] for n in sorted(set(range(len(text))) - held)]
        # Normalisation takes out control characters and marks, and of decomposed ones joins two.
        assert not any(char.isalnum() and char.isascii() for char in missing)


@pytest.mark.parametrize("kind", ["t5_pieces", "llama_pieces", "llama_legacy", "byt5", "gpt2"])
def test_words_after_a_special_token_are_found(vocabulary_of, kind):
    vocabulary = vocabulary_of(kind)
    text = "over </s>the  hills é🙂 away"
    ids, offsets = vocabulary.encode_with_offsets(text)
    begin = text.index("hills")
    inside = [i for i, (a, b) in zip(ids, offsets, strict=True) if a < begin + 5 and b > begin]
    assert vocabulary.decode(inside).strip() == "hills"
    smile = [i for i, (a, b) in zip(ids, offsets, strict=True) if a <= text.index("🙂") < b]
    assert vocabulary.decode(smile) == "🙂" or smile == [vocabulary.unk_id]


@pytest.mark.parametrize(
    ("kind", "between", "second_type"),
    [("bert", 1, 1), ("bert_words", 1, 1), ("roberta", 2, 0), ("roberta_merges", 2, 0)],
)
def test_a_pair_is_framed_as_its_family_does(vocabulary_of, kind, between, second_type):
    vocabulary = vocabulary_of(kind)
    assert (vocabulary.between_ids or (vocabulary.sep_id,)) == (vocabulary.sep_id,) * between
    assert vocabulary.second_type == second_type


def test_xlm_roberta_s_pair_has_two_ends_and_one_type(vocabulary_of):
    vocabulary = vocabulary_of("xlmr_pieces")
    assert vocabulary.between_ids == (vocabulary.eos_id, vocabulary.eos_id)
    assert vocabulary.second_type == 0
