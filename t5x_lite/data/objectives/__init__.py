"""What a model is asked to predict: one file for each kind of objective."""

from t5x_lite.data.objectives.base import Examples, Objective, Sides
from t5x_lite.data.objectives.causal import CausalLM
from t5x_lite.data.objectives.chat import Chat
from t5x_lite.data.objectives.classification import (
    Classification,
    Regression,
    count_labels,
    read_labels,
)
from t5x_lite.data.objectives.denoising import (
    IidDenoising,
    SpanCorruption,
    span_corruption_lengths,
)
from t5x_lite.data.objectives.infilling import FillInTheMiddle
from t5x_lite.data.objectives.masked import MaskedLM, mask_tokens
from t5x_lite.data.objectives.noise import corrupt, random_spans
from t5x_lite.data.objectives.pairs import MaskedPairs, NextSentence, SentenceOrder
from t5x_lite.data.objectives.prefix import PrefixLM
from t5x_lite.data.objectives.question_answering import ExtractiveQA
from t5x_lite.data.objectives.supervised import TextToText
from t5x_lite.data.objectives.ul2 import UL2, Denoiser

__all__ = [
    "UL2",
    "CausalLM",
    "Chat",
    "Classification",
    "Denoiser",
    "Examples",
    "ExtractiveQA",
    "FillInTheMiddle",
    "IidDenoising",
    "MaskedLM",
    "MaskedPairs",
    "NextSentence",
    "Objective",
    "PrefixLM",
    "Regression",
    "SentenceOrder",
    "Sides",
    "SpanCorruption",
    "TextToText",
    "corrupt",
    "count_labels",
    "mask_tokens",
    "random_spans",
    "read_labels",
    "span_corruption_lengths",
]
