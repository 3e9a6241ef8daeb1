"""The experts function `moebound`: a layer's experts are fetched while others are computed.

transformers calls it in place of a layer's own loop over experts, with the router's choice. Hits
are computed while misses are read and decoded; each expert is computed with all of its tokens at
once and let go. Outputs wait in a table, one row for each (token, expert) pair, and are added up in
the order of the router's choice: so the result does not depend, to the bit, on what was resident,
on the order of arrival or on threads. It is that of `moebound-batched` computing one by one, up to
the order of additions that of the model's own implementation. All of that with the same number of
torch's threads: a product of torch's may be summed otherwise with another.

Slots are overwritten when they are used again, and autograd keeps what was computed with. So while
a gradient is recorded, experts are copied as they arrive and computed after that, in the order of
their numbers: checkpointing asks for the same operations in the same order a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moebound.errors import CacheError
from moebound.methods import RouterEdit
from moebound.offload.compute import FewRows, expert_output, few_rows_outputs
from moebound.offload.fetcher import Compute, Fetcher
from moebound.offload.meter import clock
from moebound.offload.slots import Slot
from moebound.offload.tables import OneToken, Table, table_of

NAME = "moebound"
"""The value of `experts_implementation` that means this."""


def register_on_demand() -> None:
    """Enter the function into transformers' table under NAME. Idempotent."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, on_demand_experts)


def on_demand_experts(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Σ over a token's experts of weight · expert(x), with experts of `self.moebound`.

    hidden_states: [T, H]. top_k_index, top_k_weights: [T, K]. Returns [T, H].
    Raises CacheError for a model that `moebound.load` has not prepared, and what loading an expert
    raises, with the expert's name in front.
    """
    layer: LayerExperts | None = getattr(self, "moebound", None)
    if layer is None:
        raise CacheError(
            "experts_implementation 'moebound' is for models that moebound.load returns: "
            "there is nowhere to load experts from"
        )
    return layer.run(self, hidden_states, top_k_index, top_k_weights)


class LayerExperts:
    """Where one experts module gets its experts.

    layer, first: its experts are keys (layer, first), (layer, first + 1), and so on. edit: what
    becomes of the routing: aliases are mapped here, and experts that put out constants are not
    loaded (`integrations/transformers/router_edits.py` adds the constants). device: where they are
    computed. dtype: in which; that of their slots, until the model is cast (`whole.py`).
    """

    def __init__(
        self,
        layer: int,
        first: int,
        fetcher: Fetcher,
        edit: RouterEdit | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layer, self.first = layer, first
        self.device, self.dtype = device, dtype
        self._fetcher = fetcher
        self._alias = {} if edit is None else dict(edit.alias)
        self._computes_for: dict[int, list[int]] = {}
        for expert, target in sorted(self._alias.items()):
            self._computes_for.setdefault(target, [target]).append(expert)
        self._absent = frozenset() if edit is None else frozenset(edit.constants)

    def run(
        self, module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As `on_demand_experts`."""
        _check_computes_now()
        begin = clock()
        table = table_of(module, x, chosen, weights)

        def compute(some: Mapping[int, Slot | None], threads: int) -> None:
            self._compute(module, table, some, threads)

        self._visit(module, chosen, weights, x, compute)
        result = table.total()
        self._fetcher.meter.add(experts_s=clock() - begin)
        return result

    def whole(self, module: Any) -> dict[str, torch.Tensor]:
        """The module's parameters, as if all experts were in it: each is loaded once and copied."""
        found = dict[str, torch.Tensor]()
        n_experts = module.num_experts

        def copy(some: Mapping[int, Slot | None], threads: int) -> None:
            for expert, slot in some.items():
                for name, weights in ({} if slot is None else slot.decoded()).items():
                    if name not in found:
                        shape = (n_experts, *weights.shape)
                        found[name] = weights.new_empty(shape, dtype=self.dtype)
                    found[name][expert] = weights

        every = torch.arange(n_experts).unsqueeze(1)
        self._fetcher.decoding = False
        self._fetcher.visit(self.layer, self.first, every, torch.ones_like(every), every, copy)
        return found

    def _aliased(
        self, chosen: torch.Tensor, weights: torch.Tensor, n_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is to be loaded. Where a token has an expert twice, the first has the weight of
        both, and the other one of 0. Each is computed for its own tokens, as if it was there."""
        table = torch.arange(n_experts, device=chosen.device)
        for expert, target in self._alias.items():
            table[expert] = target
        chosen, weights = table[chosen], weights.clone()
        for later in range(1, chosen.shape[1]):
            for earlier in range(later):
                same = chosen[:, later] == chosen[:, earlier]
                weights[:, earlier] += torch.where(same, weights[:, later], 0)
                weights[:, later] = torch.where(same, 0, weights[:, later])
        return chosen, weights

    def _compute(
        self, module: Any, table: Table, some: Mapping[int, Slot | None], threads: int
    ) -> None:
        """Fill the rows of experts that are there: of one token together, of a prompt each."""
        wanted = list[FewRows]()
        for expert, slot in self._computed(some):
            if not table.wants(expert):
                continue
            rows = table.rows(expert)
            if slot is None:
                table.put(expert, None)
            elif isinstance(table, OneToken):
                wanted.append(FewRows(expert, slot, rows))
            else:
                table.put(expert, expert_output(module, expert, slot, rows, self.dtype))
        if wanted and isinstance(table, OneToken):
            wanted.sort(key=lambda one: table.place(one.expert))
            outputs = few_rows_outputs(module, wanted, self.dtype, threads)
            table.put_each([one.expert for one in wanted], outputs)

    def _computed(self, loaded: Mapping[int, Slot | None]) -> Iterator[tuple[int, Slot | None]]:
        """The experts that are computed with these: aliases are computed with their targets."""
        for number, slot in loaded.items():
            for expert in self._computes_for.get(number, (number,)):
                yield expert, slot

    def _visit(
        self,
        module: Any,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        x: torch.Tensor,
        compute: Compute,
    ) -> None:
        kept = dict[int, Slot | None]()

        def keep(some: Mapping[int, Slot | None], threads: int) -> None:
            for expert, slot in some.items():
                kept[expert] = None if slot is None else slot.copy()

        if self._alias:
            chosen, weights = self._aliased(chosen, weights, module.num_experts)
        seen = keep if _records_gradient(module, x) else compute
        self._fetcher.visit(self.layer, self.first, chosen, weights, x, seen, absent=self._absent)
        for expert in sorted(kept):
            compute({expert: kept.pop(expert)}, torch.get_num_threads())


def _check_computes_now() -> None:
    """Raises CacheError where experts would become constants, or cannot be read."""
    if torch._C._get_tracing_state() is not None:
        raise CacheError(
            "torch.jit.trace: it would keep the experts that this text chose, and use them for "
            "every other text; call the model from moebound.load itself"
        )
    if torch._C._are_functorch_transforms_active():
        raise CacheError(
            "torch.func: inside of its transforms (grad, vmap, jvp) a model from moebound.load "
            "cannot read which experts are chosen; call backward() or torch.autograd.grad instead"
        )


def _records_gradient(module: Any, x: torch.Tensor) -> bool:
    """Whether autograd will keep weights of the experts that x is computed with."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    )
