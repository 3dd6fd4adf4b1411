"""Which pieces of a vocabulary begin a word, so that whole words can be masked.

A word is what stands between spaces, but marks are words of their own (`don't` is three), and so is
each character of a script that has no spaces: as BERT's tokenizer splits text before it looks for
pieces (Devlin et al. 2019, §3; google-research/bert, tokenization.py).
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

BYTES = re.compile("(?:<0x[0-9A-F]{2}>)+")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclasses.dataclass(frozen=True)
class WordEdges:
    """Of each id, what it says of words wherever it stands.

    Attributes:
      begins: it begins a word.
      ends: the next one does.
      leads: it is a space alone, which belongs to the word after it.
    """

    begins: Bool[np.ndarray, " V"]
    ends: Bool[np.ndarray, " V"]
    leads: Bool[np.ndarray, " V"]

    def starts(self, ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Where words begin in a text; its first id always does."""
        starts = self.begins[ids]
        starts[1:] |= self.ends[ids[:-1]]
        starts[1:] &= ~self.leads[ids[:-1]]
        starts[:1] = True
        return starts


def word_edges(spellings: Iterable[str], special_ids: Int[np.ndarray, " _"]) -> WordEdges:
    """Args are each id's text, with the spaces that words of it have, and ids that are no text."""
    edges = WordEdges(*np.array([_edges(text) for text in spellings]).T)
    edges.begins[special_ids] = edges.ends[special_ids] = True
    edges.leads[special_ids] = False
    return edges


def spelling(piece: str) -> str:
    """The text of a piece as people see it; bytes that are no characters are none."""
    if BYTES.fullmatch(piece):
        return bytes.fromhex(re.sub("[<>]|0x", "", piece)).decode(errors="ignore")
    return piece.replace(SPACE, " ")


def _edges(text: str) -> tuple[bool, bool, bool]:
    """`begins`, `ends`, `leads` of a spelling."""
    if not text:
        return False, False, False
    first, last = text[0], text[-1]
    leads = text.isspace() and last not in "\r\n"
    ends = (last.isspace() and not leads) or _stands_alone(last)
    return first.isspace() or _stands_alone(first), ends, leads


def _stands_alone(character: str) -> bool:
    """Whether it is a word by itself: a mark, or of a script without spaces."""
    if character.isascii():
        return not (character.isalnum() or character.isspace())
    is_mark = unicodedata.category(character)[0] in "PS"
    return is_mark or unicodedata.name(character, "").startswith(UNSPACED)
