"""Will a model fit, and what will it become? Before a weight of it is downloaded.

known.json   configs of models that people ask about: their shapes, and where they are published
shape.py     config -> how many weights are where, without any
estimate.py  shape and rates -> sizes and times, measured on random experts of that shape, here
road.py      shape and sizes -> what each command takes, by rates of bench/results
"""

from moebound.fit.estimate import Estimate, Fits, estimate
from moebound.fit.road import Step, road
from moebound.fit.shape import KNOWN, Shape, shape_of

__all__ = ["KNOWN", "Estimate", "Fits", "Shape", "Step", "estimate", "road", "shape_of"]
