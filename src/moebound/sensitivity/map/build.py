"""Make a map, layer by layer; what is finished is kept beside the file (`rows`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebound.evaluate.calibration import Calibration, calibration_of
from moebound.evaluate.candidate import Original, score
from moebound.evaluate.fidelity import Baseline, vocabulary_of
from moebound.evaluate.kl import kept_tokens
from moebound.evaluate.loading import Loaded
from moebound.evaluate.replay import Replay, baseline, decoder_layers
from moebound.evaluate.text import solved_rows
from moebound.files.formats.sensitivity_map import FORMAT, SensitivityMap
from moebound.model.fingerprint import of_experts
from moebound.model.live import LiveExperts, live_experts
from moebound.score.record import Tokens, finite
from moebound.sensitivity.map.layer import LayerPrediction, predict_layer
from moebound.sensitivity.map.observe import Seen, observe
from moebound.sensitivity.map.predict import Response, replaced
from moebound.sensitivity.map.rows import Rows
from moebound.sensitivity.map.settings import MapSettings
from moebound.sensitivity.map.summary import assemble, packed
from moebound.sensitivity.map.sweep import measure_experts, measure_whole
from moebound.sensitivity.map.ties import Tie, find_ties, with_costs
from moebound.sensitivity.perturb import perturbed
from moebound.tasks.base import Task
from moebound.types import ErrorBound, ExpertKey

N_NAIVE = 8
"""Naive evaluations that are timed, spread over the run, to say what the map saves."""

Say = Callable[[str, int, int], None]
"""Called with what was done, how many steps are done, and how many there are."""


@dataclass(frozen=True)
class Named:
    """What a map is of, in words. skip: problems of the task before those that are read."""

    model: str
    task: str
    skip: int | None = None


class Build:
    """One run, as far as it has come."""

    def __init__(
        self,
        model: Any,
        calibration: Calibration,
        named: Named,
        settings: MapSettings,
        path: Path,
        say: Say = lambda *_: None,
    ) -> None:
        self.model, self.calibration, self.settings, self.say = model, calibration, settings, say
        self.named, self.path = named, path
        # CPU time is the same on a busy machine; work on a GPU shows in the time that passes only.
        self.clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        self.live = live_experts(model)
        self.entries = self.live.stacks
        self.layers = decoder_layers(model, self.entries[0])
        self.sampled = _sample(self.live, settings)
        header = {
            "rows": FORMAT.name,
            "version": FORMAT.version,
            "model": named.model,
            "task": named.task,
            "text": calibration.digest,
            "weights": of_experts(self.live),
            "settings": settings.to_json(),
        }
        self.rows = Rows(path, header)
        self.total = len(self.entries) + 2 + len(settings.rates)
        self.done = 0

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        task: Task,
        limit: int | None,
        settings: MapSettings,
        path: Path,
        say: Say = lambda *_: None,
        *,
        skip: int = 0,
        tokens: Tokens = "all",
    ) -> Build:
        """A map of a loaded model, on `limit` problems of a task with their solutions, behind the
        first `skip`: those are left for measuring what came of it. tokens: which of theirs
        count."""
        problems = task.problems(None if limit is None else skip + limit)[skip:]
        text = calibration_of(solved_rows(loaded.tokenizer, task, problems), tokens)
        named = Named(loaded.source.name, task.name, skip)
        return cls(loaded.model, text, named, settings, path, say)

    def run(self) -> SensitivityMap:
        """All that is not done yet; then the map is written, and the rows are removed."""
        try:
            finished = list(self.rows.found)
            ties_row = next((row for row in finished if row["kind"] == "ties"), None)
            if ties_row is None:
                ties_row = self._keep(self._ties(), finished)
            self._step("routing decisions near a tie")
            ties = [[Tie(*tie) for tie in some] for some in ties_row["ties"]]
            have = {row["place"] for row in finished if row["kind"] == "layer"}
            self.done += len(have)
            missing = [place for place in range(len(self.entries)) if place not in have]
            for group in self._groups(missing, self.settings.n_probes + _n_ties(ties)):
                for row in self._group(group, ties):
                    self._keep(row, finished)
                    self._step(f"layer {self.entries[row['place']].layer}")
            have_rates = {row["rate"] for row in finished if row["kind"] == "joint"}
            self.done += len(have_rates)
            todo = [rate for rate in self.settings.rates if rate not in have_rates]
            for row in self._joint(todo) if todo else ():
                self._keep(row, finished)
                self._step(f"all experts at {row['rate']:g}")
            found = assemble(
                self.named.model, self.named.task, self.calibration, self.settings, finished,
                self._response(ties), skip=self.named.skip,
            )  # fmt: skip
            found.save(self.path)
            self.rows.remove()
        finally:
            self.rows.close()
        return found

    def _keep(self, row: dict[str, Any], finished: list[dict[str, Any]]) -> dict[str, Any]:
        self.rows.append(row)
        finished.append(row)
        return row

    def _step(self, what: str) -> None:
        self.done += 1
        self.say(what, self.done, self.total)

    def _groups(self, places: Sequence[int], n_gradients: int) -> Iterator[list[int]]:
        """So many experts modules at a time that what is kept of them fits in memory."""
        width = 4 * self.calibration.input_ids.numel() * (n_gradients + 1)
        start = 0
        while start < len(places):
            stop, held = start, 0
            while stop < len(places):
                held += width * self.entries[places[stop]].stack.view("down", 0).shape[0]
                if held > self.settings.memory_bytes and stop > start:
                    break
                stop += 1
            yield list(places[start:stop])
            start = stop

    def _replays(self, places: Sequence[int]) -> Callable[[int], Replay]:
        """Replays of some experts modules, by place, over one baseline."""
        keep = sorted({self.entries[place].layer for place in places})
        base = baseline(self.model, self.calibration, self.layers, keep, self.settings.batch_tokens)

        def replay_of(place: int) -> Replay:
            return Replay(self.model, self.calibration, self.layers, self.entries[place], base)

        return replay_of

    def _ties(self) -> dict[str, Any]:
        began = self.clock()
        s = self.settings
        if not s.n_ties:
            self._step("gradients")
            none: list[list[Any]] = [[] for _ in range(self.calibration.n_sequences)]
            return {"kind": "ties", "ties": none, "seconds": 0.0}
        ties = find_ties(
            self.model, self.calibration, self.entries, n_ties=s.n_ties, n_probes=s.n_probes,
            seed=s.seed, tokens=s.batch_tokens,
        )  # fmt: skip
        self._step("gradients")
        for group in self._groups(range(len(self.entries)), 1):
            inside = set(group)
            replay_of = self._replays(group)
            costed = with_costs(
                [[tie if tie.place in inside else replace(tie, by=None) for tie in some]
                 for some in ties], replay_of, tokens=s.batch_tokens,
            )  # fmt: skip
            ties = [
                [new if old.place in inside else old for old, new in zip(a, b, strict=True)]
                for a, b in zip(ties, costed, strict=True)
            ]
        listed = [[[t.place, t.position, t.margin, t.cost] for t in some] for some in ties]
        return {"kind": "ties", "ties": listed, "seconds": self.clock() - began}

    def _response(self, ties: Sequence[Sequence[Tie]]) -> Response:
        shape = len(ties), _n_ties(ties)
        margins = torch.tensor([[t.margin for t in some] for some in ties]).view(shape)
        costs = torch.tensor([[t.cost for t in some] for some in ties]).view(shape)
        return Response(self.settings.n_probes, margins, costs, self.calibration.n_positions)

    def _group(
        self, group: Sequence[int], ties: Sequence[Sequence[Tie]]
    ) -> Iterator[dict[str, Any]]:
        s, began = self.settings, self.clock()
        decisions = [[(tie.place, tie.position) for tie in some] for some in ties]
        seen = observe(
            self.model, self.calibration, self.entries, group, ties=decisions,
            n_probes=s.n_probes, seed=s.seed, tokens=s.batch_tokens,
        )  # fmt: skip
        share = (self.clock() - began) / len(group)
        replay_of = self._replays(group)
        response = self._response(ties)
        for place in group:
            yield self._layer(place, seen.pop(place), response, replay_of, share)

    def _layer(
        self,
        place: int,
        seen: Sequence[Seen],
        response: Response,
        replay_of: Callable[[int], Replay],
        share: float,
    ) -> dict[str, Any]:
        """One row. share: seconds of the passes over the text that are this module's."""
        entry, s, began = self.entries[place], self.settings, self.clock()
        found = predict_layer(self.live, entry, seen, response, rates=s.rates, codec=s.codec)
        predicted_in = share + self.clock() - began
        began = self.clock()
        sampled = [
            key.expert - entry.first
            for key in self.sampled
            if key.layer == entry.layer and 0 <= key.expert - entry.first < len(found.originals)
        ]
        replay = replay_of(place)
        kl = measure_experts(replay, found.changes, sampled, tokens=s.batch_tokens)
        # Rounding may leave a KL of nothing just below 0.
        measured = dict(zip(sampled, kl.clip(0).T.tolist(), strict=True))
        measured_in = self.clock() - began
        every = -(-len(self.entries) // N_NAIVE)
        naive = [] if place % every else [self._naive(place // every, found, replay, measured)]
        return {
            "kind": "layer",
            "place": place,
            "starts_at": replay.starts_at,
            "experts": [line.to_json() for line in found.lines(measured)],
            "slopes": packed(found.slopes),
            "predicted_in": predicted_in,
            "measured_in": measured_in,
            "naive": naive,
        }

    def _naive(
        self,
        number: int,
        found: LayerPrediction,
        replay: Replay,
        measured: Mapping[int, Sequence[float]],
    ) -> dict[str, Any]:
        """One expert at one rate by a pass of the whole model over the whole text: what it takes,
        without the time of the codec, and whether the sweep found the same."""
        rate = number % len(found.changes)
        index = next(iter(measured), 0)
        with replaced([found.originals[index]], [found.changes[rate].weights[index]]):
            began = self.clock()
            kl = measure_whole(
                self.model, self.calibration, replay.base.logits, tokens=self.settings.batch_tokens
            )
            seconds = self.clock() - began
        sweep = finite(measured[index][rate]) if index in measured else None
        return {"seconds": seconds, "kl": finite(kl), "sweep_kl": sweep}

    def _joint(self, rates: Sequence[float]) -> Iterator[dict[str, Any]]:
        text = Baseline.read(
            self.model,
            (
                (torch.arange(rows.start, rows.stop), self.calibration.batch(rows))
                for rows in self.calibration.batches(self.settings.batch_tokens)
            ),
            kept_tokens(vocabulary_of(self.model)),
            whole_answers=True,
        )
        original = Original(self.model, text)
        for rate in rates:
            bound = ErrorBound(rate, "rate", "expert")
            found = score(perturbed(self.live, f"codec:{self.settings.codec}", bound), original)
            kl = finite(found.score.kl(self.calibration.tokens)[0])
            yield {"kind": "joint", "rate": rate, "kl": kl, "score": found.score.to_json()}


def _n_ties(ties: Sequence[Sequence[Tie]]) -> int:
    return len(ties[0]) if ties else 0


def _sample(live: LiveExperts, settings: MapSettings) -> list[ExpertKey]:
    keys = list(live)
    if settings.measure == "none":
        return []
    if settings.measure == "all" or settings.n_sampled >= len(keys):
        return keys
    chosen = np.random.default_rng(settings.seed).choice(len(keys), settings.n_sampled, False)
    return [keys[index] for index in sorted(chosen.tolist())]
