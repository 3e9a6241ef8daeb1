"""Will a model fit, and what will it become? Before a weight of it is downloaded.

known.json   configs of models that people ask about: their shapes, and where they are published
shape.py     config -> how many weights are where, without any
experts.py   shape and sizes -> what all experts take, and the least cache
estimate.py  shape and rates -> sizes and times, measured on random experts of that shape, here
stored.py    the same of a store that is here: its own bytes, its own experts decoded
running.py   sizes and memory -> where experts lie, and what a token takes
gpu.py       what is known of a GPU: rows of one, or measured on the one that is here
placing.py   sizes and a GPU's memory -> what lies where, and what a token takes
plot.py      both by memory, drawn
road.py      shape and sizes -> what each command takes, by rates of bench/results
"""

from moebound.fit.estimate import Estimate, Fits, estimate, random_expert
from moebound.fit.gpu import H200, H200_LINK, LINK, Gpu, here, known, measure_gpu
from moebound.fit.placing import Host, Placed, place, place_all, tiers_of
from moebound.fit.plot import plot_placing, plot_running
from moebound.fit.road import Step, road
from moebound.fit.running import DISK, Machine, Running, all_running, measure_machine
from moebound.fit.shape import KNOWN, Shape, shape_of
from moebound.fit.stored import estimate_store, expert_of, is_store

__all__ = ["DISK", "H200", "H200_LINK", "KNOWN", "LINK", "Estimate", "Fits", "Gpu", "Host",
           "Machine", "Placed", "Running", "Shape", "Step", "all_running", "estimate",
           "estimate_store", "expert_of", "here", "is_store", "known", "measure_gpu",
           "measure_machine", "place", "place_all", "plot_placing", "plot_running",
           "random_expert", "road", "shape_of", "tiers_of"]  # fmt: skip
