"""How rules cut a text into words and sentences, and what they do where something isn't installed.

A rule's `tokenizer` is a language of datatrove's table, or "fast". For English and 200 other
languages the table names spaCy's tokenizers, which are rules and need no model.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from t5x_lite.errors import UserError

FAST = "fast"


@contextlib.contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Says what to install where the block's imports fail."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what}: {error}; pip install 't5x_lite[curate]' has it.") from error


def word_tokenizer(name: str) -> Any:
    """What datatrove's filters take as their `language`: the name, or a tokenizer of our own.

    Raises:
      UserError: datatrove knows no tokenizer of that name, or what it uses isn't installed.
    """
    with needs_extra(f"the tokenizer {name!r}"):
        if name == FAST:
            return _fast_tokenizer()
        from datatrove.utils.word_tokenizers import load_word_tokenizer

    try:
        load_word_tokenizer(name)
    except ValueError as error:
        raise UserError(
            f"tokenizer={name!r} is neither {FAST!r} nor a language that datatrove cuts into "
            f"words; use a code such as 'en', 'de' or 'zho_Hans'."
        ) from error
    except ImportError as error:  # not spaCy, and not of our extra: jieba, pyvi, stanza, …
        why = str(error).strip().rstrip(".")
        raise UserError(f"tokenizer={name!r}: {why}; or use {FAST!r}.") from error
    return name


@functools.cache
def _fast_tokenizer() -> Any:
    """One regular expression: words, numbers, and each mark of punctuation. Not for scripts that
    write words without spaces.

    Made in a function because its base class is an optional package's.
    """
    import regex
    from datatrove.utils.word_tokenizers import WordTokenizer

    words = regex.compile(r"[\p{L}\p{M}\p{N}_]+(?:['’.,-][\p{L}\p{M}\p{N}_]+)*|[^\s\p{L}\p{N}_]")
    # a sentence's end: terminal marks with what closes after them, before a space; or a line's end
    ends = regex.compile(r"(?<=[.!?…。！？][\"'”’)\]]*)\s+|\n+")

    class FastTokenizer(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return words.findall(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            starts = [0, *(match.end() for match in ends.finditer(text))]
            stops = [*starts[1:], len(text)]
            return [(a, b) for a, b in zip(starts, stops, strict=True) if text[a:b].strip()]

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:stop].strip() for start, stop in self.span_tokenize(text)]

    return FastTokenizer(FAST)
