"""Statistics again after routing has moved: what the experts that a method keeps will get.

Where experts are left out, the others get their tokens, with other weights. What is gathered with
the routing edited so is of the same model, with the same weights; in it the experts that were left
out have no tokens. A score that is 0 without tokens (`frequency`, `reap_re`) then keeps the same
experts:

    moebound calibrate SRC -o first ...
    moebound calibrate SRC -o second ... --after reap_re:keep6 --calibration first
    moebound compress SRC dst --method reap_re:keep6+calibrated --rate 0.7 --calibration second
"""

from __future__ import annotations

from typing import Any

from moebound.checkpoint import top_k_of
from moebound.checkpoint.families import router_groups_of
from moebound.errors import MethodError
from moebound.files.formats.statistics import Statistics
from moebound.integrations.transformers.router_edits import apply_router_edits
from moebound.methods import ExpertView, GroupView, RouterEdit, Routing, get_method
from moebound.methods.pruning.pruned import Pruned
from moebound.model.fingerprint import of_corners
from moebound.model.live import live_experts


def edit_routing(model: Any, setting: str, statistics: Statistics) -> str:
    """Apply what a method would do to the routing of a loaded model, and give its setting in full.

    Raises MethodError for a method that does more than leave experts out: weights would be others.
    Raises MoeboundError for statistics of another model, or that lack what it needs.
    """
    method = get_method(setting)
    if not isinstance(method, Pruned):
        raise MethodError(
            f"method {method.setting!r}: statistics can be gathered after one that leaves experts "
            "out (frequency, lu_re, reap_re); of a model with other weights they are gathered from "
            "the store that it makes"
        )
    live = live_experts(model)
    statistics.check_model(of_corners(live), "the model")
    config = model.config.to_dict()
    edits: dict[int, RouterEdit] = {}
    for layer in live.layers:
        keys = live.in_layer(layer)
        group = GroupView(
            tuple(ExpertView(key, {}) for key in keys),
            {n: {k: statistics.array(k, n) for k in keys} for n in method.statistics},
            routing=Routing(len(keys), top_k_of(config), *router_groups_of(config)),
        )
        found = method.edit(group)
        if not found.is_empty:
            edits[layer] = found
    apply_router_edits(model, edits)
    return method.setting
