"""Where an error goes: what it does to the residual stream and to routing, layer by layer.

Hooks on the decoder layers (what leaves each is the residual stream) and on the routing decisions
(`taps.py`). With h what leaves a layer without an error and h' with one, over all tokens T read:

  residual   ||h' - h|| / ||h||, Frobenius norms over [T, H]
  routing    share of the T x K choices that went to an expert the token did not use before

In front of the first changed layer both are exactly 0. Works for every family whose decoder
layers return [batch, length, ...]; for others there is no such measurement, and rows say null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moebound.errors import UnsupportedArchitectureError
from moebound.evaluate.replay import decoder_layers
from moebound.model.live import LiveExperts
from moebound.model.taps import tap


@dataclass
class Heard:
    """One forward pass. hidden: [B, L, ...] behind each decoder layer. chosen: [B · L, K] by MoE
    layer. tuples: what each decoder layer returns: 0 for a tensor, else the length of its tuple."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    tuples: dict[int, int] = field(default_factory=dict)

    def check(self, mask: torch.Tensor) -> None:
        """Raises RuntimeError or IndexError where the shapes are not those of mask, [B, L]."""
        for hidden in self.hidden.values():
            hidden[mask.to(hidden.device)]
        for chosen in self.chosen.values():
            chosen[mask.reshape(-1).to(chosen.device)]


class Listener:
    """Hears what a model does between its layers. Raises UnsupportedArchitectureError where it
    cannot."""

    def __init__(self, model: nn.Module, experts: LiveExperts) -> None:
        self._model = model
        self._stacks = [entry for entry in experts.stacks if entry.first == 0]
        self.decoder = decoder_layers(model, self._stacks[0])
        self.n_layers = len(self.decoder)

    @contextmanager
    def listening(self) -> Iterator[Heard]:
        """One forward pass inside of the `with`."""
        heard = Heard()
        with ExitStack() as hooks:
            for index, layer in enumerate(self.decoder):
                hooks.callback(layer.register_forward_hook(_leaves(heard, index)).remove)
            for entry in self._stacks:
                hooks.callback(tap(self._model, entry.stack, _hears(heard, entry.layer)).remove)
            yield heard


def _leaves(heard: Heard, index: int) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, torch.Tensor) or hidden.dim() < 3:
            raise UnsupportedArchitectureError(
                f"decoder layer {index} returns {type(output).__name__}, expected hidden states"
            )
        heard.hidden[index] = hidden.detach()
        heard.tuples[index] = len(output) if isinstance(output, tuple) else 0

    return hook


def _hears(heard: Heard, layer: int) -> Any:
    def hear(index: torch.Tensor, _weights: torch.Tensor) -> None:
        heard.chosen[layer] = index.detach()

    return hear


class FlowSum:
    """Adds up, batch by batch, how much two passes over the same tokens differ."""

    def __init__(self) -> None:
        self._squares: dict[int, list[float]] = {}
        self._choices: dict[int, list[int]] = {}

    def add(self, was: Heard, now: Heard, mask: torch.Tensor) -> None:
        """Both of the same tokens. mask: [B, L], the real ones. A layer that was not heard now did
        what it did before."""
        flat = mask.reshape(-1)
        for layer, h in was.hidden.items():
            change, whole = self._squares.setdefault(layer, [0.0, 0.0])
            real = mask.to(h.device)
            h = h[real]
            moved = 0.0
            if layer in now.hidden:
                moved = float((now.hidden[layer][real].float() - h.float()).double().square().sum())
            self._squares[layer] = [change + moved, whole + float(h.double().square().sum())]
        for layer, index in was.chosen.items():
            changed, total = self._choices.setdefault(layer, [0, 0])
            real = flat.to(index.device)
            index = index[real]
            if layer in now.chosen:
                kept = (now.chosen[layer][real].unsqueeze(2) == index.unsqueeze(1)).any(2)
                changed += int((~kept).sum())
            self._choices[layer] = [changed, total + index.numel()]

    def to_json(self) -> dict[str, list[float]] | None:
        """By layer, ascending; None if the model's numbers are none any more."""
        residual = [math.sqrt(c / w) if w else 0.0 for _, (c, w) in sorted(self._squares.items())]
        routing = [c / t if t else 0.0 for _, (c, t) in sorted(self._choices.items())]
        if not all(map(math.isfinite, residual)):
            return None
        return {"residual": residual, "routing": routing}
