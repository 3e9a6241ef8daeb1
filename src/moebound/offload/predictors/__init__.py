"""Which experts will be needed next: guesses, and whether they pay."""

from moebound.model.routers import Router
from moebound.offload.predictors.base import Layers, Predictor
from moebound.offload.predictors.foresight import Foresight
from moebound.offload.predictors.gate import GateAhead
from moebound.offload.predictors.matching import ActivationMatching
from moebound.offload.predictors.previous import PreviousToken

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
