"""A study's folder: what was asked, and a row for each condition that is finished.

  study.json     model, suite, tasks, and every condition that was asked for
  rows.jsonl     one line per finished condition; a torn last line (a killed run) is left out
  answers.jsonl  what the model wrote in it, so that answers can be judged again
  profile.json   which experts each task uses: what "most used" means in the selectors

A study that is still running, or was stopped, reads like a finished one with fewer rows.
docs/study.md has the fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moebound.errors import FormatError, MoeboundError
from moebound.files.documents import Format, count, fields_of, items, number
from moebound.files.rows import KEY, read_lines
from moebound.score import Score
from moebound.types import Array, BoundScope, ErrorBound

FORMAT = Format("moebound.study", 1)
STUDY_FILE, ROWS_FILE = "study.json", "rows.jsonl"
ANSWERS_FILE, PROFILE_FILE = "answers.jsonl", "profile.json"

BASELINE = "none"
"""The source of a condition without any error."""
EXTRA = "extra"
"""The table of what is not in the paper."""

Metric = Literal["ica", "pia"]
METRICS: tuple[Metric, ...] = ("ica", "pia")
Share = float | None
"""Of right answers. Of the paper's: None where it has "/"."""

_MOST = 1 << 40  # a number beyond it is damage, and so is a count of problems beyond the next
_MOST_PROBLEMS = 10_000_000


@dataclass(frozen=True)
class Condition:
    """One thing to measure.

    id: names it for good. table: of the paper, or "extra". label: for people, without source, rate
    and seed. selector: see `sensitivity/selectors.py`, decoder indices. source: see
    `sensitivity/noise.py`, or "none". rate: bound as a share of the mean |weight|, None where the
    source has no bound. answers: whether the model answers the task's problems; if not, only its
    predictions are compared. paper: ICA and PIA there; None as a whole where it has nothing.
    """

    id: str
    table: str
    label: str
    selector: str
    source: str
    rate: float | None
    bound_scope: BoundScope
    seed: int
    task: str
    answers: bool = True
    paper: tuple[Share, Share] | None = None

    @property
    def bound(self) -> ErrorBound | None:
        return None if self.rate is None else ErrorBound(self.rate, "rate", self.bound_scope)

    def to_json(self) -> dict[str, Any]:
        paper = None if self.paper is None else {"ica": self.paper[0], "pia": self.paper[1]}
        return {**vars(self), "paper": paper}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Condition:
        """Read back what `to_json` gave; only id and task have to be there. Raises KeyError,
        TypeError, FormatError for anything else."""
        name, rate, paper = str(data["id"]), data.get("rate"), data.get("paper")
        return cls(
            id=name,
            table=str(data.get("table", EXTRA)),
            label=str(data.get("label", name)),
            selector=str(data.get("selector", "")),
            source=str(data.get("source", "")),
            rate=None if rate is None else number(rate, "rate"),
            bound_scope=data.get("bound_scope", "expert"),
            seed=count(data.get("seed", 0), "seed", most=_MOST),
            task=str(data["task"]),
            answers=bool(data.get("answers", True)),
            paper=None if paper is None else (_share(paper.get("ica")), _share(paper.get("pia"))),
        )


@dataclass(frozen=True, eq=False)
class Row:
    """One finished condition.

    n: problems answered, 0 for a condition that was only read, for its predictions. table, label,
    paper: as asked; of a row that is read alone, without its study, as far as it says.
    layers: decoder indices of the layers with an error. layer: the one of them all of whose experts
    have it, None of any other condition. rate: None where the source has no bound.
    ica, pia: counts of right answers among n; valid: outputs that have an answer at all. right: for
    each metric bool [n], by problem. score: to the unperturbed model. residual: relative change of
    the residual stream behind each decoder layer; routing: share of routing decisions that changed
    in each MoE layer; None if not recorded. realised: see `perturb.Realised`.
    """

    condition: str
    task: str
    table: str
    label: str
    selector: str
    paper: tuple[float | None, float | None] | None
    layers: tuple[int, ...]
    layer: int | None
    experts_changed: int
    source: str
    rate: float | None
    seed: int
    n: int
    ica: int
    pia: int
    valid: int
    right: Mapping[Metric, Array]
    score: Score
    realised: Mapping[str, Any]
    residual: tuple[float, ...] | None
    routing: tuple[float, ...] | None
    seconds: float


@dataclass(frozen=True)
class Study:
    """rows: in the order in which they were finished. layers: decoder indices of the MoE layers."""

    folder: Path
    model: str
    suite: str
    tasks: tuple[str, ...]
    n_problems: int
    created: str
    layers: tuple[int, ...]
    n_experts: int
    profile: Path | None
    conditions: tuple[Condition, ...]
    rows: tuple[Row, ...]
    document: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def missing(self) -> tuple[Condition, ...]:
        """Conditions that were asked and are not finished."""
        done = {row.condition for row in self.rows}
        return tuple(c for c in self.conditions if c.id not in done)

    def baseline(self, task: str) -> Row | None:
        """The model without any error, on a task."""
        return next((r for r in self.rows if r.task == task and r.source == BASELINE), None)

    def depth(self, layers: tuple[int, ...]) -> float:
        """Where these decoder layers are: 0 the first MoE layer, 1 the last; their mean."""
        if len(self.layers) < 2:
            return 0.0
        order = {layer: index for index, layer in enumerate(self.layers)}
        at = [order[layer] for layer in layers]
        return sum(at) / len(at) / (len(self.layers) - 1)


def read_study(folder: Path) -> Study:
    """Read and check a study's folder.

    Raises MoeboundError for a folder that is none, FormatError, with file and line, for one whose
    files say something else than a study does.
    """
    folder = Path(folder)
    path = folder / STUDY_FILE
    if not folder.is_dir():
        raise MoeboundError(f"{folder}: no such folder; expected one that `moebound study` wrote")
    if not path.is_file():
        raise MoeboundError(f"{path}: not found; expected what `moebound study` writes")
    document = FORMAT.read(path).content
    with fields_of(str(path)):
        study = Study(
            folder=folder,
            layers=tuple(count(layer, "layers", most=_MOST) for layer in document["layers"]),
            conditions=tuple(
                Condition.from_json(entry) for entry in items(document["conditions"], "conditions")
            ),
            model=str(document["model"]),
            suite=str(document["suite"]),
            tasks=tuple(str(task) for task in document["tasks"]),
            n_problems=count(document["n_problems"], "n_problems", most=_MOST),
            created=str(document.get("created", "")),
            n_experts=count(document["n_experts"], "n_experts", most=_MOST),
            profile=_beside(folder, document.get("profile")),
            rows=(),
            document=document,
        )
        if not study.tasks or not study.layers:
            raise FormatError("a study has at least one task and one layer with experts")
    if not (folder / ROWS_FILE).is_file():
        return study
    return replace(study, rows=read_rows(folder, study))


def read_rows(folder: Path, study: Study | None = None) -> tuple[Row, ...]:
    """Finished conditions, each once. study: what they are checked against, if anything.

    Raises MoeboundError if the file cannot be read, FormatError, with file and line, for damage.
    """
    asked = {} if study is None else {condition.id: condition for condition in study.conditions}
    most = _MOST_PROBLEMS if study is None else min(study.n_problems, _MOST_PROBLEMS)
    rows: dict[str, Row] = {}
    for where, entry in read_lines(folder / ROWS_FILE):
        with fields_of(where):
            row = _row(entry, asked.get(str(entry[KEY])), most)
            if study is not None and (unknown := set(row.layers) - set(study.layers)):
                raise FormatError(
                    f"layers {sorted(unknown)} are not among the study's {study.layers}"
                )
        rows.setdefault(row.condition, row)
    return tuple(rows.values())


def _row(entry: Mapping[str, Any], asked: Condition | None, most_problems: int) -> Row:
    name, source = str(entry[KEY]), str(entry["source"])
    answered = entry.get("right") is not None
    n = count(entry["n"], "n", most=most_problems) if answered else 0
    layers = tuple(count(layer, "layers", most=_MOST) for layer in entry.get("layers") or ())
    if source != BASELINE and not layers:
        raise FormatError(f"source {source!r} without layers")
    counts: dict[str, int] = dict.fromkeys((*METRICS, "valid"), 0)
    right: dict[Metric, Array] = {metric: np.zeros(0, bool) for metric in METRICS}
    if answered:
        right = {metric: _bits(entry["right"][metric], n) for metric in METRICS}
        counts = {name: count(entry[name], name, most=n) for name in counts}
    for metric in METRICS:
        if int(right[metric].sum()) != counts[metric]:
            raise FormatError(
                f"{metric} is {counts[metric]}, but {int(right[metric].sum())} bits are set in "
                f"right.{metric}"
            )
    where, rate, layer = entry.get("where") or {}, entry.get("rate"), entry.get("layer")
    return Row(
        condition=name,
        task=str(entry["task"]),
        table=str(entry.get("table", EXTRA)) if asked is None else asked.table,
        label=name if asked is None else asked.label,
        selector=str(entry.get("selector", "")),
        paper=None if asked is None else asked.paper,
        layers=layers,
        layer=None if layer is None else count(layer, "layer", most=_MOST),
        experts_changed=count(entry.get("experts_changed", 0), "experts_changed", most=_MOST),
        source=source,
        rate=None if rate is None else number(rate, "rate"),
        seed=count(entry.get("seed") or 0, "seed", most=_MOST),
        n=n,
        ica=counts["ica"],
        pia=counts["pia"],
        valid=counts["valid"],
        right=right,
        score=_score(entry),
        realised=dict(entry.get("realised") or {}),
        residual=_numbers(where.get("residual"), "where.residual"),
        routing=_numbers(where.get("routing"), "where.routing"),
        seconds=number(entry.get("seconds", 0.0), "seconds", least=None),
    )


def _score(entry: Mapping[str, Any]) -> Score:
    """Rows of the first version have KL and agreement of the solutions' tokens, and no more. A
    `kl` of null: the model said nothing any more."""
    if "score" in entry:
        return Score.from_json(entry["score"])
    kl, top1 = entry.get("kl"), entry.get("top1")
    return Score(
        answer_kl_nats=math.inf if kl is None else max(0.0, number(kl, "kl", least=None)),
        answer_top1_agreement=math.nan if top1 is None else number(top1, "top1", least=None),
    )


def _beside(folder: Path, name: Any) -> Path | None:
    """A file of the study by its name. A name that leads elsewhere is not followed."""
    if not isinstance(name, str) or Path(name).name != name:
        return None
    return folder / name


def _bits(text: Any, n: int) -> Array:
    """bool [n] from hexadecimal digits: bit i of the number is problem i."""
    if not isinstance(text, str):
        raise FormatError(f"expected bits in hexadecimal digits, found {type(text).__name__}")
    if len(text) > n // 4 + 4:
        raise FormatError(f"{len(text)} hexadecimal digits for {n} problems")
    value = int(text, 16) if text else 0
    if value < 0 or value.bit_length() > n:
        raise FormatError(f"bits for {value.bit_length()} problems, expected {n}")
    packed = np.frombuffer(value.to_bytes((n + 7) // 8, "little"), np.uint8)
    return np.unpackbits(packed, bitorder="little")[:n].astype(bool)


def _numbers(values: Any, what: str) -> tuple[float, ...] | None:
    return None if values is None else tuple(number(value, what, least=None) for value in values)


def _share(value: Any) -> Share:
    """A number of the paper; None where it has "/"."""
    return None if value is None or value == "/" else number(value, "paper", least=None)
