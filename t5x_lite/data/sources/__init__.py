"""Where records come from: one file for each kind of source.

A source gives its input in parts that workers read alone, and a part's records in a fixed order,
without holding them all. Whatever is broken is a UserError that names file and place, or is counted
and left out where that was asked for.
"""

from t5x_lite.data.sources.base import END, FileSource, Part, Piece, Place, Record, Source
from t5x_lite.data.sources.by_name import corpus
from t5x_lite.data.sources.code import Checkout
from t5x_lite.data.sources.datasets import TFDS, HuggingFace
from t5x_lite.data.sources.demo import Chitchat
from t5x_lite.data.sources.tables import Parquet, Table
from t5x_lite.data.sources.text import JsonLines, Text
from t5x_lite.data.sources.web import Html, Warc

__all__ = [
    "END",
    "TFDS",
    "Checkout",
    "Chitchat",
    "FileSource",
    "Html",
    "HuggingFace",
    "JsonLines",
    "Parquet",
    "Part",
    "Piece",
    "Place",
    "Record",
    "Source",
    "Table",
    "Text",
    "Warc",
    "corpus",
]
