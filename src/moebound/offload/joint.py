"""A layer's experts for several sequences at once: each is fetched and decoded once for all.

Strands (`model/strands.py`) that have come to the layer are served by one visit of their union. An
expert that the kernel computes row by row (`compute.row_by_row`) has the rows of all of them in one
call, but for a prompt with so many that torch computes them faster. Of other experts, the rows of
those with one token are computed together, ROWS at a time (`model/joined.py` says why that changes
no bit), and of those with more (prompts) each one's apart. So each has what it has alone. Outputs
are summed for each sequence by itself, in its router's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from moebound.model.joined import ROWS, compute_rows, least_rows, worth_joining
from moebound.model.strands import current, rows
from moebound.offload.compute import (
    FewRows,
    expert_output,
    few,
    few_rows_outputs,
    gated_by_silu,
    gated_outputs,
    in_codes,
    wants_gradient,
)
from moebound.offload.meter import clock
from moebound.offload.on_demand import LayerExperts
from moebound.offload.slots import Slot, SlotKind
from moebound.offload.tables import OneToken, Shared, Table, table_of

_LEAST = dict[tuple[SlotKind, torch.dtype], int | None]()
"""Of such experts, as `least_rows`: tried out once."""


@dataclass(frozen=True, eq=False)
class Call:
    """What the experts function was called with, by one strand."""

    module: Any
    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


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
        shared = Shared(calls[0].x, calls[0].chosen, sum(len(call.x) == 1 for call in calls))
        tables = [table_of(module, call.x, call.chosen, call.weights, shared) for call in calls]

        def compute(some: Mapping[int, Slot | None], threads: int) -> None:
            self._compute_all(module, tables, shared, some, threads)

        self._fetcher.decoding = all(len(table) == 1 for table in tables)
        self._visit(
            module,
            torch.cat([call.chosen for call in calls]),
            torch.cat([call.weights for call in calls]),
            torch.cat([call.x for call in calls]),
            compute,
        )
        found = [table.total() for table in tables]
        self._fetcher.meter.add(experts_s=clock() - begin)
        return found

    def _compute_all(
        self,
        module: Any,
        tables: Sequence[Table],
        shared: Shared,
        some: Mapping[int, Slot | None],
        threads: int,
    ) -> None:
        """Fill the rows of experts that are there, for all texts."""
        alike, ones = _Together(shared), _Together(shared)
        gated = gated_by_silu(module)
        for expert, slot in self._computed(some):
            of = [table for table in tables if table.wants(expert)]
            if slot is None:
                for table in of:
                    table.put(expert, None)
                continue
            if gated and in_codes(slot, self.dtype):
                joined = [table for table in of if self._joins(table, expert)]
                alike.add(expert, slot, joined)
                of = [table for table in of if table not in joined]
            for table in of:
                if len(table) > 1:
                    rows = table.rows(expert)
                    table.put(expert, expert_output(module, expert, slot, rows, self.dtype))
            of = [table for table in of if len(table) == 1]
            if of and self._least(module, expert, slot, of[0]) == 1:
                for start in range(0, len(of), ROWS):
                    ones.add(expert, slot, of[start : start + ROWS])
            elif of:
                self._one_by_one(module, expert, slot, of)
        if not self._fetcher.decoding:
            threads = torch.get_num_threads()
        if alike:
            x, experts = alike.experts()
            alike.put(gated_outputs(experts, self.dtype, threads, x=x))
        if ones:
            _, experts = ones.experts()
            ones.put(few_rows_outputs(module, experts, self.dtype, threads))

    def _joins(self, table: Table, expert: int) -> bool:
        """Whether a text's rows of an expert that is computed row by row go with others'."""
        rows = table.rows(expert)
        return (len(table) == 1 or few(rows, self.dtype)) and not wants_gradient(rows)

    def _one_by_one(self, module: Any, expert: int, slot: Slot, of: Sequence[Table]) -> None:
        """As torch's products allow it: each row has to be what it is alone."""

        def compute(x: torch.Tensor) -> torch.Tensor:
            return expert_output(module, expert, slot, x, self.dtype)

        rows = [table.rows(expert) for table in of]
        found = compute_rows(compute, rows, self._least(module, expert, slot, of[0]))
        for table, row in zip(of, found, strict=True):
            table.put(expert, row)

    def _least(self, module: Any, expert: int, slot: Slot, table: Table) -> int | None:
        """From how many rows on such experts are computed together, as `least_rows`."""
        if not worth_joining(sum(torch.Size(shape).numel() for _, shape in slot.kind.shapes)):
            return None
        way = slot.kind, self.dtype
        if way not in _LEAST:
            rows = table.rows(expert)
            _LEAST[way] = least_rows(
                lambda x: expert_output(module, expert, slot, x, self.dtype),
                rows.shape[1],
                dtype=rows.dtype,
                device=rows.device,
            )
        return _LEAST[way]


class _Together:
    """Experts, each with rows of several texts."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._experts = list[tuple[int, Slot, int]]()
        self._parts = list[tuple[Table, int, torch.Tensor]]()

    def __len__(self) -> int:
        return len(self._experts)

    def add(self, expert: int, slot: Slot, of: Sequence[Table]) -> None:
        if of:
            parts = [(table, expert, table.rows(expert)) for table in of]
            self._parts += parts
            self._experts.append((expert, slot, sum(len(rows) for _, _, rows in parts)))

    def experts(self) -> tuple[torch.Tensor, list[FewRows]]:
        """Their rows, one behind the other, and which of these each has."""
        x = torch.cat([rows for _, _, rows in self._parts])
        split = torch.split_with_sizes(x, [n for _, _, n in self._experts])
        return x, [
            FewRows(expert, slot, rows)
            for (expert, slot, _), rows in zip(self._experts, split, strict=True)
        ]

    def put(self, outputs: torch.Tensor) -> None:
        """outputs: of all, one behind the other."""
        ones = [(table, e) for table, e, _ in self._parts if isinstance(table, OneToken)]
        if len(ones) == len(self._parts):
            self._shared.put(ones, outputs)
            return
        split = torch.split_with_sizes(outputs, [len(rows) for _, _, rows in self._parts])
        for (table, expert, _), some in zip(self._parts, split, strict=True):
            table.put(expert, some)
