"""What the demo found: rows of figures and the facts around them. JSON out, drawing elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One codec at one bound, everything measured on this machine.

    rate: the bound asked, as a share of the mean |weight| of each expert; None for an exact codec.
    worst: the largest measured error over the error asked, 1 or less where the promise is kept.
    expert_bits_per_weight: bytes of the compressed experts. model_bits_per_weight: the weight files
    whole, headers included. The ratios are to bf16, with the same bytes counted.
    decode_gweights_per_s: one thread, from memory to memory, 1e9 weights a second.
    kl_nats ... reproduced: see `fidelity.Fidelity`.
    """

    codec: str
    rate: float | None
    expert_bits_per_weight: float
    model_bits_per_weight: float
    expert_ratio: float
    model_ratio: float
    worst: float
    verified: bool
    problems: tuple[str, ...]
    compress_seconds: float
    decode_gweights_per_s: float
    kl_nats: float
    kl_stderr: float
    answer_kl_nats: float
    top1_agreement: float
    reproduced: int

    @property
    def kept_rate(self) -> float | None:
        """The bound that was really kept, in the unit it was asked in."""
        return None if self.rate is None else self.worst * self.rate


@dataclass(frozen=True)
class FullSizeRow:
    """One codec at one bound on one synthetic matrix of the size that large models have.

    bits_per_weight: all bytes. entropy_bits_per_weight: of the ideal uniform quantizer.
    """

    codec: str
    rate: float
    shape: tuple[int, int]
    bits_per_weight: float
    entropy_bits_per_weight: float
    worst: float
    decode_gweights_per_s: float


@dataclass(frozen=True)
class SampleAnswer:
    """One prompt, and what the models make of it with greedy decoding."""

    prompt: str
    reference: str
    original: str
    compressed: str


@dataclass(frozen=True)
class ModelFacts:
    """The model under test. weights_per_matrix: of one expert matrix, which is what is encoded."""

    name: str
    model_type: str
    n_parameters: int
    n_moe_layers: int
    n_experts: int
    experts_per_token: int
    expert_weights: int
    weights_per_matrix: int
    weight_file_bytes: int
    reproduced: int


@dataclass(frozen=True)
class Report:
    """rows: in the order measured. samples: answers at `samples_rate`, chosen as `run` says.
    n_prompts, n_positions: what the fidelity figures are averages over."""

    command: str
    model: ModelFacts
    rows: tuple[Row, ...]
    full_size: tuple[FullSizeRow, ...]
    samples: tuple[SampleAnswer, ...]
    samples_codec: str
    samples_rate: float
    n_prompts: int
    n_positions: int
    machine: dict[str, str]
    versions: dict[str, str]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(row.verified for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        document = {"ok": self.ok, **asdict(self)}
        document["rows"] = [{**asdict(row), "kept_rate": row.kept_rate} for row in self.rows]
        return document
