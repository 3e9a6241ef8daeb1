"""A layer's experts for several sequences at once: each is fetched and decoded once for all.

Strands (`model/strands.py`) that have come to the layer are served by one visit of their union.
Of those with one token, the rows that an expert gets are computed together, ROWS at a time
(`model/joined.py` says why that changes no bit); of those with more (prompts), each one's apart, as
it is alone. Outputs are summed for each sequence by itself, in its router's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moebound.model.joined import compute_rows, least_rows, worth_joining
from moebound.model.strands import current
from moebound.offload.meter import clock
from moebound.offload.on_demand import LayerExperts, expert_output, places_of, sum_of_one
from moebound.offload.slots import Slot, SlotKind

Compute = Callable[[int, Slot | None], None]
Finish = Callable[[], torch.Tensor]

_LEAST = dict[tuple[SlotKind, torch.dtype], int | None]()
"""Of such experts, as `least_rows`: tried out once."""


@dataclass(frozen=True, eq=False)
class Call:
    """What the experts function was called with, by one strand."""

    module: Any
    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor

    @property
    def one(self) -> bool:
        return len(self.x) == 1


class JointExperts(LayerExperts):
    """As LayerExperts; and in strands that join, for all of those that are at this layer."""

    def run(
        self, module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        strand = current()
        if strand is None or not strand.joins:
            return super().run(module, x, chosen, weights)
        call = Call(module, x, chosen, weights)
        found: torch.Tensor = strand.meet(self, call, self._run_all, patient=True)
        return found

    def _run_all(self, calls: Sequence[Call]) -> list[torch.Tensor]:
        begin = clock()
        module = calls[0].module
        ones = [call for call in calls if call.one]
        computes, finishes = list[Compute](), dict[Call, Finish]()
        if ones:
            compute, finishes = self._of_ones(ones)
            computes.append(compute)
        for call in calls:
            if not call.one:
                compute, finishes[call] = self._of_many(module, call.x, call.chosen, call.weights)
                computes.append(compute)

        def compute_all(loaded: int, slot: Slot | None) -> None:
            for compute in computes:
                compute(loaded, slot)

        self._fetcher.decoding = len(ones) == len(calls)
        self._visit(
            module,
            torch.cat([call.chosen for call in calls]),
            torch.cat([call.weights for call in calls]),
            torch.cat([call.x for call in calls]),
            compute_all,
        )
        found = [finishes[call]() for call in calls]
        self._fetcher.meter.add(experts_s=clock() - begin)
        return found

    def _of_ones(self, calls: Sequence[Call]) -> tuple[Compute, dict[Call, Finish]]:
        places = [places_of(call.chosen) for call in calls]
        tables = [
            torch.zeros((call.chosen.shape[1], call.x.shape[1]), dtype=call.x.dtype,
                        device=call.x.device)
            for call in calls
        ]  # fmt: skip

        def compute(loaded: int, slot: Slot | None) -> None:
            for expert in self._computes_for.get(loaded, (loaded,)):
                owners = [i for i, place in enumerate(places) if expert in place]
                if not owners:
                    continue
                if slot is None:
                    for i in owners:
                        tables[i][places[i][expert]] = 0
                    continue
                found = self._rows(calls[0].module, expert, slot, [calls[i].x for i in owners])
                for i, row in zip(owners, found, strict=True):
                    tables[i][places[i][expert]] = row[0]

        def finish(call: Call, table: torch.Tensor) -> Finish:
            return lambda: sum_of_one(call.module, table, call.weights).to(call.x.dtype)

        return compute, {c: finish(c, table) for c, table in zip(calls, tables, strict=True)}

    def _rows(
        self, module: Any, expert: int, slot: Slot, rows: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """An expert's output for each of [1, H]."""

        def compute(x: torch.Tensor) -> torch.Tensor:
            return expert_output(module, expert, slot, x, self.dtype)

        if not worth_joining(sum(torch.Size(shape).numel() for _, shape in slot.kind.shapes)):
            return compute_rows(compute, rows, None)
        way = slot.kind, self.dtype
        if way not in _LEAST:
            _LEAST[way] = least_rows(
                compute, rows[0].shape[1], dtype=rows[0].dtype, device=rows[0].device
            )
        return compute_rows(compute, rows, _LEAST[way])
