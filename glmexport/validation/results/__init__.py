"""What validation measures: the vocabulary between the measurements, the gates and the report."""

from glmexport.validation.results.fidelity import (
    CaptureBound,
    Estimate,
    Fidelity,
    LanguageFidelity,
    Overlap,
    PositionBand,
    Share,
    WorstToken,
)
from glmexport.validation.results.gate import Gate
from glmexport.validation.results.performance import Performance, Speed
from glmexport.validation.results.prompts import PromptDifference, PromptParity
from glmexport.validation.results.record import Count, Number, Record, Verdict, badness, worst
from glmexport.validation.results.weights import WeightCheck, WeightFault

__all__ = [
    "CaptureBound",
    "Count",
    "Estimate",
    "Fidelity",
    "Gate",
    "LanguageFidelity",
    "Number",
    "Overlap",
    "Performance",
    "PositionBand",
    "PromptDifference",
    "PromptParity",
    "Record",
    "Share",
    "Speed",
    "Verdict",
    "WeightCheck",
    "WeightFault",
    "WorstToken",
    "badness",
    "worst",
]
