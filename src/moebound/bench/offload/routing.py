"""Choices of a trace in place of the routers' own, in any transformers model.

Random routers choose nearly all experts alike, which no trained one does. A hook in front of each
experts module puts in what a trace has for the tokens at hand: its text is gone through token by
token, prompt first, by the order of calls. What the trace lacks (layers, tokens) is taken from its
beginning again; layers that it has too many of are left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moebound.cache import LayerTrace, Trace, one_by_one
from moebound.errors import CacheError
from moebound.model.live import live_experts
from moebound.model.strands import Strand, current, rows
from moebound.types import Array


def fit_trace(trace: Trace, *, layers: int, experts: int, top_k: int) -> Trace:
    """A trace of some model, as one of so many layers reads it: one text after the other, `top_k`
    experts a token. Raises CacheError if its experts do not fit."""
    texts = one_by_one(trace)
    taken = [texts.layers[place % len(texts.layers)] for place in range(layers)]
    for entry in taken:
        _check(entry, experts, top_k)
    return replace(
        texts,
        layers=tuple(
            LayerTrace(place, experts, entry.index[:, :top_k], entry.weights[:, :top_k])
            for place, entry in enumerate(taken)
        ),
    )


def _check(entry: LayerTrace, experts: int, top_k: int) -> None:
    if entry.index.shape[1] < top_k or entry.n_experts > experts:
        raise CacheError(
            f"trace: {entry.index.shape[1]} of {entry.n_experts} experts a token, the model has "
            f"{top_k} of {experts}"
        )
    if (entry.index[:, :top_k] < 0).any():
        raise CacheError(f"trace: layer {entry.layer}: some tokens have less than {top_k} experts")


class ForcedRouting:
    """Installs itself in the model. Raises CacheError if the trace's experts do not fit."""

    def __init__(self, model: Any, trace: Trace, *, top_k: int) -> None:
        live = live_experts(model)
        modules = live.modules
        n_experts = {layer: len(live.in_layer(layer)) for layer in live.layers}
        self._choices = dict[int, Array]()
        for place, layer in enumerate(sorted(modules)):
            entry = trace.layers[place % len(trace.layers)]
            _check(entry, n_experts[layer], top_k)
            self._choices[layer] = entry.index[:, :top_k].astype(np.int64)
            modules[layer].register_forward_pre_hook(self._hook(layer))
        self._modules = list(modules)
        self._at: dict[Strand | None, dict[int, int]] = {None: dict.fromkeys(modules, 0)}

    def begin(self, token: int = 0, *, strand: Strand | None = None) -> None:
        """The next forward pass, of this strand if there are several, is at this token of the
        trace."""
        self._at[strand] = dict.fromkeys(self._modules, token)

    def _hook(self, layer: int) -> Any:
        def choose(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, chosen, weights = args
            choices, some = self._choices[layer], rows()
            if some is None:
                owners: list[Strand | None] = [current()] * len(chosen)
            else:
                owners = list(some.owners)
            ahead, places = Counter[Strand | None](), list[int]()
            for owner in owners:
                places.append((self._at[owner][layer] + ahead[owner]) % len(choices))
                ahead[owner] += 1
            if some is None or not some.trial:
                for owner, n in ahead.items():
                    self._at[owner][layer] += n
            index = torch.from_numpy(choices[places]).to(chosen.device, chosen.dtype)
            return x, index, weights

        return choose
