"""Beside the road: what does an error in an expert do to the model?

profile (which experts does a task use) -> perturb (put an error into some, exactly undone) ->
measure (what became of the answers) -> study, map, report. Results are data; `plan/` reads them.
The folders of the road never import this one.
"""

from moebound.sensitivity.live import LiveExpert, LiveExperts, live_experts

__all__ = [
    "LiveExpert",
    "LiveExperts",
    "live_experts",
]
