"""Which experts will be needed next: guesses, and whether they pay."""

from moebound.runtime.predictors.base import Layers, Predictor, Router
from moebound.runtime.predictors.foresight import Foresight
from moebound.runtime.predictors.gate import GateAhead
from moebound.runtime.predictors.matching import ActivationMatching
from moebound.runtime.predictors.previous import PreviousToken

PREDICTORS: dict[str, type[Predictor]] = {
    cls.name: cls for cls in (GateAhead, PreviousToken, ActivationMatching)
}
"""By name, as options spell them."""

__all__ = [
    "PREDICTORS",
    "ActivationMatching",
    "Foresight",
    "GateAhead",
    "Layers",
    "Predictor",
    "PreviousToken",
    "Router",
]
