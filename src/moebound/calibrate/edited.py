"""Statistics again after routing has moved: of a model as a method leaves it to its coder.

Where experts are left out, the others get their tokens, with other weights; where they are merged
or cut, later layers get other inputs. What is gathered so says what the rest should be coded by:

    moebound calibrate SRC -o first ...
    moebound calibrate SRC -o moved ... --after hc_smoe_fixed:keep4 --calibration first
    moebound compress SRC dst --method hc_smoe_fixed:keep4+calibrated --rate 0.7 \
        --calibration first --moved moved

The fingerprint of such statistics is that of SRC. In those after experts were left out, these have
no tokens. So a score that is 0 without tokens (`frequency`, `reap_re`) keeps the same experts by
them alone, without the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moebound.checkpoint import top_k_of
from moebound.checkpoint.families import router_groups_of
from moebound.errors import MethodError
from moebound.files.formats.statistics import Statistics
from moebound.integrations.transformers.router_edits import apply_router_edits
from moebound.methods import ExpertView, GroupView, RouterEdit, Routing, compress, get_method
from moebound.methods.pruning.pruned import Pruned
from moebound.methods.shrinkage import wanted
from moebound.model.dtypes import arrays_of
from moebound.model.fingerprint import of_corners
from moebound.model.live import LiveExpert, live_experts
from moebound.types import Array


def edit_model(model: Any, setting: str, statistics: Statistics) -> str:
    """Do to a loaded model what a method would, except coding what it keeps: to its routing, and to
    its experts' weights. Returns the setting in full.

    Raises MethodError for a method that keeps no part of a model, or that is to code it as well.
    Raises MoeboundError for statistics of another model, or that lack what it needs.
    """
    method = get_method(setting)
    if not method.keeps or "+" in method.setting:
        raise MethodError(
            f"method {method.setting!r}: statistics can be gathered after one that leaves out, "
            "merges or cuts experts, without what codes the rest: reap_re:keep6, "
            "hc_smoe_fixed:keep4, modegpt_re:k0.8"
        )
    live = live_experts(model)
    statistics.check_model(of_corners(live), "the model")
    config = model.config.to_dict()
    edits: dict[int, RouterEdit] = {}
    for layer in live.layers:
        keys = live.in_layer(layer)
        # What leaves experts out, and no more, needs no weights to choose.
        weights = not isinstance(method, Pruned)
        group = GroupView(
            tuple(ExpertView(k, arrays_of(live[k].matrices) if weights else {}) for k in keys),
            wanted(statistics, method.wanted_statistics(), keys),
            routing=Routing(len(keys), top_k_of(config), *router_groups_of(config)),
        )
        if isinstance(method, Pruned):
            found: RouterEdit | None = method.edit(group)
        else:
            made = compress(method, group)
            found = made.router
            for key in keys:
                _write(live[key], made.weights(key))
        if found is not None and not found.is_empty:
            edits[layer] = found
    apply_router_edits(model, edits)
    return method.setting


@torch.no_grad()
def _write(expert: LiveExpert, weights: dict[Any, Array]) -> None:
    for role, matrix in expert.matrices.items():
        matrix.copy_(torch.from_numpy(weights[role].astype(np.float32)))
