"""Make a map, layer by layer; what is finished is kept beside the file (`rows`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from moebound.jobs.workers import Workers
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

Kind = Literal["costs", "layers", "joint"]
ListedTies = Sequence[Sequence[Sequence[Any]]]
"""Place, position, margin and cost of each tie of each sequence, as rows have them."""

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
        path: Path | None,
        say: Say = lambda *_: None,
    ) -> None:
        """path: of the map; None for a worker, which computes parts of one."""
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
        self.weights = header["weights"]
        if path is not None:
            self.rows = Rows(path, header)
        self._uncosted: list[list[Tie]] | None = None
        self._tied_in = 0.0
        self.total = len(self.entries) + 2 + len(settings.rates)
        self.done = 0

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        task: Task,
        limit: int | None,
        settings: MapSettings,
        path: Path | None,
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

    def run(self, workers: Workers | None = None) -> SensitivityMap:
        """All that is not done yet; then the map is written, and the rows are removed. workers: of
        `parts`, for this very map; None for this process."""
        assert self.path is not None
        try:
            finished = list(self.rows.found)
            ties_row = next((row for row in finished if row["kind"] == "ties"), None)
            if ties_row is None:
                ties_row = self._keep(self._ties(workers), finished)
            self._step("routing decisions near a tie")
            ties = _ties_of(ties_row["ties"])
            have = {row["place"] for row in finished if row["kind"] == "layer"}
            self.done += len(have)
            missing = [place for place in range(len(self.entries)) if place not in have]
            n_gradients = self.settings.n_probes + _n_ties(ties)
            groups = list(self._groups(missing, n_gradients, workers))
            for row in self._rows(workers, "layers", groups, ties_row["ties"]):
                self._keep(row, finished)
                self._step(f"layer {self.entries[row['place']].layer}")
            have_rates = {row["rate"] for row in finished if row["kind"] == "joint"}
            self.done += len(have_rates)
            todo = [rate for rate in self.settings.rates if rate not in have_rates]
            rates = [todo] if workers is None else [[rate] for rate in todo]
            for row in self._rows(workers, "joint", rates, ties_row["ties"]) if todo else ():
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

    def _rows(
        self, workers: Workers | None, kind: Kind, parts: Sequence[Sequence[Any]], ties: ListedTies
    ) -> Iterator[dict[str, Any]]:
        """The rows of these parts, in any order where there are workers."""
        if workers is None:
            for part in parts:
                yield from self.part(kind, part, ties)
        elif parts:
            for rows in workers.run([(kind, part) for part in parts], {"ties": ties}):
                yield from rows

    def part(self, kind: Kind, which: Sequence[Any], ties: ListedTies) -> Iterator[dict[str, Any]]:
        """One part: what flips cost in some experts modules, rows of some, rows of some rates."""
        if kind == "costs":
            yield self._costs(which)
        elif kind == "layers":
            yield from self._group(which, _ties_of(ties))
        else:
            yield from self._joint(which)

    def _keep(self, row: dict[str, Any], finished: list[dict[str, Any]]) -> dict[str, Any]:
        self.rows.append(row)
        finished.append(row)
        return row

    def _step(self, what: str) -> None:
        self.done += 1
        self.say(what, self.done, self.total)

    def _groups(
        self, places: Sequence[int], n_gradients: int, workers: Workers | None
    ) -> Iterator[list[int]]:
        """So many experts modules at a time that what is kept of them fits in memory, and that
        every worker has some. What is found of one does not depend on the others."""
        most = len(places) if workers is None else -(-len(places) // workers.count)
        width = 4 * self.calibration.input_ids.numel() * (n_gradients + 1)
        start = 0
        while start < len(places):
            stop, held = start, 0
            while stop < len(places) and stop - start < most:
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

    def _ties(self, workers: Workers | None) -> dict[str, Any]:
        if not self.settings.n_ties:
            self._step("gradients")
            none: list[list[Any]] = [[] for _ in range(self.calibration.n_sequences)]
            return {"kind": "ties", "ties": none, "seconds": 0.0}
        if workers is None:
            self._found_ties()
        self._step("gradients")
        groups = list(self._groups(range(len(self.entries)), 1, workers))
        rows = list(self._rows(workers, "costs", groups, []))
        sequences = zip(*(row["ties"] for row in rows), strict=True)
        # In the order of the layers, and of positions in them, whoever was first.
        listed = [sorted((tie for some in parts for tie in some), key=lambda tie: (tie[0], tie[1]))
                  for parts in sequences]  # fmt: skip
        return {"kind": "ties", "ties": listed, "seconds": sum(row["seconds"] for row in rows)}

    def _found_ties(self) -> list[list[Tie]]:
        """Without measured costs; once."""
        if self._uncosted is None:
            s, began = self.settings, self.clock()
            self._uncosted = find_ties(
                self.model, self.calibration, self.entries, n_ties=s.n_ties, n_probes=s.n_probes,
                seed=s.seed, tokens=s.batch_tokens,
            )  # fmt: skip
            self._tied_in = self.clock() - began
        return self._uncosted

    def _costs(self, group: Sequence[int]) -> dict[str, Any]:
        """The ties of some experts modules, with what each flip costs. seconds: of CPU; those of
        finding all ties are the first part's."""
        inside, all_ties = set(group), self._found_ties()
        began, self._tied_in = self.clock() - self._tied_in, 0.0
        mine = [[tie for tie in some if tie.place in inside] for some in all_ties]
        found = with_costs(mine, self._replays(group), tokens=self.settings.batch_tokens)
        listed = [[[t.place, t.position, t.margin, t.cost] for t in some] for some in found]
        return {"ties": listed, "seconds": self.clock() - began}

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


def _ties_of(listed: ListedTies) -> list[list[Tie]]:
    return [[Tie(*tie) for tie in some] for some in listed]


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
