"""What validation measures: the vocabulary between the measurements, the gates and the report."""

from glmexport.validation.results.behaviour import (
    Answer,
    Behaviour,
    Concurrency,
    LanguageBehaviour,
    TaskGroup,
    Translation,
)
from glmexport.validation.results.device import DeviceFacts, DeviceResult
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
from glmexport.validation.results.paired import Paired
from glmexport.validation.results.performance import (
    Figure,
    Interval,
    Performance,
    PlacedOperators,
    Placement,
    Speed,
    SpeedRatios,
)
from glmexport.validation.results.prompts import PromptDifference, PromptParity
from glmexport.validation.results.record import Count, Number, Record, Verdict, badness, worst
from glmexport.validation.results.reference import ReferenceCheck
from glmexport.validation.results.routing import LayerRouting
from glmexport.validation.results.weights import WeightCheck, WeightFault

__all__ = [
    "Answer",
    "Behaviour",
    "CaptureBound",
    "Concurrency",
    "Count",
    "DeviceFacts",
    "DeviceResult",
    "Estimate",
    "Fidelity",
    "Figure",
    "Gate",
    "Interval",
    "LanguageBehaviour",
    "LanguageFidelity",
    "LayerRouting",
    "Number",
    "Overlap",
    "Paired",
    "Performance",
    "PlacedOperators",
    "Placement",
    "PositionBand",
    "PromptDifference",
    "PromptParity",
    "Record",
    "ReferenceCheck",
    "Share",
    "Speed",
    "SpeedRatios",
    "TaskGroup",
    "Translation",
    "Verdict",
    "WeightCheck",
    "WeightFault",
    "WorstToken",
    "badness",
    "worst",
]
