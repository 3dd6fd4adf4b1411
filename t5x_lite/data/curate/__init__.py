"""Cleaning a corpus by rules, with a report (extra [curate]; datatrove does the work)."""

from t5x_lite.data.curate.classifier import Classifier, compressibility
from t5x_lite.data.curate.contamination import Decontaminate
from t5x_lite.data.curate.duplicates import ExactDuplicates, NearDuplicates
from t5x_lite.data.curate.executors import Local, Ray, Slurm
from t5x_lite.data.curate.rules import (
    BadWords,
    C4Quality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Language,
    Length,
    MaskPersonalData,
)
from t5x_lite.data.curate.run import curate

__all__ = [
    "BadWords",
    "C4Quality",
    "Classifier",
    "Decontaminate",
    "ExactDuplicates",
    "FineWebQuality",
    "GopherQuality",
    "GopherRepetition",
    "Language",
    "Length",
    "Local",
    "MaskPersonalData",
    "NearDuplicates",
    "Ray",
    "Slurm",
    "compressibility",
    "curate",
]
