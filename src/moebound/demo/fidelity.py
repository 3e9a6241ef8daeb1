"""How far is a compressed model from the original one: see moebound.evaluate.fidelity."""

from moebound.evaluate.fidelity import Fidelity, compare, log_probabilities

__all__ = ["Fidelity", "compare", "log_probabilities"]
