"""Calibration statistics: what every expert gets as inputs on a text, for methods that round with
regard to it.

text, self_sampling (a task, a file or the model itself -> token ids) -> collect (token ids -> sums,
some experts at a time) -> a folder (`files/formats/statistics.py`), which methods and plans read.
"""

from moebound.calibrate.collect import Settings, collect
from moebound.calibrate.edited import edit_model
from moebound.calibrate.self_sampling import Sampling, self_sample
from moebound.calibrate.text import Text, of_file, of_task
from moebound.files.formats.statistics import Statistics, read_statistics

__all__ = [
    "Sampling",
    "Settings",
    "Statistics",
    "Text",
    "collect",
    "edit_model",
    "of_file",
    "of_task",
    "read_statistics",
    "self_sample",
]
