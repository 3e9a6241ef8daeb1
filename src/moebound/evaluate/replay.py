"""Run a model from one of its layers on, with what used to enter that layer.

The model's own forward runs, on as many sequences as wanted, and makes its own masks and position
embeddings; only, the decoder layers before the one to start at hand their input through, and that
one gets the stored hidden states. So it works on whatever family the model is of. Where a layer
looks at more than its predecessor's output (keys shared between layers, say), starting in the
middle gives other logits: that is tried for each layer, and if it fails the whole model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moebound.errors import UnsupportedArchitectureError
from moebound.evaluate.calibration import Calibration
from moebound.model.calls import listen
from moebound.model.live import ExpertsModule

_AGREES = 1e-3
"""Logits that differ by less, relative to the largest, are the same but for the order of sums."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """What the model says unperturbed.

    logits: of each sequence, [its scored positions, V]. entering: what enters each decoder layer,
    [N, L, ...] by index of the layer. tuples: how many values each layer returns, 0
    for one that returns no tuple.
    """

    logits: tuple[torch.Tensor, ...]
    entering: dict[int, torch.Tensor]
    tuples: dict[int, int]


def decoder_layers(model: nn.Module, entry: ExpertsModule) -> nn.ModuleList:
    """The list of decoder layers that an experts module is in."""
    parts = entry.stack.name.split(".")
    for place in range(len(parts) - 1, 0, -1):
        layers = model.get_submodule(".".join(parts[:place]))
        if isinstance(layers, nn.ModuleList) and parts[place] == str(entry.layer):
            return layers
    raise UnsupportedArchitectureError(f"{entry.stack.name}: is in no list of decoder layers")


@torch.inference_mode()
def baseline(
    model: Any, calibration: Calibration, layers: nn.ModuleList, keep: Sequence[int], tokens: int
) -> Baseline:
    """Read the calibration text. keep: layers before which to store the hidden states. tokens: in
    a batch."""
    logits: list[torch.Tensor] = []
    entering: dict[int, torch.Tensor] = {}
    tuples: dict[int, int] = {}
    rows = slice(0)

    def store(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer not in entering:
                shape = (calibration.n_sequences, calibration.input_ids.shape[1], *hidden.shape[2:])
                entering[layer] = hidden.new_zeros(shape)
            entering[layer][rows, : hidden.shape[1]] = hidden

        return hook

    def shape_of(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tuples[layer] = len(output) if isinstance(output, tuple) else 0

        return hook

    with ExitStack() as hooks:
        for layer in keep:
            handle = layers[layer].register_forward_pre_hook(store(layer), with_kwargs=True)
            hooks.callback(handle.remove)
        for index, module in enumerate(layers):
            hooks.callback(module.register_forward_hook(shape_of(index)).remove)
        for rows in calibration.batches(tokens):
            found = model(**calibration.inputs(rows, model.device)).logits
            scored = calibration.scored[rows, : found.shape[1]].to(found.device)
            logits += [found[row][scored[row]] for row in range(len(found))]
    return Baseline(tuple(logits), entering, tuples)


class Replay:
    """Logits of sequences whose layer `entry` puts out something else than it used to."""

    def __init__(
        self,
        model: Any,
        calibration: Calibration,
        layers: nn.ModuleList,
        entry: ExpertsModule,
        base: Baseline,
    ) -> None:
        self.model, self.calibration, self.layers, self.entry = model, calibration, layers, entry
        self.base = base
        self.starts_at = entry.layer if entry.layer in base.entering else 0
        if self.starts_at and not self._agrees():
            self.starts_at = 0

    @torch.inference_mode()
    def logits(self, rows: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """[R, L', V]: of R sequences, by index (one may come several times), with change [R, L', H]
        added to the output of the experts module. L' is the longest of them."""
        inputs = self.calibration.inputs(rows, self.model.device)
        n_tokens = inputs["input_ids"].numel()
        flat = change.reshape(n_tokens, -1)
        with ExitStack() as stack:
            handle = listen(self.entry.stack, lambda: n_tokens, lambda _, out: out + flat)
            stack.callback(handle.remove)
            if self.starts_at:
                hidden = self.base.entering[self.starts_at][rows, : change.shape[1]]
                stack.enter_context(
                    starting_at(self.layers, self.starts_at, hidden, self.base.tuples)
                )
            found: torch.Tensor = self.model(**inputs).logits
        return found

    def _agrees(self) -> bool:
        """Whether starting in the middle, with nothing changed, gives the logits of the whole."""
        rows = torch.tensor(sorted({0, self.calibration.n_sequences - 1}))
        length = self.calibration.longest(rows)
        width = self.entry_width()
        change = torch.zeros(len(rows), length, width, device=self.model.device)
        try:
            found = self.logits(rows, change.to(self.model.dtype))
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False
        for place, row in enumerate(rows.tolist()):
            got = found[place][self.calibration.scored[row, :length].to(found.device)]
            if not same_logits(self.base.logits[row], got):
                return False
        return True

    def entry_width(self) -> int:
        """H: how wide an output of an expert is."""
        return self.entry.stack.view("down", 0).shape[0]


def same_logits(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether both are the same but for the order of sums."""
    eps = torch.finfo(want.dtype).eps
    allowed = max(_AGREES, 16 * eps) * float(want.abs().max())
    return got.shape == want.shape and float((got - want).abs().max()) <= allowed


@contextmanager
def starting_at(
    layers: nn.ModuleList, start: int, hidden: torch.Tensor, tuples: Mapping[int, int]
) -> Iterator[None]:
    """Layers before `start` do nothing, and `start` gets hidden. tuples: as in `Baseline`."""

    def skip(n_returned: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            return (given, *[None] * (n_returned - 1)) if n_returned else given

        return forward

    def enter(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    handle = layers[start].register_forward_pre_hook(enter, with_kwargs=True)
    skipped = [layers[index] for index in range(start)]
    try:
        for index, layer in enumerate(skipped):
            # An attribute of the instance is found before the class's method; taken away, it is
            # as it was.
            layer.__dict__["forward"] = skip(tuples.get(index, 0))
        yield
    finally:
        for layer in skipped:
            layer.__dict__.pop("forward", None)
        handle.remove()
