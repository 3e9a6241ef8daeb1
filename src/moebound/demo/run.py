"""The main job, case by case: compress -> verify -> load with transformers -> compare.

A case is one codec at one bound. Each makes a real store on disk, is verified against the original
checkpoint, and is loaded by `AutoModelForCausalLM.from_pretrained`; nothing is simulated.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moebound.bench import codec as bench
from moebound.bench.matrices import synthetic
from moebound.checkpoint import Checkpoint, open_checkpoint
from moebound.codec import get_codec
from moebound.demo.fidelity import Fidelity, compare, log_probabilities
from moebound.demo.machine import machine_facts, version_facts
from moebound.demo.models import answers, load_model, load_tokenizer, one_thread
from moebound.demo.prompts import Batch, Sample, make_batch, read_samples
from moebound.demo.report import FullSizeRow, ModelFacts, Report, Row, SampleAnswer
from moebound.errors import MoeboundError, StoreError
from moebound.store import Store, compress, open_store, verify
from moebound.types import ErrorBound
from moebound.wordmath.builtin import resolve

RATES = (0.1, 0.3, 0.8, 1.5)
CODECS = ("bound", "sz3", "cuszp:fixed")
EXACT_CODEC = "lossless"
STORE_FOLDER = "store"
KEPT_RATE = 0.3
"""The store at this rate (or the first one) stays, to be used after the demo."""
DECODE_PASSES = 3
DECODE_SECONDS = 1.0
"""No further pass once so much time is spent: slow codecs need no third look."""
N_SAMPLE_ANSWERS = 3
FULL_SIZE_MATRIX = "gaussian-rows"
FULL_SIZE_SECONDS = 0.5

Say = Callable[[str, int, int], None]
"""Called with what is being done, cases done, and cases in all."""


@dataclass(frozen=True)
class Case:
    codec: str
    rate: float | None

    @property
    def bound(self) -> ErrorBound:
        # An exact codec keeps any bound; the certificate then says the strictest one asked.
        return ErrorBound(min(RATES) if self.rate is None else self.rate, "rate", "expert")

    def __str__(self) -> str:
        return self.codec if self.rate is None else f"{self.codec} at rate {self.rate:g}"


def cases(codecs: Sequence[str], rates: Sequence[float]) -> list[Case]:
    """Exact codecs once, the others at each rate."""
    found = []
    for codec in codecs:
        lossy = get_codec(codec).lossy
        found += [Case(codec, rate) for rate in rates] if lossy else [Case(codec, None)]
    return found


def run(
    folder: Path,
    *,
    src: str = "builtin:wordmath",
    codecs: Sequence[str] = (*CODECS, EXACT_CODEC),
    rates: Sequence[float] = RATES,
    n_prompts: int | None = None,
    command: str = "moebound demo",
    say: Say = lambda what, done, total: None,
) -> Report:
    """Run every case; a store of one of them is left in folder/store, in place of an earlier one.

    n_prompts: use only the first so many. Raises what compress, open_checkpoint and transformers
    raise, and StoreError if folder/store is something else than a store; a bound that does not
    hold is no exception but a row with `verified` False.
    """
    _check_replaceable(folder / STORE_FOLDER)
    with one_thread():
        return _run(folder, src, codecs, rates, n_prompts, command, say)


def _run(
    folder: Path,
    src: str,
    codecs: Sequence[str],
    rates: Sequence[float],
    n_prompts: int | None,
    command: str,
    say: Say,
) -> Report:
    begun = time.monotonic()
    source = Path(resolve(src))
    checkpoint = open_checkpoint(source)
    todo = cases(codecs, rates)
    say("loading the original", 0, len(todo))
    tokenizer = load_tokenizer(source)
    samples = read_samples(source)[:n_prompts]
    batch = make_batch(samples, tokenizer)
    original = load_model(source)
    reference = log_probabilities(original, batch)
    baseline = compare(reference, reference, batch)

    lossy = [case for case in todo if case.rate is not None]
    coarsest = max(lossy or todo, key=lambda case: case.rate or 0.0)
    kept = min(lossy or todo, key=lambda case: abs((case.rate or 0.0) - KEPT_RATE))
    shown: tuple[SampleAnswer, ...] = ()
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".stores-") as scratch:
        for done, case in enumerate(todo):
            path = Path(scratch) / f"{done}"
            say_case = partial(_say_case, say, case, done, len(todo))
            row, model, fidelity = _measure(case, checkpoint, path, batch, reference, say_case)
            rows.append(row)
            if case == coarsest:
                say_case("answering")
                chosen = _choose(samples, baseline, fidelity)
                shown = tuple(
                    SampleAnswer(sample.prompt, sample.reference, before, after)
                    for sample, before, after in zip(
                        chosen,
                        answers(original, tokenizer, chosen),
                        answers(model, tokenizer, chosen),
                        strict=True,
                    )
                )
            if case == kept:
                _replace(folder / STORE_FOLDER, path)
            else:
                shutil.rmtree(path)
    say("full-size matrices", len(todo), len(todo))
    full_size = measure_full_size([c for c in codecs if get_codec(c).lossy], rates)
    say("done", len(todo), len(todo))
    return Report(
        command=command,
        model=_model_facts(src, checkpoint, original, baseline),
        rows=tuple(rows),
        full_size=full_size,
        samples=shown,
        samples_codec=coarsest.codec,
        samples_rate=coarsest.rate or 0.0,
        n_prompts=len(samples),
        n_positions=int(batch.predicts.sum()),
        machine=machine_facts(),
        versions=version_facts(),
        seconds=time.monotonic() - begun,
    )


def _say_case(say: Say, case: Case, done: int, total: int, what: str) -> None:
    say(f"{case}: {what}", done, total)


def _measure(
    case: Case,
    checkpoint: Checkpoint,
    path: Path,
    batch: Batch,
    reference: torch.Tensor,
    say: Callable[[str], None],
) -> tuple[Row, Any, Fidelity]:
    say("compressing")
    summary = compress(checkpoint, path, bound=case.bound, codec=case.codec)
    say("verifying")
    checked = verify(path, against=checkpoint)
    say("decoding")
    speed = decode_speed(open_store(path))
    say("loading and comparing")
    model = load_model(path)
    fidelity = compare(reference, log_probabilities(model, batch), batch)
    before, after = weight_file_bytes(checkpoint.path), weight_file_bytes(path)
    row = Row(
        codec=case.codec,
        rate=case.rate,
        expert_bits_per_weight=summary.expert_bits_per_weight,
        model_bits_per_weight=8 * after / summary.n_parameters,
        expert_ratio=summary.expert_bytes_before / summary.expert_bytes_after,
        model_ratio=before / after,
        worst=checked.worst,
        verified=checked.ok,
        problems=tuple(f"{problem.tensor}: {problem.message}" for problem in checked.problems),
        compress_seconds=summary.seconds,
        decode_gweights_per_s=speed,
        kl_nats=fidelity.kl_nats,
        kl_stderr=fidelity.kl_stderr,
        answer_kl_nats=fidelity.answer_kl_nats,
        top1_agreement=fidelity.top1_agreement,
        reproduced=fidelity.reproduced,
    )
    return row, model, fidelity


def decode_speed(store: Store) -> float:
    """1e9 weights a second, one thread, all experts, from memory to memory; the median pass."""
    encoded = [store.read_expert(expert.key) for expert in store.experts()]
    n_weights = sum(expert.n_weights for expert in store.experts())
    times: list[float] = []
    while len(times) < DECODE_PASSES and sum(times) < DECODE_SECONDS:
        begun = time.perf_counter()
        for expert in encoded:
            expert.decode(threads=1)
        times.append(time.perf_counter() - begun)
    return n_weights / statistics.median(times) / 1e9


def measure_full_size(codecs: Sequence[str], rates: Sequence[float]) -> tuple[FullSizeRow, ...]:
    """The same bounds on one matrix as large as a real model's, where fixed costs disappear."""
    if not codecs:
        return ()
    found = bench.run(
        synthetic([FULL_SIZE_MATRIX]), rates, codecs, seconds_per_case=FULL_SIZE_SECONDS, threads=1
    )
    return tuple(
        FullSizeRow(
            row.codec, row.rate, row.shape, row.bits_per_weight, row.entropy_bits_per_weight,
            row.max_abs_error / row.abs_bound, row.decode_gweights_per_s,
        )
        for row in found.rows
    )  # fmt: skip


def weight_file_bytes(folder: Path) -> int:
    """All bytes of the weight files: tensors, names and headers."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _choose(samples: list[Sample], before: Fidelity, after: Fidelity) -> list[Sample]:
    """What shows the effect: the first prompts that only the compressed model gets wrong, and the
    first that both get right; filled up in order. The page says that they were chosen."""
    lost = [i for i, (b, a) in enumerate(zip(before.per_prompt, after.per_prompt, strict=True))
            if b and not a]  # fmt: skip
    both = [i for i, (b, a) in enumerate(zip(before.per_prompt, after.per_prompt, strict=True))
            if b and a]  # fmt: skip
    order = [*both[:1], *lost[: N_SAMPLE_ANSWERS - 1], *both[1:], *range(len(samples))]
    chosen = list(dict.fromkeys(order))[:N_SAMPLE_ANSWERS]
    return [samples[index] for index in chosen]


def _check_replaceable(target: Path) -> None:
    """What an earlier demo left may go; what somebody else put there may not."""
    if not target.exists() and not target.is_symlink():
        return
    try:
        open_store(target)
    except MoeboundError as error:
        raise StoreError(
            f"{target}: the demo puts a store here, and found something else; choose another folder"
        ) from error


def _replace(target: Path, new: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    new.rename(target)


def _model_facts(src: str, checkpoint: Checkpoint, model: Any, baseline: Fidelity) -> ModelFacts:
    experts = checkpoint.experts()
    matrices = [matrix for expert in experts for matrix in expert.matrices]
    return ModelFacts(
        name=src,
        model_type=str(checkpoint.config.get("model_type")),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_moe_layers=len({expert.key.layer for expert in experts}),
        n_experts=len(experts),
        experts_per_token=int(checkpoint.config.get("num_experts_per_tok", 0)),
        expert_weights=sum(expert.size for expert in experts),
        weights_per_matrix=max(matrix.size for matrix in matrices),
        weight_file_bytes=weight_file_bytes(checkpoint.path),
        reproduced=baseline.reproduced,
    )
