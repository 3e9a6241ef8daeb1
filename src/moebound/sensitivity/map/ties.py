"""Routing decisions that a small error may flip, and what each flip costs.

A small error in one expert changes the next layers' inputs a little, and now and then that makes a
router choose the next expert instead of its last choice: a jump, which no gradient sees, and on
models with many experts and layers the larger part of what small errors do. Which decisions those
are is known beforehand: those with a small margin m. For each sequence the M that matter most are
kept, by C / m with C the cost of the flip to second order; then the cost is measured, by making the
flip and reading the rest of the model (`replay`).

    KL ≈ ½ Σ (g · dy)²  +  Σ over ties C · P(m + h · dy < 0),  h the gradient of the margin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moebound.evaluate.calibration import Calibration
from moebound.evaluate.replay import Replay
from moebound.model.calls import Pairs
from moebound.model.live import ExpertsModule
from moebound.sensitivity.map.observe import Pass, forward, frozen, probe_generator
from moebound.sensitivity.map.sweep import Job, run_jobs


@dataclass(frozen=True, eq=False)
class Tie:
    """place: of the experts module. position: of the token in its sequence. margin: of the scores.
    cost: the KL of the flip, summed over the sequence's scored positions. by: [H], what the flip
    adds to the layer's output."""

    place: int
    position: int
    margin: float
    cost: float
    by: torch.Tensor | None = None


def find_ties(
    model: Any,
    calibration: Calibration,
    entries: Sequence[ExpertsModule],
    *,
    n_ties: int,
    n_probes: int,
    seed: int,
    tokens: int,
    done: Callable[[int], None] = lambda _: None,
) -> list[list[Tie]]:
    """The n_ties decisions of each sequence that matter most, in the order of the layers; fewer
    (the same number for all) where there are not so many. cost: to second order."""
    found: list[list[Tie]] = []
    with frozen(model):
        for number, rows in enumerate(calibration.batches(tokens)):
            now = forward(model, calibration, entries, rows, check=number == 0)
            probes = now.fisher_probes(n_probes, probe_generator(seed, rows), range(len(entries)))
            found += _most(now, probes, n_ties)
            done(rows.stop - rows.start)
    fewest = min(map(len, found), default=0)
    return [sorted(ties[:fewest], key=lambda tie: (tie.place, tie.position)) for ties in found]


@torch.no_grad()
def _most(now: Pass, probes: dict[int, torch.Tensor], n_ties: int) -> list[list[Tie]]:
    """Of each sequence of a batch, most important first."""
    n_rows = now.rows.stop - now.rows.start
    listed: list[tuple[torch.Tensor, ...]] = []
    jumps: dict[int, torch.Tensor] = {}
    for place, margin in now.margins.items():
        jump = jumps[place] = _jump(now.pairs[place], margin.last, margin.next, len(now.real))
        cost = torch.einsum("sth,th->st", probes[place].float(), jump).square().mean(0) / 2
        values = margin.values.detach().float()
        usable = now.real & torch.isfinite(values)
        weight = torch.where(usable, cost / values.clamp_min(1e-9), -1.0)
        listed.append((torch.full_like(weight, place), values, cost, weight))
    if not listed:
        return [[] for _ in range(n_rows)]
    # [modules, rows, length] each
    places, values, costs, weights = (
        torch.stack(parts).view(len(parts), n_rows, now.length)
        for parts in zip(*listed, strict=True)
    )
    result = []
    for row in range(n_rows):
        flat = weights[:, row].flatten()
        order = flat.topk(min(n_ties, int((flat >= 0).sum()))).indices
        ties = []
        for at in order.tolist():
            module, position = divmod(at, now.length)
            place = int(places[module, row, position])
            ties.append(
                Tie(
                    place,
                    position,
                    float(values[module, row, position]),
                    float(costs[module, row, position]),
                    jumps[place][row * now.length + position].clone(),
                )
            )
        result.append(ties)
    return result


def _jump(pairs: Pairs, last: torch.Tensor, following: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """[T, H]: what the layer's output changes by if `following` is taken instead of `last`, with
    the same weight: at a tie their scores are the same."""
    assert pairs.weights is not None
    is_last = pairs.expert == last[pairs.token]
    weight = torch.zeros(n_tokens, dtype=pairs.weights.dtype, device=pairs.weights.device)
    weight[pairs.token[is_last]] = pairs.weights[is_last]
    token = torch.arange(n_tokens, device=last.device)
    one, other = (
        Pairs(pairs.stack, pairs.inputs, token, expert, weight).outputs().float()
        for expert in (last, following)
    )
    return other - one


def with_costs(
    ties: Sequence[Sequence[Tie]],
    replay_of: Callable[[int], Replay],
    *,
    tokens: int,
    done: Callable[[int], None] = lambda _: None,
) -> list[list[Tie]]:
    """The same, with each flip's cost measured. replay_of: by place."""
    by_place: dict[int, list[tuple[int, int, Tie]]] = {}
    for sequence, some in enumerate(ties):
        for number, tie in enumerate(some):
            by_place.setdefault(tie.place, []).append((sequence, number, tie))
    measured = [list(some) for some in ties]
    for place, entries in by_place.items():
        jobs = [
            Job(index, sequence, torch.tensor([tie.position]), tie.by[None])
            for index, (sequence, _, tie) in enumerate(entries)
            if tie.by is not None
        ]
        for job, value in run_jobs(replay_of(place), jobs, tokens=tokens, done=done):
            sequence, number, tie = entries[job.cell]
            measured[sequence][number] = Tie(place, tie.position, tie.margin, max(0.0, value))
    return measured
