"""One case after another: compress -> verify -> load with transformers -> compare.

A case is one codec at one bound, or a plan. Each makes a real store on disk, is verified against
the original checkpoint, and is loaded by `AutoModelForCausalLM.from_pretrained`; nothing is
simulated. A `Setup` opens what measures them, so that several processes can (`study/workers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moebound.checkpoint import open_checkpoint
from moebound.codec import get_codec
from moebound.demo.folder import Folder
from moebound.demo.report import StoreRow
from moebound.evaluate.candidate import Original, in_folder, score, stored
from moebound.evaluate.evaluation import with_answers
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import load
from moebound.evaluate.scoring import evaluate
from moebound.evaluate.text import solved_rows
from moebound.evaluate.transcript import read_transcript, rescore
from moebound.plan import Plan
from moebound.tasks import get_task
from moebound.types import ErrorBound
from moebound.wordmath.builtin import resolve


@dataclass(frozen=True)
class Case:
    """rate: None for an exact codec. plan: the file of a plan, to be carried out in place of one
    rate for all."""

    codec: str
    rate: float | None
    strictest: float = 0.1
    plan: Path | None = None

    @property
    def name(self) -> str:
        """Of the store's folder."""
        codec = "planned" if self.plan is not None else self.codec.replace(":", "-")
        return codec if self.rate is None else f"{codec}-{self.rate:g}"

    @property
    def bound(self) -> ErrorBound | Plan:
        if self.plan is not None:
            return Plan.load(self.plan)
        # An exact codec keeps any bound; the certificate then says the strictest one asked.
        return ErrorBound(self.strictest if self.rate is None else self.rate, "rate", "expert")


def cases(codecs: Sequence[str], rates: Sequence[float]) -> list[Case]:
    """Exact codecs once, the others at each rate."""
    found = []
    for codec in codecs:
        each = rates if get_codec(codec).lossy else [None]
        found += [Case(codec, rate, min(rates)) for rate in each]
    return found


@dataclass(frozen=True)
class Setup:
    """src: the original. task, n_problems: what is asked. folder: of the demo; its answers to the
    task are there."""

    src: str
    task: str
    n_problems: int
    folder: Path
    threads: int | None = None

    def with_threads(self, threads: int) -> Setup:
        return replace(self, threads=threads)

    def open(self) -> Stores:
        """Load the original, and let it read the problems with their solutions."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Stores(self)


class Stores:
    """Makes and measures stores of one checkpoint."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._folder = setup, Folder(setup.folder)
        self._checkpoint = open_checkpoint(resolve(setup.src))
        self._task = get_task(setup.task)
        loaded = load(setup.src)
        rows = solved_rows(loaded.tokenizer, self._task, self._task.problems(setup.n_problems))
        self._original = Original(loaded.model, Baseline.of(loaded.model, rows))
        self._answers = read_transcript(self._folder.answers(setup.task))

    def use(self, known: Mapping[str, Any]) -> None:
        """Nothing that the folder does not have."""

    def run(self, case: Case) -> StoreRow:
        """Make the store (or finish it, if it was begun), and measure it. A bound that does not
        hold is no exception but a row with `verified` False."""
        path, setup = self._folder.stores / case.name, self._setup
        bound = case.bound
        made = stored(
            self._checkpoint, path, bound, codec=case.codec, jobs=setup.threads,
            on_existing="resume", source=setup.src,
        )  # fmt: skip
        summary, checked = made.summary, made.checked
        found = score(
            in_folder(path),
            self._original,
            ask=lambda loaded: evaluate(
                loaded, self._task, limit=setup.n_problems,
                answers=self._folder.answers(case.name), drafts=self._answers.texts,
            ),
        )  # fmt: skip
        answers = rescore(self._answers, self._task)
        before, after = weight_file_bytes(self._checkpoint.path), weight_file_bytes(path)
        return StoreRow(
            name=case.name,
            codec=case.codec,
            rate=case.rate,
            planned=case.plan is not None,
            expert_bytes=summary.expert_bytes_after,
            expert_bits_per_weight=summary.expert_bits_per_weight,
            model_bits_per_weight=8 * after / summary.n_parameters,
            expert_ratio=summary.expert_bytes_before / summary.expert_bytes_after,
            model_ratio=before / after,
            predicted_bytes=bound.n_bytes if isinstance(bound, Plan) else None,
            worst=checked.worst or 0.0,
            verified=checked.ok,
            n_tensors=checked.n_tensors,
            problems=tuple(f"{problem.tensor}: {problem.message}" for problem in checked.problems),
            score=with_answers(found.score, answers, found.asked),
        )


def weight_file_bytes(folder: Path) -> int:
    """All bytes of the weight files: tensors, names and headers."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
