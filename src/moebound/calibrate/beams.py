"""Beam search by what a text's tokens are worth to the model, and by how evenly they use experts.

Of the continuations of a text those are kept that have the least

    -(1/n) Σ log P(token) + σ/τ

n the text's tokens behind what it began with. σ is the standard deviation over a layer's experts
of how often the text's tokens were sent to each, over the mean of that, averaged over layers
(MoEQuant, 2505.03804, expert-balanced self-sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moebound.errors import MoeboundError
from moebound.evaluate.decoding import last_logits
from moebound.model.calls import Pairs, listen
from moebound.model.live import ExpertsModule, live_experts
from moebound.text.growing_cache import GrowingCache, arguments, supports_cache

BEAMS, TAU = 4, 1.2


@dataclass(frozen=True)
class Search:
    """length: tokens of a text at most, its beginning included. beams: texts that are kept of each.
    candidates: most likely tokens that each may go on with. tau: the larger, the less experts
    count; infinite for not at all."""

    length: int
    beams: int = BEAMS
    candidates: int = 50
    tau: float = TAU


@torch.inference_mode()
def beam_search(
    model: Any,
    begins: Sequence[Sequence[int]],
    search: Search,
    ends: frozenset[int],
    done: Callable[[int], None] = lambda n: None,
) -> list[tuple[int, ...]]:
    """The best text of each beginning; all are of one length. One that reaches an end mark, which
    belongs to it, goes no further. done: called with how many texts are finished.

    Raises UnsupportedArchitectureError for a model without experts that can be heard, and
    MoeboundError where its output is no number any more.
    """
    beams = _Beams(model, begins, search, ends)
    with beams.listening():
        while left := beams.n_texts:
            beams.advance()
            if beams.n_texts < left:
                done(len(begins) - beams.n_texts)
    return beams.found


class _Beams:
    """N texts with B beams each: R = N B rows of one batch, a text's one behind the other."""

    def __init__(
        self, model: Any, begins: Sequence[Sequence[int]], search: Search, ends: frozenset[int]
    ) -> None:
        self._model, self._search = model, search
        self._ends = torch.tensor(sorted(ends), dtype=torch.long)
        self._layers = _by_layer(live_experts(model).stacks)
        self._taken = arguments(model)
        # Without a cache whose rows can change places everything is read again for every token:
        # slow, right. Some caches know their layers from the first pass on.
        self._growing = GrowingCache(model.config) if supports_cache(model) else None
        self._drop_cache()
        self.found: list[tuple[int, ...]] = [()] * len(begins)
        self._texts = list(range(len(begins)))
        self._ids = torch.tensor([list(ids) for ids in begins])  # [R, T]
        self._n_begin, self._n_read, self._reading = self._ids.shape[1], 0, 0
        rows = len(begins)
        self._ended = torch.zeros(rows, dtype=torch.bool)
        self._sums = torch.zeros(rows, dtype=torch.float64)  # of log P
        self._lengths = torch.zeros(rows, dtype=torch.float64)  # tokens that these are of
        self._used = [torch.zeros(rows, n, dtype=torch.float64) for n in self._layers.values()]

    @property
    def n_texts(self) -> int:
        """That are not finished."""
        return len(self._texts)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The experts that tokens are sent to are counted meanwhile."""
        at = {layer: number for number, layer in enumerate(self._layers)}
        handles = []
        for entry in live_experts(self._model).stacks:

            def heard(pairs: Pairs, _output: Any, entry: ExpertsModule = entry) -> None:
                token, experts = pairs.token.cpu(), pairs.expert.cpu() + entry.first
                rows, places = token // self._reading, token % self._reading + self._n_read
                # An end mark, and what stands behind it, says nothing of a text.
                counted = places < self._n_begin + self._lengths[rows] - self._ended[rows].double()
                used = self._used[at[entry.layer]]
                used.index_put_((rows, experts), counted.to(used.dtype), accumulate=True)

            n_tokens = lambda: len(self._ids) * self._reading  # noqa: E731
            handles.append(listen(entry.stack, n_tokens, heard))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def advance(self) -> None:
        """Another token of all texts; those that are finished leave."""
        if self._ids.shape[1] < self._search.length:
            self._choose(self._read().float().log_softmax(-1).cpu())
        scores = self._scores(self._sums, self._lengths)
        ended = self._ended.view(self.n_texts, -1).all(1)
        ended |= self._ids.shape[1] >= self._search.length
        beams = len(self._ids) // self.n_texts
        best = scores.view(self.n_texts, beams).argmin(1)
        for at, text in enumerate(self._texts):
            if ended[at]:
                row = at * beams + int(best[at])
                n = self._n_begin + int(self._lengths[row])
                self.found[text] = tuple(self._ids[row, :n].tolist())
        if ended.any():
            self._texts = [text for text, end in zip(self._texts, ended.tolist(), strict=True)
                           if not end]  # fmt: skip
            self._keep((~ended).repeat_interleave(beams).nonzero()[:, 0])

    def _read(self) -> torch.Tensor:
        """[R, vocabulary]: what follows each row."""
        if self._growing is None:
            self._n_read = 0
            for used in self._used:
                used.zero_()
        ids = self._ids[:, self._n_read :].to(self._model.device)
        places = torch.arange(self._n_read, self._ids.shape[1], device=ids.device)
        self._reading = ids.shape[1]
        found = last_logits(
            self._model, ids, None, places.expand(len(ids), -1), self._growing, self._taken
        )
        self._n_read = self._ids.shape[1]
        self._drop_cache()
        if not torch.isfinite(found.amax(-1)).all():
            raise MoeboundError("the model's output is no number any more, so it gives no text")
        return found

    def _drop_cache(self) -> None:
        if self._growing is not None and not self._growing.can_drop():
            self._growing = None

    def _scores(self, sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """sums, lengths: [R, ...]. The same shape."""
        spread = torch.zeros(len(self._ids), dtype=torch.float64)
        for used in self._used:
            mean = used.mean(1)
            spread += used.std(1, correction=0) / mean.clamp_min(1e-300) / len(self._used)
        spread /= self._search.tau
        return spread.view(-1, *(1 for _ in sums.shape[1:])) - sums / lengths.clamp_min(1)

    def _choose(self, logs: torch.Tensor) -> None:
        """logs: [R, vocabulary], log P."""
        likely = min(self._search.candidates, logs.shape[1])
        logs, tokens = logs.double().topk(likely, dim=1)
        sums = self._sums[:, None] + logs
        lengths = (self._lengths[:, None] + 1).expand_as(sums).clone()
        # A text that has ended goes on as it is: its first candidate is itself.
        over = self._ended
        sums[over, 1:], sums[over, 0], lengths[over] = -torch.inf, self._sums[over], (
            self._lengths[over, None]
        )  # fmt: skip
        scores = self._scores(sums, lengths).view(self.n_texts, -1)
        order = scores.sort(dim=1, stable=True).indices[:, : self._search.beams]
        place = order + torch.arange(self.n_texts)[:, None] * scores.shape[1]
        place = place.flatten()
        rows = place // likely
        self._keep(rows)
        token = tokens.flatten()[place]
        self._sums, self._lengths = sums.flatten()[place], lengths.flatten()[place]
        self._ids = torch.cat([self._ids, token[:, None]], dim=1)
        self._ended |= torch.isin(token, self._ends)

    def _keep(self, rows: torch.Tensor) -> None:
        """These rows, in this order."""
        if len(rows) == len(self._ids) and bool((rows == torch.arange(len(rows))).all()):
            return
        if self._growing is not None and len(rows):
            self._growing.keep(rows.to(self._model.device))
        self._ids, self._ended = self._ids[rows], self._ended[rows]
        self._sums, self._lengths = self._sums[rows], self._lengths[rows]
        self._used = [used[rows] for used in self._used]


def _by_layer(stacks: Sequence[ExpertsModule]) -> dict[int, int]:
    """Experts of each layer."""
    found: dict[int, int] = {}
    for entry in stacks:
        found[entry.layer] = found.get(entry.layer, 0) + entry.stack.n_experts
    return found
