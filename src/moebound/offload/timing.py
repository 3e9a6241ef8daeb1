"""How long a token's products take, with weights that come from memory, as they do when it runs.

Between two uses of an expert a token reads everything else, more than a processor's cache has. So a
product is timed only behind `Between.read`, which multiplies by as much: by the model's own linear
layers, whose memory is there already, and where they are too few (or there is no model yet, as in
`moebound fit`) by one more. Timed in a loop by itself, the same expert stays in the cache, and
costs a third or less of what it will.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moebound.model.code_linear import CodeLinear
from moebound.model.few_rows import multiply_few_rows
from moebound.offload.meter import clock
from moebound.offload.slots import SlotKind

LAYER_S = 2e-3
"""Seconds a layer for all but its products: Python, attention, handing experts over. By
bench/results/offload-codes.json (AMD EPYC, two cores): the time of a pass outside of experts, less
186 MB at the speed of its experts' products, over five layers, and what experts took but for
waiting and products, over four."""

CACHE_BYTES = 32 << 20
"""Of a processor that does not say how large its cache is."""
MOST_BETWEEN = 256 << 20
"""Read between two products, at most."""
REPEATS = 8
"""At load, which is not to take longer by what is found out. `moebound fit` has more time."""
_WIDTH = 2048
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before a device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for file in _CACHES.glob("index*/size"):
        try:
            sizes.append(int(file.read_text(encoding="ascii").strip().removesuffix("K")) << 10)
        except (OSError, ValueError):
            continue
    return max(sizes) or CACHE_BYTES


class Between:
    """What a token reads between two uses of an expert.

    layers: linear layers of the model, any of them. all_bytes: that take turns in all, experts
    too: where they fit into the cache, no more is read than that. n_bytes: that `read` reads.
    """

    def __init__(
        self,
        layers: Iterable[nn.Linear],
        device: torch.device,
        dtype: torch.dtype,
        *,
        all_bytes: int | None = None,
    ) -> None:
        self.device = device
        wanted = min(MOST_BETWEEN, 2 * cache_bytes(device))
        if all_bytes is not None:
            wanted = min(wanted, all_bytes)
        self._layers, self.n_bytes = list[nn.Linear](), 0
        # A layer as large as all that is wanted would take too long to read each time.
        fitting = [some for some in layers if _usable(some, device) and _bytes(some) <= wanted]
        step = max(1, sum(map(_bytes, fitting)) // max(1, wanted))
        for some in fitting[::step]:
            if self.n_bytes >= wanted:
                break
            self._add(some)
        rows = -(-(wanted - self.n_bytes) // (_WIDTH * dtype.itemsize))
        if rows > 0:
            one_more = nn.Linear(_WIDTH, rows, bias=False, device="meta", dtype=dtype)
            one_more.to_empty(device=device)
            with torch.no_grad():
                one_more.weight.zero_()
            multiply_few_rows(nn.ModuleList([one_more]))
            self._add(one_more)
        self._rows = [
            torch.zeros((1, some.in_features), dtype=some.weight.dtype, device=device)
            for some in self._layers
        ]

    def _add(self, layer: nn.Linear) -> None:
        self._layers.append(layer)
        self.n_bytes += _bytes(layer)

    def read(self) -> list[float]:
        """One row through each layer; waits for the device. Seconds of each."""
        times = list[float]()
        with torch.inference_mode():
            for layer, row in zip(self._layers, self._rows, strict=True):
                begin = clock()
                layer(row)
                synchronize(self.device)
                times.append(clock() - begin)
        return times

    def a_byte(self, times: list[float], *, codes: bool) -> float:
        """Seconds a byte, by those of each layer: of layers that are codes, or that are not; of
        all, where there are none such."""
        timed = list(zip(self._layers, times, strict=True))
        alike = [(layer, s) for layer, s in timed if isinstance(layer, CodeLinear) == codes]
        some = alike or timed
        return sum(s for _, s in some) / sum(_bytes(layer) for layer, _ in some)


def _bytes(layer: nn.Linear) -> int:
    if isinstance(layer, CodeLinear):
        return layer.n_bytes
    return layer.weight.numel() * layer.weight.element_size()


def _usable(layer: nn.Linear, device: torch.device) -> bool:
    return layer.weight.device.type == device.type and layer.weight.dtype.is_floating_point


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Those that multiply by weights as they are, or by codes."""
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [module for module in linear if type(module) in (nn.Linear, CodeLinear)]


def read_weights(model: nn.Module) -> int:
    """Parameters that a token reads, experts or not: all but an embedding's, of which it reads a
    row, where no other layer has the same."""
    owners = dict[int, tuple[nn.Parameter, bool]]()
    for module in model.modules():
        looked_up = isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False):
            _, before = owners.get(id(parameter), (parameter, True))
            owners[id(parameter)] = parameter, before and looked_up
    return sum(parameter.numel() for parameter, looked_up in owners.values() if not looked_up)


@dataclass(frozen=True)
class Turns:
    """Seconds: byte_s, to read a byte of weights that are no expert's; code_byte_s, the same of
    their codes; compute_s, for the products of one expert and one token, by kind of slots."""

    byte_s: float
    compute_s: Mapping[SlotKind, float]
    code_byte_s: float = 0.0


def measure_turns(kinds: Iterable[SlotKind], between: Between, repeats: int = REPEATS) -> Turns:
    """Time what takes turns in a token. Of each product the least of some, since what else runs at
    load time is not what will run."""
    experts = [_Expert(kind, between.device) for kind in dict.fromkeys(kinds)]
    reading, computing = [math.inf], [[math.inf, math.inf] for _ in experts]
    for number in range(1 + repeats):
        times = between.read()
        took = [expert.products() for expert in experts]
        if number == 0:  # it has things to do that happen once
            reading *= len(times)
            continue
        reading = list(map(min, reading, times))
        computing = [list(map(min, *both)) for both in zip(computing, took, strict=True)]
    return Turns(
        between.a_byte(reading, codes=False),
        {expert.kind: sum(times) for expert, times in zip(experts, computing, strict=True)},
        between.a_byte(reading, codes=True),
    )


class _Expert:
    """A slot with no weights in it, and a token for it."""

    def __init__(self, kind: SlotKind, device: torch.device) -> None:
        self.kind, self._slot = kind, kind.empty(device)
        self._slot.zero()
        axis = -2 if kind.transposed else -1
        (_, first), (_, down) = kind.shapes
        self._n_inner = down[axis]
        self._x = torch.zeros((1, first[axis]), dtype=kind.dtype, device=device)

    def products(self) -> list[float]:
        """Seconds of either."""
        device = self._x.device
        with torch.inference_mode():
            begin = clock()
            inner = self._slot.project(self.kind.shapes[0][0], self._x)
            synchronize(device)
            between = clock()
            self._slot.project("down_proj", inner[:, : self._n_inner])
            synchronize(device)
            return [between - begin, clock() - between]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
