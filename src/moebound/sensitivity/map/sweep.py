"""Measured KL of single experts, with everything before the perturbed layer used again.

Naively, each expert at each bound is a pass of the whole model over the whole text. Here

- a sequence that never meets the expert is not run: its KL is 0, exactly;
- layers before the perturbed one are not run (`replay`);
- what the expert puts out is known already (`predict.Layer.change`), so nothing in the model is
  written, and many experts and bounds go through the layers behind it as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moebound.evaluate.calibration import Calibration
from moebound.evaluate.kl import kl, mean
from moebound.evaluate.replay import Replay
from moebound.sensitivity.map.predict import Change, Floats


@dataclass(frozen=True, eq=False)
class Job:
    """One sequence under one change. cell: which (rate, expert) its KL is of. at, by: positions in
    the sequence [P], and the change of the layer's output there [P, H]."""

    cell: int
    sequence: int
    at: torch.Tensor
    by: torch.Tensor


def measure_experts(
    replay: Replay,
    changes: Sequence[Change],
    experts: Sequence[int],
    *,
    tokens: int,
    done: Callable[[int], None] = lambda _: None,
) -> Floats:
    """[R, len(experts)] mean KL a scored position, of each expert alone under each of R changes.

    tokens: in a batch. done: called with the number of (sequence, expert, rate) that were run.
    """
    jobs = [
        job
        for rate, change in enumerate(changes)
        for place, expert in enumerate(experts)
        for job in _jobs(change, expert, rate * len(experts) + place)
    ]
    total = np.zeros(len(changes) * len(experts))
    for job, value in run_jobs(replay, jobs, tokens=tokens, done=done):
        total[job.cell] += value
    return total.reshape(len(changes), len(experts)) / replay.calibration.n_positions


def run_jobs(
    replay: Replay,
    jobs: Sequence[Job],
    *,
    tokens: int,
    done: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[Job, float]]:
    """Each job with its KL, summed over the sequence's scored positions, in any order."""
    lengths = replay.calibration.lengths
    # Sequences are numbered by length: batches of neighbours need little padding.
    ordered = sorted(jobs, key=lambda job: job.sequence)
    start = 0
    while start < len(ordered):
        stop = start + 1
        while (
            stop < len(ordered) and lengths[ordered[stop].sequence] * (stop + 1 - start) <= tokens
        ):
            stop += 1
        some = ordered[start:stop]
        yield from zip(some, _run(replay, some), strict=True)
        done(len(some))
        start = stop


def _jobs(change: Change, expert: int, cell: int) -> list[Job]:
    jobs = []
    for seen, by in zip(change.seen, change.by, strict=True):
        mine = (seen.pairs.expert == expert).nonzero().flatten()
        sequence, position = seen.sequence[mine], seen.position[mine]
        for number in sorted(set(sequence.tolist())):
            here = (sequence == number).nonzero().flatten()
            jobs.append(Job(cell, number, position[here], by[mine[here]]))
    return jobs


@torch.inference_mode()
def _run(replay: Replay, jobs: Sequence[Job]) -> list[float]:
    calibration, device = replay.calibration, replay.model.device
    rows = torch.tensor([job.sequence for job in jobs])
    length = calibration.longest(rows)
    width = jobs[0].by.shape[-1]
    change = torch.zeros(len(jobs), length, width, device=device)
    row = torch.repeat_interleave(
        torch.arange(len(jobs)), torch.tensor([len(job.at) for job in jobs])
    ).to(device)
    # Added, not set: a router may send a token to one expert twice.
    change.index_put_(
        (row, torch.cat([job.at for job in jobs])),
        torch.cat([job.by for job in jobs]),
        accumulate=True,
    )
    found = replay.logits(rows, change.to(replay.model.dtype))
    scored = calibration.scored[rows, :length].to(device)
    before = torch.cat([replay.base.logits[job.sequence] for job in jobs])
    values = kl(before, found[scored])
    sums = torch.zeros(len(jobs), dtype=torch.float64, device=device)
    sums.index_add_(0, scored.nonzero()[:, 0], values)
    return [float(value) for value in sums]


@torch.inference_mode()
def measure_whole(
    model: Any, calibration: Calibration, before: Sequence[torch.Tensor], *, tokens: int
) -> float:
    """Mean KL a scored position of the model as it is now, by a pass over the whole text.

    before: logits of each sequence at its scored positions, unperturbed.
    """
    total = 0.0
    for rows in calibration.batches(tokens):
        logits = model(**calibration.inputs(rows, model.device)).logits
        scored = calibration.scored[rows, : logits.shape[1]].to(logits.device)
        total += float(kl(torch.cat(list(before[rows])), logits[scored]).sum())
    return mean(total, calibration.n_positions)
