"""What the store's jobs report: progress while they run, a summary when they are done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from moebound.checkpoint import TensorInfo
from moebound.errors import BoundViolatedError
from moebound.files.formats.statistics import FEW_TOKENS
from moebound.methods import codec_of, weakest
from moebound.store.format import (
    CodedRecord,
    ExpertRecord,
    Others,
    PartRecord,
    Record,
    RouterRecord,
    TensorRecord,
)
from moebound.types import NUMPY_DTYPES, ErrorBound, Guarantee


@dataclass(frozen=True)
class Progress:
    """How far a job is. Bytes are of the uncompressed weights. label: what is at work."""

    done_bytes: int
    total_bytes: int
    done_experts: int
    total_experts: int
    label: str


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Adds up what is done and passes it on."""

    def __init__(
        self, callback: ProgressCallback | None, *, total_bytes: int, total_experts: int
    ) -> None:
        self._callback = callback
        self._total_bytes, self._total_experts = total_bytes, total_experts
        self._bytes = self._experts = 0

    def add(self, label: str, *, n_bytes: int, experts: int = 0) -> None:
        self._bytes += n_bytes
        self._experts += experts
        if self._callback is not None:
            self._callback(
                Progress(self._bytes, self._total_bytes, self._experts, self._total_experts, label)
            )


@dataclass(frozen=True)
class OutputTotals:
    """What became of outputs on the text that experts were rounded by, over all matrices.

    n_experts: that have the figure. without_tokens, few_tokens: how many of them saw no token, or
    fewer than FEW_TOKENS but one. median, largest: of error over power, None where none put out
    anything.
    """

    n_experts: int
    without_tokens: int
    few_tokens: int
    median: float | None
    largest: float | None

    @classmethod
    def of(cls, records: Iterable[ExpertRecord]) -> OutputTotals | None:
        """None where no outputs are certified."""
        found = [[m.certificate.outputs for m in record.matrices] for record in records]
        known = [[o for o in outputs if o is not None] for outputs in found]
        tokens = [outputs[0].tokens for outputs in known if outputs]
        if not tokens:
            return None
        relative = [r for some in known for o in some if (r := o.relative) is not None]
        return cls(
            n_experts=len(tokens),
            without_tokens=sum(n == 0 for n in tokens),
            few_tokens=sum(0 < n < FEW_TOKENS for n in tokens),
            median=median(relative) if relative else None,
            largest=max(relative, default=None),
        )


@dataclass(frozen=True)
class WithoutWeights:
    """Experts with no weights of their own in the store, of which nothing can be promised.
    left_out: never chosen. replaced: another computes in their place. constant: put out a vector.
    """

    left_out: int = 0
    replaced: int = 0
    constant: int = 0

    @classmethod
    def of(cls, records: Iterable[Record]) -> WithoutWeights:
        """By the router edits among a store's records."""
        records = list(records)
        edits = [r for r in records if isinstance(r, RouterRecord)]
        keep = {r.group: set(r.keep) for r in edits if r.keep is not None}
        experts = [r for r in records if isinstance(r, ExpertRecord) and r.group in keep]
        return cls(
            sum(r.key.expert not in keep[r.group] for r in experts),
            sum(len(r.alias) for r in edits),
            sum(len(r.constants) for r in edits),
        )

    def __bool__(self) -> bool:
        return bool(self.left_out or self.replaced or self.constant)

    def __str__(self) -> str:
        kinds = {
            "left out": self.left_out,
            "computed by another": self.replaced,
            "put out a constant": self.constant,
        }
        found = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
        return f"{found}; nothing is promised of their weights"


@dataclass(frozen=True)
class ExpertTotals:
    """Sums over the compressed experts; experts kept exact are not among them.

    guarantee: the weakest of all matrices'. worst: the largest measured error over promised error,
    at most 1 where promises are kept; None where nothing is promised. max_abs_error, rmse:
    measured, in weight units, over all of them. bytes_after: with what several experts share.
    outputs: None where no text was used.
    """

    n_experts: int
    n_weights: int
    bytes_before: int
    bytes_after: int
    guarantee: Guarantee
    worst: float | None
    max_abs_error: float
    rmse: float
    patched: int
    outputs: OutputTotals | None = None

    @classmethod
    def of(cls, records: Iterable[Record]) -> ExpertTotals:
        """records: of a store; those that are of no expert and no shared part are passed over."""
        records = list(records)
        chosen = [r for r in records if isinstance(r, ExpertRecord) and not r.exact]
        shared = [r.n_bytes for r in records if isinstance(r, (PartRecord, RouterRecord))]
        matrices = [matrix for record in chosen for matrix in record.matrices]
        found = [matrix.certificate for matrix in matrices]
        n_weights = sum(certificate.n_weights for certificate in found)
        squares = sum(
            certificate.rmse * certificate.rmse * certificate.n_weights for certificate in found
        )
        return cls(
            n_experts=len(chosen),
            n_weights=n_weights,
            bytes_before=sum(c.n_weights * NUMPY_DTYPES[c.source_dtype].itemsize for c in found),
            bytes_after=sum(c.n_bytes for c in found) + sum(shared),
            guarantee=weakest(certificate.guarantee for certificate in found),
            worst=max((m.ratio for m in matrices if m.ratio is not None), default=None),
            max_abs_error=max((c.max_abs_error for c in found), default=0.0),
            rmse=math.sqrt(squares / n_weights) if n_weights else 0.0,
            patched=sum(certificate.patched for certificate in found),
            outputs=OutputTotals.of(chosen),
        )


@dataclass(frozen=True)
class OtherTotals:
    """Sums over the coded tensors that are no expert's. guarantee, worst, max_abs_error: as of
    `ExpertTotals`; "lossless" where there are none, and no worst where all are so."""

    n_tensors: int = 0
    n_weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    guarantee: Guarantee = "lossless"
    worst: float | None = None
    max_abs_error: float = 0.0

    @classmethod
    def of(cls, records: Iterable[Record]) -> OtherTotals:
        """records: of a store."""
        coded = [record for record in records if isinstance(record, CodedRecord)]
        if not coded:
            return cls()
        found = [record.certificate for record in coded]
        lossy = [record for record in coded if record.certificate.guarantee != "lossless"]
        bounded = [record.ratio for record in lossy if record.ratio is not None]
        return cls(
            n_tensors=len(coded),
            n_weights=sum(c.n_weights for c in found),
            bytes_before=sum(c.n_weights * NUMPY_DTYPES[c.source_dtype].itemsize for c in found),
            bytes_after=sum(c.n_bytes for c in found),
            guarantee=weakest(c.guarantee for c in found),
            worst=max(bounded, default=None),
            max_abs_error=max(c.max_abs_error for c in found),
        )


@dataclass(frozen=True)
class ModelTotals:
    """All tensors of a store: how many weights they stand for, in how many bytes."""

    n_weights: int
    n_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo], records: Iterable[Record]) -> ModelTotals:
        """tensors: of the shards. records: of kept and coded tensors, and of experts."""
        weights = 0
        for record in records:
            if isinstance(record, TensorRecord):
                weights += math.prod(tensors[record.name].shape)
            elif isinstance(record, CodedRecord):
                weights += record.certificate.n_weights
            elif isinstance(record, ExpertRecord):
                weights += sum(matrix.certificate.n_weights for matrix in record.matrices)
        return cls(weights, sum(tensor.n_bytes for tensor in tensors.values()))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0


def larger(one: float | None, other: float | None) -> float | None:
    """Of two ratios; None where neither is known."""
    return max((value for value in (one, other) if value is not None), default=None)


@dataclass(frozen=True)
class CompressSummary:
    """What compressing came to.

    expert_*: the compressed experts alone. model_*: all tensors. Bytes are of tensors; shard
    headers and certificates come on top and are in store_bytes, all files of the store together.
    bits per weight: bytes after, times 8, over the parameters in question.
    guarantee: what holds for every weight of them. worst: the largest measured error over promised
    error, None where nothing is promised. max_abs_error, rmse: measured, in weight units. patched:
    weights stored verbatim. outputs: on the text that was rounded by. left_out: the source's files
    that the store does not have, with the reason. remarks: on what was asked, where it can hardly
    be meant. without_weights: experts that were left out or replaced. others: what was asked for
    all other tensors; coded: what came of it, of those that were coded.
    """

    path: str
    method: str
    bound: ErrorBound | None
    guarantee: Guarantee
    n_experts: int
    n_weights: int
    expert_bytes_before: int
    expert_bytes_after: int
    n_parameters: int
    model_bytes_before: int
    model_bytes_after: int
    store_bytes: int
    worst: float | None
    max_abs_error: float
    rmse: float
    patched: int
    seconds: float
    resumed: bool = False
    outputs: OutputTotals | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    without_weights: WithoutWeights = field(default_factory=WithoutWeights)
    others: Others = "keep"
    coded: OtherTotals = field(default_factory=OtherTotals)

    @property
    def expert_bits_per_weight(self) -> float:
        return 8 * self.expert_bytes_after / self.n_weights if self.n_weights else 0.0

    @property
    def model_bits_per_weight(self) -> float:
        return 8 * self.model_bytes_after / self.n_parameters if self.n_parameters else 0.0

    @property
    def codec(self) -> str | None:
        """Of the method that keeps bounds; None of others."""
        return codec_of(self.method)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "codec": self.codec,
            "bound": None if self.bound is None else self.bound.to_json(),
            "expert_bits_per_weight": self.expert_bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
        }


ProblemKind = Literal[
    "store", "file", "hash", "decode", "certificate", "bound", "original", "calibration"
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store.

    kind:
      store        it cannot be opened: a file is missing, damaged or contradicts another
      file         a shard's header or a file beside the shards is not what was written
      hash         a tensor's bytes are not what was written
      decode       an envelope does not decode
      certificate  an envelope decodes to something else than its certificate says
      bound        a weight is farther from the original than was promised
      original     the original given is not the one that was compressed
      calibration  the statistics given are not those that were rounded by, or outputs are otherwise
                   on their text than was certified
    tensor: its name in the store; a file's name for "file"; empty for "store".
    """

    kind: ProblemKind
    tensor: str
    message: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class VerifyReport:
    """What verifying found. worst: the largest measured error over promised error; measured again
    where the original was given, else as certified; None where nothing is promised. guarantee: the
    weakest of all. max_abs_error: the largest that was certified, or measured again. n_tensors: all
    tensors looked at. outputs: as certified, of a store that was rounded by a text; calibration:
    the statistics they were compared with, None where they were not. more: problems that are not
    listed, because the first has caused them. without_weights: experts of which nothing can be
    promised. coded: other tensors that are coded. model_bits_per_weight: of all tensors."""

    path: str
    against: str | None
    n_experts: int
    n_tensors: int
    n_bytes: int
    worst: float | None
    problems: tuple[Problem, ...]
    seconds: float
    guarantee: Guarantee = "none"
    max_abs_error: float = 0.0
    more: int = 0
    outputs: OutputTotals | None = None
    calibration: str | None = None
    without_weights: WithoutWeights = field(default_factory=WithoutWeights)
    coded: OtherTotals = field(default_factory=OtherTotals)
    model_bits_per_weight: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems

    def check(self, name: str) -> None:
        """Raises BoundViolatedError, with the name and the first problem, unless it is `ok`."""
        if not self.ok:
            found = self.problems[0]
            raise BoundViolatedError(
                f"{name}: a store breaks its promise or is damaged: {found.tensor}: {found.message}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ok": self.ok,
            "problems": [problem.to_json() for problem in self.problems],
        }


@dataclass(frozen=True)
class DecompressSummary:
    """What decompressing came to. n_bytes: of all tensors written. n_shards: weight files."""

    path: str
    n_experts: int
    n_tensors: int
    n_shards: int
    n_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
