"""How far one model is from another, with everything that is needed to believe it.

    receipt(load("builtin:wordmath"), text_of_task(...), Folder("store"))

The original reads a text, and what it predicts is kept; then the other reads the same tokens. One
of them is in memory at a time. The other is a checkpoint or a store, which transformers runs, or a
GGUF file, which llama.cpp runs: then engines differ too, and what that alone makes is the noise
floor, measured on an unquantized GGUF file of the original.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from moebound.errors import CheckpointError
from moebound.evaluate.fidelity import LOGITS_BYTES, logits_of, predicted, vocabulary_of
from moebound.evaluate.kl import Predicted, Sums, kept_tokens
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.perplexity import Perplexity
from moebound.evaluate.text import Batch, Rows, batches, pad
from moebound.extras import need
from moebound.files.documents import Format
from moebound.score import Score
from moebound.score.record import QUANTILES

FORMAT = Format("moebound.receipt", 1)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reading:
    """A text, tokenized. name, sha256: of the task or file, and of its token ids. rows: (prompt,
    solution) of each sequence. has_answers: whether solutions are something else than the text."""

    name: str
    sha256: str
    rows: Rows
    has_answers: bool


@dataclass(frozen=True)
class Side:
    """One of the two models. n_bytes: of its files, all of them. perplexity, answers: over all
    tokens, and over those of solutions."""

    name: str
    engine: str
    n_bytes: int
    perplexity: Perplexity
    answers: Perplexity

    def to_json(self, has_answers: bool) -> dict[str, Any]:
        return {
            "name": self.name,
            "engine": self.engine,
            "n_bytes": self.n_bytes,
            "perplexity": self.perplexity.to_json(),
            "answers": {"perplexity": self.answers.to_json()} if has_answers else None,
        }


@dataclass(frozen=True)
class Receipt:
    """What `moebound compare` found. n_weights: of the original. floor: of an unquantized file of
    the original in the other engine, None where none was read."""

    text: Reading
    original: Side
    other: Side
    n_weights: int
    score: Score
    floor: Score | None = None
    floor_name: str | None = None

    @property
    def whole_bits_per_weight(self) -> float:
        """Every byte of the other's files, over the weights of the original."""
        return 8 * self.other.n_bytes / self.n_weights

    def to_json(self) -> dict[str, Any]:
        has_answers = self.text.has_answers
        return {
            "format": FORMAT.name,
            "version": FORMAT.version,
            "text": {
                "name": self.text.name,
                "sha256": self.text.sha256,
                "sequences": self.score.n_problems,
                "tokens": self.score.n_tokens,
                "answer_tokens": self.score.n_answer_tokens if has_answers else None,
            },
            "original": self.original.to_json(has_answers),
            "other": self.other.to_json(has_answers),
            "n_weights": self.n_weights,
            "whole_bits_per_weight": self.whole_bits_per_weight,
            **distances(self.score, has_answers),
            "exact": self.score.exact,
            "noise_floor": None
            if self.floor is None
            else {"name": self.floor_name, **distances(self.floor, has_answers)},
        }


def distances(score: Score, has_answers: bool) -> dict[str, Any]:
    """kl (mean, median, p99, p999, each with its standard error) and top1, over all tokens; and
    under `answers` over those of solutions."""
    found = _distances(score, "")
    return {**found, "answers": _distances(score, "answer_") if has_answers else None}


def _distances(score: Score, prefix: str) -> dict[str, Any]:
    kl = {
        "mean": getattr(score, f"{prefix}kl_nats"),
        "mean_stderr": getattr(score, f"{prefix}kl_stderr"),
    }
    for name in QUANTILES:
        kl[name] = getattr(score, f"{prefix}kl_{name}_nats")
        kl[f"{name}_stderr"] = getattr(score, f"{prefix}kl_{name}_stderr")
    return {"kl": kl, "top1": getattr(score, f"{prefix}top1_agreement")}


class Other(Protocol):
    """A model to be compared. n_bytes: of its files."""

    name: str
    n_bytes: int
    engine: str

    def open(self, vocabulary: int) -> Callable[[Batch], torch.Tensor]:
        """What gives logits [B, T, V] of a batch. Raises CheckpointError for a model of another
        vocabulary."""
        ...


@dataclass
class Folder:
    """A checkpoint, store, built-in model or hub id, run by transformers in float32."""

    name: str
    engine: str = field(init=False, default="transformers")
    n_bytes: int = field(init=False, default=0)

    def open(self, vocabulary: int) -> Callable[[Batch], torch.Tensor]:
        loaded = load(self.name)
        self.engine, self.n_bytes = engine_of(loaded), bytes_of(self.name)
        _check(self.name, vocabulary_of(loaded.model), vocabulary)
        return lambda batch: logits_of(loaded.model, batch)


@dataclass
class Gguf:
    """A GGUF file, run by llama.cpp, which is given token ids: its own tokenizer is not used."""

    name: str
    engine: str = field(init=False, default="llama.cpp")
    n_bytes: int = field(init=False, default=0)

    def open(self, vocabulary: int) -> Callable[[Batch], torch.Tensor]:
        llama_cpp = need("llama_cpp", "reading GGUF")
        self.engine, self.n_bytes = f"llama.cpp ({llama_cpp.__version__})", bytes_of(self.name)
        try:
            model = llama_cpp.Llama(self.name, n_ctx=0, logits_all=True, verbose=False)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise CheckpointError(f"{self.name}: llama.cpp cannot load it: {error}") from error
        _check(self.name, model.n_vocab(), vocabulary)

        def read(batch: Batch) -> torch.Tensor:
            found = torch.zeros(*batch.input_ids.shape, vocabulary)
            for row, ids in enumerate(batch.input_ids):
                n = int(batch.attention_mask[row].sum())
                model.reset()
                model.eval(ids[:n].tolist())
                found[row, :n] = torch.from_numpy(model.scores[:n])
            return found

        return read


def other_of(name: str) -> Folder | Gguf:
    return Gguf(name) if name.endswith(".gguf") else Folder(name)


def receipt(
    src: str, other: str, text: Callable[[Loaded], Reading], *, floor: str | None = None,
    say: Progress = lambda what, done, total: None,
) -> Receipt:  # fmt: skip
    """Read a text with the model of `src`, then with another.

    text: gives it, tokenized as the first reads it. floor: an unquantized file of the first for the
    other's engine. Raises CheckpointError for models that cannot be loaded or have another
    vocabulary, BackendUnavailable for GGUF without llama-cpp-python, and what `text` raises.
    """
    loaded = load(src)
    reading = text(loaded)
    vocabulary = vocabulary_of(loaded.model)
    parts = [
        (torch.tensor(rows), pad([reading.rows[row] for row in rows], 0))
        for rows in batches(reading.rows, max(1, LOGITS_BYTES // (8 * vocabulary)))
    ]
    before, sums = [], _Likelihoods(len(reading.rows))
    for number, (rows, batch) in enumerate(parts):
        say(src, number, len(parts))
        logits = logits_of(loaded.model, batch)
        before.append(predicted(logits, batch, kept_tokens(vocabulary)))
        sums.add(rows, batch, logits)
    original = sums.side(src, engine_of(loaded), bytes_of(src))
    n_weights = sum(p.numel() for p in loaded.model.parameters())
    del loaded
    gc.collect()
    score, side = _compare(other_of(other), vocabulary, parts, before, say)
    floor_score = None
    if floor is not None:
        floor_score, _ = _compare(other_of(floor), vocabulary, parts, before, say)
    return Receipt(reading, original, side, n_weights, score, floor_score, floor)


def _compare(
    other: Other, vocabulary: int, parts: Sequence[tuple[torch.Tensor, Batch]],
    before: Sequence[list[Predicted]], say: Progress,
) -> tuple[Score, Side]:  # fmt: skip
    n_rows = sum(len(rows) for rows, _ in parts)
    found, sums = Sums(n_rows), _Likelihoods(n_rows)
    read = other.open(vocabulary)
    for number, ((rows, batch), kept) in enumerate(zip(parts, before, strict=True)):
        say(other.name, number, len(parts))
        logits = read(batch)
        found.add(rows, batch, kept, logits)
        sums.add(rows, batch, logits)
    return found.score(), sums.side(other.name, other.engine, other.n_bytes)


class _Likelihoods:
    """Sums of negative log-likelihoods, of each sequence: over all tokens, and over solutions'."""

    def __init__(self, n_rows: int) -> None:
        self._sums = torch.zeros(4, n_rows, dtype=torch.float64)

    def add(self, rows: torch.Tensor, batch: Batch, logits: torch.Tensor) -> None:
        assert batch.targets is not None  # `pad` knows them
        for at, row in enumerate(rows.tolist()):  # one at a time: float64 of a vocabulary is large
            logs = torch.log_softmax(logits[at, :-1].double(), dim=-1).cpu()
            nats = -logs.gather(1, batch.targets[at, :, None])[:, 0]
            for first, mask in ((0, batch.predicts[at]), (2, batch.answers[at])):
                self._sums[first, row] = nats[mask].sum()
                self._sums[first + 1, row] = mask.sum()

    def side(self, name: str, engine: str, n_bytes: int) -> Side:
        all_tokens, answers = self._sums.reshape(2, 2, -1).tolist()
        return Side(name, engine, n_bytes, Perplexity.of(*all_tokens), Perplexity.of(*answers))


def engine_of(loaded: Loaded) -> str:
    import transformers

    return f"transformers {transformers.__version__}, {loaded.source.dtype}"


def bytes_of(src: str) -> int:
    """Of all files of a model: the folder's, hidden ones not, or the one file's."""
    from moebound.checkpoint import local_folder
    from moebound.checkpoint.gguf_source import gguf_file, split_set

    path = Path(src)
    if (first := gguf_file(path)) is not None:
        return sum(file.stat().st_size for file in split_set(first))
    if path.is_file():
        return path.stat().st_size
    files = (p for p in local_folder(src).rglob("*") if not p.name.startswith("."))
    return sum(file.stat().st_size for file in files if file.is_file())


def _check(name: str, found: int, vocabulary: int) -> None:
    if found != vocabulary:
        raise CheckpointError(
            f"{name}: a vocabulary of {found} tokens, expected the original's {vocabulary}; is it "
            "another model?"
        )
