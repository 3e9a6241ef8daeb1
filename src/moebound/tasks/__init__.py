"""Tasks: what a model is asked, and what its answers are worth.

base.py      Problem, Verdict, Task; what ICA and PIA are
wordmath.py  the built-in word problems
gsm8k.py     grade-school problems, answer in a box
math.py      competition problems, answer in a box
jsonl.py     a user's own problems
lm_eval.py   tasks of the lm-eval harness
answers.py   finding an answer in a text
rows.py      reading problems from files and from the hub
registry.py  names to tasks
"""

from moebound.tasks.base import Problem, Task, Verdict
from moebound.tasks.registry import NAMES, get_task

__all__ = ["NAMES", "Problem", "Task", "Verdict", "get_task"]
