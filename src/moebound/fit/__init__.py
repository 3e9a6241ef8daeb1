"""Will a model fit, and what will it become? Before a weight of it is downloaded.

known.json   configs of models that people ask about: their shapes, and where they are published
shape.py     config -> how many weights are where, without any
estimate.py  shape and rates -> sizes and times, measured on random experts of that shape, here
running.py   sizes and memory -> where experts lie, and what a token takes
plot.py      the same by memory, drawn
road.py      shape and sizes -> what each command takes, by rates of bench/results
"""

from moebound.fit.estimate import Estimate, Fits, estimate
from moebound.fit.plot import plot_running
from moebound.fit.road import Step, road
from moebound.fit.running import DISK, Machine, Running, all_running, measure_machine
from moebound.fit.shape import KNOWN, Shape, shape_of

__all__ = ["DISK", "KNOWN", "Estimate", "Fits", "Machine", "Running", "Shape", "Step",
           "all_running", "estimate", "measure_machine", "plot_running", "road",
           "shape_of"]  # fmt: skip
