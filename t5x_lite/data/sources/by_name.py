"""The source that a text's name stands for."""

import glob
import os

from t5x_lite.data.sources.base import Source
from t5x_lite.data.sources.code import Checkout
from t5x_lite.data.sources.datasets import TFDS, HuggingFace
from t5x_lite.data.sources.demo import Chitchat
from t5x_lite.data.sources.paths import is_url, suffix
from t5x_lite.data.sources.tables import Parquet, Table
from t5x_lite.data.sources.text import JsonLines, Text
from t5x_lite.data.sources.web import Html, Warc
from t5x_lite.errors import UserError

KINDS = {
    **{".jsonl": JsonLines, ".json": JsonLines, ".parquet": Parquet, ".csv": Table, ".tsv": Table},
    **{".warc": Warc, ".wet": Warc, ".html": Html, ".htm": Html},
}
INFO = "dataset_info.json"  # what TFDS knows its folders by


def corpus(
    text: str | tuple[str, ...] | list[str],
    field: str | None = None,
    documents_by: str = "blank_line",
    split: str = "train",
    broken: str = "error",
) -> Source:
    """The source that a text's name stands for.

    Args:
        text: "chitchat"; files by path, URL, pattern or several of these: .jsonl, .parquet, .csv,
            .tsv, .warc and .html by their suffix (.gz, .bz2, .xz or .zst may follow), others as
            plain text; a git checkout's folder, or one with several in it; "hf:NAME" for a data set
            of Hugging Face's; or a TFDS data set, by name or by the folder of a prepared one.
        field: of records with several fields: which one is the text; None: "text", if any.
        documents_by: of text files: what ends a document.
        split: of a data set.
        broken: "error", or "skip" to leave broken records out and count them.
    """
    paths = (text,) if isinstance(text, str) else tuple(text)
    if not paths:
        raise UserError("corpus.text is empty; name a text.")
    if paths == ("chitchat",):
        return Chitchat(broken=broken)
    if len(paths) == 1 and paths[0].startswith("hf:") and not is_url(paths[0]):
        return HuggingFace(paths[0].removeprefix("hf:"), field=field, split=split, broken=broken)
    if trees := [tree for path in paths for tree in _checkouts(path)]:
        return Checkout(trees, broken=broken)
    kind = _kind(paths)
    if kind is Text:
        return Text(paths, documents_by, broken=broken)
    if kind in (Html, Warc):
        return kind(paths, broken=broken)
    if kind is not None:
        return kind(paths, field, broken=broken)
    if os.path.isdir(paths[0]) and not os.path.exists(os.path.join(paths[0], INFO)):
        raise UserError(
            f"{paths[0]} is a folder of neither a git checkout nor TFDS ({INFO} is missing); name "
            f"its files by a pattern, for example {os.path.join(paths[0], '*.txt')!r}."
        )
    return TFDS(paths[0], field, split, broken=broken)


def _checkouts(folder: str) -> list[str]:
    """The folder if it's a git checkout, else the checkouts in it."""
    if os.path.exists(os.path.join(folder, ".git")):
        return [folder]
    inside = glob.glob(os.path.join(glob.escape(folder), "*", ".git"))
    return sorted(os.path.dirname(found) for found in inside)


def _kind(paths: tuple[str, ...]) -> type[Source] | None:
    """The class for files of these names; None where it's no file's name."""
    kinds = {KINDS.get(suffix(path), Text) for path in paths}
    if len(kinds) > 1:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"{', '.join(paths)}: these are files for {names}; give those of one kind.")
    (kind,) = kinds
    is_named = len(paths) > 1 or glob.has_magic(paths[0]) or is_url(paths[0]) or suffix(paths[0])
    if kind is Text and (not is_named or os.path.isdir(paths[0])):
        return None
    return kind
