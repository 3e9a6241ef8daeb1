"""A study's folder -> its rows, checked; and what of it is missing.

  DIR/study.json   what was asked: model, suite, tasks, conditions
  DIR/rows.jsonl   one line per finished condition; a torn last line (a killed run) is left out

A study that is still running, or was stopped, reads like a finished one with fewer rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moebound.errors import FormatError, MoeboundError
from moebound.files.documents import ROWS_FILE
from moebound.score import Score
from moebound.types import Array

FORMAT, VERSION = "moebound.study", 1
STUDY_FILE = "study.json"
NO_ERROR = "none"
Metric = Literal["ica", "pia"]
METRICS: tuple[Metric, ...] = ("ica", "pia")
_MOST_PROBLEMS = 10_000_000  # a count beyond it is damage, not a study


@dataclass(frozen=True)
class Condition:
    """One thing that the study was asked to measure. table: of the paper, or "extra"."""

    id: str
    table: str
    label: str
    task: str
    paper: tuple[float | None, float | None] | None


@dataclass(frozen=True, eq=False)
class Row:
    """One finished condition.

    n: problems answered, 0 for a condition that was only read, for its predictions.
    layers: decoder indices of the layers with an error. rate: None where the source has no bound.
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
        return next((r for r in self.rows if r.task == task and r.source == NO_ERROR), None)

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
    document = _parse(path.read_bytes(), str(path))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise FormatError(f"{path}: expected format {FORMAT!r}, found {found!r}")
    if document.get("version") != VERSION:
        raise FormatError(
            f"{path}: version {document.get('version')!r}, this moebound reads {VERSION}"
        )
    try:
        layers = tuple(_count(layer, "layers") for layer in document["layers"])
        conditions = tuple(_condition(entry) for entry in document["conditions"])
        tasks = tuple(str(task) for task in document["tasks"])
        if not tasks or not layers:
            raise ValueError("a study has at least one task and one layer with experts")
        profile = document.get("profile")
        study = Study(
            folder=folder,
            model=str(document["model"]),
            suite=str(document["suite"]),
            tasks=tasks,
            n_problems=_count(document["n_problems"], "n_problems"),
            created=str(document.get("created", "")),
            layers=layers,
            n_experts=_count(document["n_experts"], "n_experts"),
            profile=_beside(folder, profile),
            conditions=conditions,
            rows=(),
            document=document,
        )
    except KeyError as error:
        raise FormatError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: {error}") from error
    rows = _rows(folder / ROWS_FILE, study)
    return Study(**{**vars(study), "rows": rows})


def _beside(folder: Path, name: Any) -> Path | None:
    """A file of the study by its name. A name that leads elsewhere is not followed."""
    if not isinstance(name, str) or Path(name).name != name:
        return None
    return folder / name


def _condition(entry: Mapping[str, Any]) -> Condition:
    paper = entry.get("paper")
    return Condition(
        id=str(entry["id"]),
        table=str(entry.get("table", "extra")),
        label=str(entry.get("label", entry["id"])),
        task=str(entry["task"]),
        paper=None if paper is None else (_share(paper.get("ica")), _share(paper.get("pia"))),
    )


def _rows(path: Path, study: Study) -> tuple[Row, ...]:
    if not path.is_file():
        return ()
    known = {condition.id: condition for condition in study.conditions}
    lines = path.read_bytes().split(b"\n")
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            entry = _parse(line, where)
        except FormatError:
            if number == len(lines):  # no newline behind it: torn while it was written
                break
            raise
        try:
            row = _row(entry, known, study)
        except KeyError as error:
            raise FormatError(f"{where}: {error} is missing") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{where}: {error}") from error
        rows.setdefault(row.condition, row)
    return tuple(rows.values())


def _row(entry: Any, known: Mapping[str, Condition], study: Study) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {type(entry).__name__}")
    name = str(entry["condition"])
    asked = known.get(name)
    answered = entry.get("right") is not None
    n = _count(entry["n"], "n", most=min(study.n_problems, _MOST_PROBLEMS)) if answered else 0
    layers = tuple(_count(layer, "layers") for layer in entry.get("layers") or ())
    if unknown := set(layers) - set(study.layers):
        raise ValueError(f"layers {sorted(unknown)} are not among the study's {study.layers}")
    counts: dict[str, int] = dict.fromkeys((*METRICS, "valid"), 0)
    right: dict[Metric, Array] = {metric: np.zeros(0, bool) for metric in METRICS}
    if answered:
        right = {metric: _bits(entry["right"][metric], n) for metric in METRICS}
        counts = {name: _count(entry[name], name, most=n) for name in counts}
    for metric in METRICS:
        if int(right[metric].sum()) != counts[metric]:
            raise ValueError(
                f"{metric} is {counts[metric]}, but {int(right[metric].sum())} bits are set in "
                f"right.{metric}"
            )
    source = str(entry["source"])
    if source != NO_ERROR and not layers:
        raise ValueError(f"source {source!r} without layers")
    where = entry.get("where") or {}
    rate = entry.get("rate")
    return Row(
        condition=name,
        task=str(entry["task"]),
        table=str(entry.get("table", "extra")) if asked is None else asked.table,
        label=name if asked is None else asked.label,
        selector=str(entry.get("selector", "")),
        paper=None if asked is None else asked.paper,
        layers=layers,
        experts_changed=_count(entry.get("experts_changed", 0), "experts_changed"),
        source=source,
        rate=None if rate is None else _number(rate, "rate"),
        seed=int(entry.get("seed") or 0),
        n=n,
        ica=counts["ica"],
        pia=counts["pia"],
        valid=counts["valid"],
        right=right,
        score=_score(entry),
        realised=dict(entry.get("realised") or {}),
        residual=_numbers(where.get("residual"), "where.residual"),
        routing=_numbers(where.get("routing"), "where.routing"),
        seconds=_number(entry.get("seconds", 0.0), "seconds"),
    )


def _score(entry: Mapping[str, Any]) -> Score:
    """Rows of the first version have KL and agreement of the solutions' tokens, and no more. A
    `kl` of null: the model said nothing any more."""
    if "score" in entry:
        return Score.from_json(entry["score"])
    kl, top1 = entry.get("kl"), entry.get("top1")
    return Score(
        answer_kl_nats=math.inf if kl is None else max(0.0, _number(kl, "kl")),
        answer_top1_agreement=math.nan if top1 is None else _number(top1, "top1"),
    )


def _bits(text: Any, n: int) -> Array:
    """bool [n] from hexadecimal digits: bit i of the number is problem i."""
    if not isinstance(text, str):
        raise ValueError(f"expected bits in hexadecimal digits, found {type(text).__name__}")
    if len(text) > n // 4 + 4:
        raise ValueError(f"{len(text)} hexadecimal digits for {n} problems")
    value = int(text, 16) if text else 0
    if value < 0 or value.bit_length() > n:
        raise ValueError(f"bits for {value.bit_length()} problems, expected {n}")
    packed = np.frombuffer(value.to_bytes((n + 7) // 8, "little"), np.uint8)
    return np.unpackbits(packed, bitorder="little")[:n].astype(bool)


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: no JSON: {error}") from error


def _count(value: Any, what: str, *, most: int = 1 << 40) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{what}: expected a whole number from 0 to {most}, found {value!r}")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what}: expected a finite number, found {value!r}")
    return float(value)


def _numbers(values: Any, what: str) -> tuple[float, ...] | None:
    return None if values is None else tuple(_number(value, what) for value in values)


def _share(value: Any) -> float | None:
    """A number of the paper; None where it has "/"."""
    return None if value is None or value == "/" else _number(value, "paper")
