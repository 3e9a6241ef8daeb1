"""What the demo found: rows of figures and the facts around them. JSON out, drawing elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moebound.bench.report import BenchReport
from moebound.evaluate.evaluation import Evaluation
from moebound.paper.report import Report as StudyReport
from moebound.plan import Plan
from moebound.profile.profile import Profile
from moebound.score import Score, Tally

KEPT_RATE = 0.3
"""Near this rate are the store that the page speaks of first, and plan.json."""


def kept_rate(rates: Sequence[float]) -> float:
    """The one that the page speaks of first."""
    return min(rates, key=lambda rate: abs(rate - KEPT_RATE))


@dataclass(frozen=True)
class StoreRow:
    """One codec at one bound (or a plan's bounds): a store on disk, verified, loaded, compared.

    name: its folder. rate: the bound asked, as a share of the mean |weight| of each expert; None
    for an exact codec. planned: each expert has a bound of its own, with which all experts take as
    many bytes as `bound` does at `rate`. expert_bits_per_weight: bytes of the compressed experts.
    model_bits_per_weight: the weight files whole, headers included. worst: the largest measured
    error over the error asked, 1 or less where the promise is kept. n_tensors: that were verified.
    problems: what verifying found. score: to the original, answers included.
    """

    name: str
    codec: str
    rate: float | None
    planned: bool
    expert_bytes: int
    expert_bits_per_weight: float
    model_bits_per_weight: float
    expert_ratio: float
    model_ratio: float
    predicted_bytes: int | None
    worst: float
    verified: bool
    n_tensors: int
    problems: tuple[str, ...]
    score: Score

    @property
    def title(self) -> str:
        return f"{self.codec}, planned" if self.planned else self.codec

    @property
    def tally(self) -> Tally:
        """Of its answers; every store is asked."""
        assert self.score.tally is not None
        return self.score.tally

    def to_json(self) -> dict[str, Any]:
        """With the first version's names of some figures; "score" has all."""
        score = self.score.to_json()
        first = {old: score.get(new) for old, new in _FIRST_VERSION.items()}
        return {**vars(self), **first, "score": score}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoreRow:
        """Of what `to_json` gave, in this version or the first."""
        fields = {name: data.get(name) for name in cls.__dataclass_fields__}
        fields["problems"] = tuple(data["problems"])
        score = data.get("score") or {new: data[old] for old, new in _FIRST_VERSION.items()}
        fields["score"] = Score.from_json(score)
        return cls(**fields)  # type: ignore[arg-type]


_FIRST_VERSION = {
    "kl_nats": "answer_kl_nats",
    "kl_stderr": "answer_kl_stderr",
    "text_kl_nats": "kl_nats",
    "top1": "answer_top1_agreement",
    "tally": "tally",
    "lost": "lost",
    "gained": "gained",
}


@dataclass(frozen=True)
class SampleAnswer:
    """One problem, and what the models make of it with greedy decoding."""

    prompt: str
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


@dataclass(frozen=True)
class Damage:
    """What became of a copy of a store in which one bit was turned over. said: by verify, of
    tensor; empty where it said nothing."""

    store: str
    tensor: str
    said: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    command: what made it. task: what the model is profiled, studied and compared on, with
    n_problems. original: its answers, by task. profile, study, plans: what the steps left; plans by
    the name of their store. map_problems, map_rates: what the sensitivity map is made from. rows:
    in the order of the cases. samples: answers at the coarsest bound, chosen as `road` says, and
    samples_of: which store's. speeds: on matrices of full size. environment: machine and versions.
    seconds: by step.
    """

    command: str
    task: str
    n_problems: int
    map_problems: int
    map_rates: tuple[float, ...]
    model: ModelFacts
    original: Mapping[str, Evaluation]
    profile: Profile
    study: StudyReport
    plans: Mapping[str, Plan]
    rows: tuple[StoreRow, ...]
    damage: Damage
    samples: tuple[SampleAnswer, ...]
    samples_of: str
    speeds: BenchReport
    seconds: Mapping[str, float]

    @property
    def ok(self) -> bool:
        """Whether every promise was kept, and damage was found."""
        return all(row.verified for row in self.rows) and bool(self.damage.said)

    @property
    def environment(self) -> Mapping[str, Any]:
        return self.speeds.environment

    def row(self, codec: str, rate: float | None, *, planned: bool = False) -> StoreRow | None:
        """The row of one case, if there is one."""
        wanted = (codec, rate, planned)
        return next((r for r in self.rows if (r.codec, r.rate, r.planned) == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """All figures; of profile, study and plans what sums them up."""
        return {
            "format": "moebound.demo.report",
            "version": 1,
            "ok": self.ok,
            "command": self.command,
            "task": self.task,
            "n_problems": self.n_problems,
            "map_problems": self.map_problems,
            "map_rates": list(self.map_rates),
            "model": asdict(self.model),
            "original": {task: found.total.to_json() for task, found in self.original.items()},
            "verdicts": [
                {"id": v.claim.id, "outcome": v.outcome, "real": v.real and v.real.outcome}
                for v in self.study.verdicts
            ],
            "plans": {
                name: {"bits_per_weight": plan.bits_per_weight, "predicted_kl": plan.kl}
                for name, plan in self.plans.items()
            },
            "rows": [row.to_json() for row in self.rows],
            "damage": asdict(self.damage),
            "samples_of": self.samples_of,
            "samples": [asdict(sample) for sample in self.samples],
            "speeds": self.speeds.to_json(),
            "seconds": dict(self.seconds),
        }
