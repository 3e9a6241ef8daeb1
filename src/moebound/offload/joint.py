"""A layer's experts for several sequences at once: each is fetched and decoded once for all.

Strands (`model/strands.py`) that have come to the layer are served by one visit of their union.
Of those with one token, the rows that an expert gets are computed together, ROWS at a time
(`model/joined.py` says why that changes no bit); of those with more (prompts), each one's apart, as
it is alone. Outputs are summed for each sequence by itself, in its router's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from moebound.model.joined import ROWS, compute_rows, least_rows, worth_joining
from moebound.model.strands import current, rows
from moebound.offload.compute import FewRows, expert_output, few_rows_outputs
from moebound.offload.fetcher import Compute
from moebound.offload.meter import clock
from moebound.offload.on_demand import LayerExperts, places_of, sum_of_one
from moebound.offload.slots import Slot, SlotKind

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
        if (some := rows()) is not None and len(x) == len(some.owners):
            split = [torch.split(some_rows, 1) for some_rows in (x, chosen, weights)]
            calls = [Call(module, *row) for row in zip(*split, strict=True)]
            with self._fetcher.meter.uncounted() if some.trial else nullcontext():
                return torch.cat(self._run_all(calls))
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

        def compute_all(some: Mapping[int, Slot | None], threads: int) -> None:
            for compute in computes:
                compute(some, threads)

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

        def compute(some: Mapping[int, Slot | None], threads: int) -> None:
            wanted, owners = list[FewRows](), list[list[int]]()
            for expert, slot in self._computed(some):
                of = [i for i, place in enumerate(places) if expert in place]
                if slot is None:
                    for i in of:
                        tables[i][places[i][expert]] = 0
                elif of and self._least(calls[0], expert, slot) == 1:
                    for start in range(0, len(of), ROWS):
                        owners.append(of[start : start + ROWS])
                        rows = torch.cat([calls[i].x for i in owners[-1]])
                        wanted.append(FewRows(expert, slot, rows))
                elif of:
                    found = self._rows(calls[0], expert, slot, [calls[i].x for i in of])
                    for i, row in zip(of, found, strict=True):
                        tables[i][places[i][expert]] = row[0]
            outputs = few_rows_outputs(calls[0].module, wanted, self.dtype, threads)
            for one, of, output in zip(wanted, owners, outputs, strict=True):
                for i, row in zip(of, output, strict=True):
                    tables[i][places[i][one.expert]] = row

        def finish(call: Call, table: torch.Tensor) -> Finish:
            return lambda: sum_of_one(call.module, table, call.weights).to(call.x.dtype)

        return compute, {c: finish(c, table) for c, table in zip(calls, tables, strict=True)}

    def _rows(
        self, call: Call, expert: int, slot: Slot, rows: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """An expert's output for each of [1, H]."""

        def compute(x: torch.Tensor) -> torch.Tensor:
            return expert_output(call.module, expert, slot, x, self.dtype)

        return compute_rows(compute, rows, self._least(call, expert, slot))

    def _least(self, call: Call, expert: int, slot: Slot) -> int | None:
        """From how many rows on such experts are computed together, as `least_rows`."""
        if not worth_joining(sum(torch.Size(shape).numel() for _, shape in slot.kind.shapes)):
            return None
        way = slot.kind, self.dtype
        if way not in _LEAST:
            _LEAST[way] = least_rows(
                lambda x: expert_output(call.module, expert, slot, x, self.dtype),
                call.x.shape[1],
                dtype=call.x.dtype,
                device=call.x.device,
            )
        return _LEAST[way]
