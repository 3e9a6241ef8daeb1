"""The experts of a model that is loaded: views into its parameters, by the keys of the checkpoint.

`live_experts(model)[ExpertKey(1, 7)].matrices["gate"]` is gate projection of expert 7 of decoder
layer 1, as [out, in]; writing it changes what the model computes. Nothing is copied.

Keys are those of `checkpoint.open_checkpoint`: `layer` is the index of the decoder layer, dense
layers included, taken from the module's name; several experts modules of one layer (ERNIE 4.5 VL:
text, then vision) are numbered on. Towers and prediction heads beside the language model are left
out. Routed experts only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moebound.checkpoint.families import Role, decoder_layer
from moebound.errors import UnsupportedArchitectureError
from moebound.model.stacks import Stack, find_stack
from moebound.types import ExpertKey


@dataclass(frozen=True, eq=False)
class LiveExpert:
    """One expert of a loaded model. stack: where it lives; index: which slice of it."""

    key: ExpertKey
    stack: Stack
    index: int

    @property
    def roles(self) -> tuple[Role, ...]:
        """gate, up, down; without gate where the family has none."""
        return tuple(self.stack.places)

    @property
    def matrices(self) -> dict[Role, torch.Tensor]:
        """By role, in the order gate, up, down: views [out, in] into the parameters, in the
        model's dtype, on its device, outside of autograd, not always contiguous.

        gate and up are [I, H], down is [H, I]. Raises UnsupportedArchitectureError where writing
        them would not change the model: weights offloaded to disk, or quantized.
        """
        return {role: self.stack.view(role, self.index) for role in self.roles}

    @property
    def n_weights(self) -> int:
        return sum(matrix.numel() for matrix in self.matrices.values())


@dataclass(frozen=True, eq=False)
class ExpertsModule:
    """One experts module and where it stands. first: the key index of its first expert."""

    layer: int
    first: int
    stack: Stack

    @property
    def module(self) -> nn.Module:
        return self.stack.module


class LiveExperts(Mapping[ExpertKey, LiveExpert]):
    """All routed experts of a loaded model, in the order of the model.

    layers: decoder indices of the layers that have experts, ascending. modules: the experts module
    of each (of several in one layer, the first: the language model's). stacks: all of them.
    """

    def __init__(self, stacks: tuple[ExpertsModule, ...]) -> None:
        self.stacks = stacks
        self.modules: Mapping[int, nn.Module] = {s.layer: s.module for s in reversed(stacks)}
        self.layers: tuple[int, ...] = tuple(sorted(self.modules))
        experts = [
            LiveExpert(ExpertKey(entry.layer, entry.first + index), entry.stack, index)
            for entry in stacks
            for index in range(entry.stack.n_experts)
        ]
        self._experts = {expert.key: expert for expert in experts}

    def __getitem__(self, key: ExpertKey) -> LiveExpert:
        return self._experts[key]

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    def pick(self, keys: Iterable[ExpertKey]) -> tuple[LiveExpert, ...]:
        """Some of them, in the order asked. Raises KeyError for one that does not exist."""
        return tuple(self._experts[key] for key in keys)

    def in_layer(self, layer: int) -> tuple[ExpertKey, ...]:
        """The experts of one layer; none for a layer that has none."""
        return tuple(key for key in self._experts if key.layer == layer)


def live_experts(model: nn.Module) -> LiveExperts:
    """Find the experts of a loaded transformers model, of any family, by how its modules look.

    Reads no weights. Raises UnsupportedArchitectureError for a dense model, for experts packed in
    an unknown way, and for two stacks of decoder layers that cannot be told apart.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        stack = find_stack(name, module)
        if stack is not None:
            found.append(stack)
    if not found:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}: no module with several experts in it (num_experts and a 3-D "
            "down_proj, or a layout of JetMoe or DBRX); the model is dense, or quantized in a way "
            "that is not known here"
        )
    entries: list[ExpertsModule] = []
    count: dict[int, int] = {}
    for stack in found:
        layer = decoder_layer(stack.name)
        if layer is not None:
            first = count.get(layer, 0)
            count[layer] = first + stack.n_experts
            entries.append(ExpertsModule(layer, first, stack))
    if not entries:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}: experts are in {found[0].name!r}, which names no decoder "
            "layer of a language model (expected a name such as model.layers.3.mlp.experts)"
        )
    return LiveExperts(tuple(sorted(entries, key=lambda entry: (entry.layer, entry.first))))
