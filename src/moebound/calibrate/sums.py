"""What is summed up of some experts of one layer while a text is read: the arrays of
`files/formats/statistics.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moebound.checkpoint import Role
from moebound.errors import MoeboundError
from moebound.files.formats.statistics import RATIOS, Chunk, Of, Part, packed_size
from moebound.model.calls import Pairs
from moebound.model.gradients import pair_gradients
from moebound.model.inner import inner
from moebound.model.live import ExpertsModule

_BLOCK = 512
"""Rows of H that are added to at once; what is left of them below the diagonal is not."""


@dataclass(frozen=True)
class Span:
    """Some experts of one layer: those from `first` on, counted within its module."""

    entry: ExpertsModule
    first: int
    n: int

    @property
    def part(self) -> Part:
        return Part.of(self.entry.layer, self.entry.first + self.first, self.n)


class Sums:
    """Of some experts of one layer, while the text is read. On the model's device."""

    def __init__(self, span: Span, of: Of, device: torch.device) -> None:
        # Whose experts put out constants cannot be checked; the model was, before it was edited.
        self.span, self.of, self.checked = span, of, of.after is not None
        full = of.moments == "full"

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = zeros(span.n, dtype=torch.int64)
        self.gates = zeros(span.n, dtype=torch.float64)
        # One by one, so that each can go when it is packed. Of a whole H, only the upper half.
        # By what g, or its square root, multiplies: H of g², and that of g if it is asked for.
        self.moments = [
            tuple(
                [zeros(n, *([n] if full else [])) for _ in range(span.n)]
                for n in (of.width, of.inner)
            )
            for _ in range(1 + of.affinity)
        ]
        self.outputs = zeros(span.n, 2, of.width)
        self.sent = zeros(span.n, dtype=torch.int64)
        self.sent_gates = zeros(span.n, dtype=torch.float64)
        self.norms = zeros(span.n, dtype=torch.float64)
        self.plain = zeros(span.n, 2, of.width, dtype=torch.float64)
        self.ratios = zeros(span.n, RATIOS, dtype=torch.int64)
        # Of --fisher: a call whose gradient has not come yet, and sums of squares by row.
        self.open: Pairs | None = None
        self.rows: dict[Role, torch.Tensor] = {}
        if of.fisher:
            self.rows = {
                role: zeros(span.n, of.width if role == "down" else of.inner, dtype=torch.float64)
                for role in span.entry.stack.places
            }
        self.logits: torch.Tensor | None = None
        self.heard: torch.Tensor | None = None

    def hear_router(self, _router: Any, _args: Any, output: Any) -> None:
        """Keep the logits of the call that comes next: the first part that has one an expert."""
        for part in output if isinstance(output, tuple) else (output,):
            floats = isinstance(part, torch.Tensor) and part.is_floating_point()
            if floats and part.shape[-1] == self.span.entry.stack.n_experts:
                self.heard = part.detach().reshape(-1, part.shape[-1]).double()
                return

    @torch.no_grad()
    def add_gradient(self, gradient: torch.Tensor) -> None:
        """gradient: [T, H], of the loss by the output of the call that `add` heard last."""
        pairs, self.open = self.open, None
        if pairs is None:
            return  # a call outside of the text
        found = pair_gradients(pairs, gradient)
        loads = [found.routed.loads[expert] for expert in found.routed.used]
        into = tuple(role for role in found.gradients if role != "down")
        squares = {role: g.float().square() for role, g in found.gradients.items()}
        sides = (
            (self.moments[0][0], found.inputs, sum(squares[role].sum(1) for role in into)),
            (self.moments[0][1], found.hidden, squares["down"].sum(1)),
        )
        for sums, values, weights in sides:
            parts = zip(torch.split(values, loads), torch.split(weights, loads), strict=True)  # type: ignore[arg-type]
            for expert, (x, s) in zip(found.routed.used, parts, strict=True):
                self._add_moments(sums[expert - self.span.first], s.sqrt()[:, None] * x.float())
        for role, of_role in squares.items():
            for expert, some in zip(found.routed.used, torch.split(of_role, loads), strict=True):
                self.rows[role][expert - self.span.first] += some.double().sum(0)

    def _add_moments(self, into: torch.Tensor, values: torch.Tensor) -> None:
        if self.of.moments == "full":
            _add_moments(into, values)
        else:
            into += values.square().sum(0)

    @torch.no_grad()
    def add(self, pairs: Pairs, output: torch.Tensor | None, mask: torch.Tensor) -> None:
        """pairs: all of a call. output: of the call, None once it was compared. mask: [B, T] bool,
        tokens that are no padding."""
        if output is not None and not self.checked:
            inner(pairs).check(pairs.stack, output)
            self.checked = True
        real = mask.flatten().to(pairs.token.device)
        first, n = self.span.first, self.span.n
        sent = pairs.among(real)
        some = sent if self.of.routed else _everywhere(pairs, real)
        mine = (some.expert >= first) & (some.expert < first + n)
        found = inner(some.where(mine))
        if self.of.fisher:
            self.open = some.where(mine)
        gates = torch.zeros(len(real), pairs.stack.n_experts, device=real.device)
        gates[sent.token, sent.expert] = 1 if sent.weights is None else sent.weights.float()
        loads = [found.routed.loads[expert] for expert in found.routed.used]
        columns = (found.weights, found.inputs, found.hidden, found.outputs, found.token)
        self.sent += torch.bincount(sent.expert, minlength=first + n)[first : first + n]
        self.sent_gates += gates[:, first : first + n].double().sum(0)
        self._add_ratios(gates[real])
        self._add_logits(real)
        for expert, *some_of, token in zip(
            found.routed.used, *(torch.split(c, loads) for c in columns), strict=True
        ):
            g, x, h, y = (part.float() for part in some_of)  # one expert's at a time
            at = expert - first
            self.norms[at] += (gates[token, expert] * y.norm(dim=1)).double().sum()
            self.plain[at, 0] += y.double().sum(0)
            self.plain[at, 1] += y.double().square().sum(0)
            self.tokens[at] += len(g)
            self.gates[at] += g.double().sum()
            root = g.clamp_min(0).sqrt()
            for which, (weights, sums) in enumerate(zip((g, root), self.moments, strict=False)):
                if which == 0 and self.of.fisher:
                    continue  # weighted when the gradient has come
                for into, values in ((sums[0][at], x), (sums[1][at], h)):
                    self._add_moments(into, weights[:, None] * values)
            share = g[:, None] * y
            self.outputs[at, 0] += share.sum(0)
            self.outputs[at, 1] += share.square().sum(0)

    def _add_ratios(self, gates: torch.Tensor) -> None:
        """gates: [T, E], of real tokens; 0 for experts that are not chosen."""
        if gates.shape[1] < 2:
            return
        largest, place = gates.topk(2, dim=1)
        leading = place[:, 0] - self.span.first
        mine = (leading >= 0) & (leading < self.span.n) & (largest[:, 0] > 0)
        ratio = largest[mine, 1] / largest[mine, 0]
        step = (ratio * RATIOS).long().clamp_max(RATIOS - 1)
        counted = torch.bincount(leading[mine] * RATIOS + step, minlength=self.ratios.numel())
        self.ratios += counted.view_as(self.ratios)

    def _add_logits(self, real: torch.Tensor) -> None:
        heard, self.heard = self.heard, None
        if heard is None or len(heard) != len(real):
            return
        heard = heard[real.to(heard.device)].nan_to_num(0.0, 0.0, 0.0)  # never chosen: -inf
        mine = heard[:, self.span.first : self.span.first + self.span.n]
        added = mine.T @ heard
        self.logits = added if self.logits is None else self.logits + added

    def chunk(self) -> Chunk:
        inputs, hidden, *affinity = (_packed(sums) for pair in self.moments for sums in pair)
        return Chunk(
            self.span.part,
            tokens=self.tokens.cpu().numpy(),
            gates=self.gates.cpu().numpy(),
            inputs=inputs,
            hidden=hidden,
            outputs=self.outputs.cpu().numpy(),
            sent=self.sent.cpu().numpy(),
            sent_gates=self.sent_gates.cpu().numpy(),
            norms=self.norms.cpu().numpy(),
            plain=self.plain.cpu().numpy(),
            ratios=self.ratios.cpu().numpy(),
            logits=None if self.logits is None else self.logits.cpu().numpy(),
            **dict(zip(("inputs_affinity", "hidden_affinity"), affinity, strict=False)),
            **{f"{role}_rows": sums.cpu().numpy() for role, sums in self.rows.items()},
        )


def _add_moments(into: torch.Tensor, values: torch.Tensor) -> None:
    """Xᵀ X of values X [T, N] onto the upper half of `into` [N, N], and some of the lower; or its
    diagonal onto `into` [N]."""
    if into.dim() == 1:
        into += values.square().sum(0)
        return
    n = len(into)
    for start in range(0, n, _BLOCK):
        some = slice(start, min(start + _BLOCK, n))
        into[some, start:].addmm_(values[:, some].T, values[:, start:])


def _packed(sums: list[torch.Tensor]) -> Any:
    """[N, N] of each expert -> [E, N(N+1)/2]; diagonals as they are. Empties the list."""
    n, full = sums[0].shape[-1], sums[0].dim() == 2
    found = np.empty((len(sums), packed_size(n) if full else n), np.float32)
    rows = np.triu_indices(n) if full else (np.arange(n),)
    for at in range(len(sums)):
        found[at] = sums.pop(0).cpu().numpy()[rows]
    return found


def _everywhere(pairs: Pairs, real: torch.Tensor) -> Pairs:
    """Every real token, sent to every expert with weight 1."""
    if pairs.weights is None:
        raise MoeboundError(
            f"{pairs.stack.name}: its experts get their inputs scaled by the routing, so there are "
            "no inputs of tokens that were not sent to them; leave --all-tokens out"
        )
    tokens, n = real.nonzero()[:, 0], pairs.stack.n_experts
    expert = torch.arange(n, device=tokens.device).repeat_interleave(len(tokens))
    weights = torch.ones(len(expert), dtype=pairs.weights.dtype, device=tokens.device)
    return replace(pairs, token=tokens.repeat(n), expert=expert, weights=weights)
