"""The model card of a store: what was promised, planned and measured, and how to load and check it.

README.md with the front matter that model hubs read. It is a document: no hash covers it, people
may edit it, `moebound card` writes it anew with what was measured since.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.checkpoint import TensorInfo
from moebound.errors import StoreError
from moebound.files.durable import disk_errors
from moebound.files.formats.statistics import FEW_TOKENS, Of
from moebound.plan import Plan
from moebound.score import kl_lines
from moebound.store.folder import write_synced
from moebound.store.format import (
    CARD_FILE,
    CERTIFICATES_FILE,
    ORIGINAL_CARD_FILE,
    Others,
    Record,
    Settings,
)
from moebound.store.planned import plan_of
from moebound.store.reader import open_store
from moebound.store.summary import (
    ExpertTotals,
    ModelTotals,
    OtherTotals,
    OutputTotals,
    WithoutWeights,
)
from moebound.types import Guarantee

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MOST_ROWS = 40


@dataclass(frozen=True)
class Measurement:
    """An evaluation, as `moebound eval --json` prints it. name: of its file."""

    name: str
    document: Mapping[str, Any]


def write_card(store_path: Path | str, measured: Sequence[Measurement] = ()) -> Path:
    """Write a store's README.md anew, and return its path. Raises as `open_store`."""
    store = open_store(store_path)
    records = [*store.kept.values(), *store.records()]
    card = model_card(store.settings, store.tensors, records, plan_of(store), measured)
    path = store.path / CARD_FILE
    with disk_errors(path):
        write_synced(path, card.encode())
    return path


def model_card(
    settings: Settings,
    tensors: Mapping[str, TensorInfo],
    records: Sequence[Record],
    plan: Plan | None,
    measured: Sequence[Measurement] = (),
) -> str:
    """The card's text. The same for the same store and measurements. records: of the tensors."""
    totals, without = ExpertTotals.of(records), WithoutWeights.of(records)
    others, model = OtherTotals.of(records), ModelTotals.of(tensors, records)
    source = _text(settings.source or "an unnamed checkpoint")
    parts = [
        _front_matter(source),
        f"# {source}, {'experts ' if settings.others == 'keep' else ''}compressed by moebound",
        f"{_GUARANTEED[totals.guarantee]} {_others(settings.others, others)}",
        _table(
            "",
            [
                ("bits per weight, whole model", f"{model.bits_per_weight:.3f}"),
                *_promised(settings, totals, plan),
                *_coded(others),
                *_without(without),
            ],
        ),
    ]
    if settings.calibration is not None and totals.outputs is not None:
        parts += ["## Calibrated", _CALIBRATED]
        parts.append(_table("", _calibrated(settings.calibration.of, totals.outputs)))
    if plan is not None:
        parts += ["## Planned", _planned_text(plan), _table("", _planned(plan, totals))]
    if measured:
        parts.append("## Measured")
        parts += [_measured(measurement) for measurement in measured]
    if settings.left_out:
        parts += ["## Left out", "Files of the original that are not here:"]
        parts.append(_table("", ((name, _text(why)) for name, why in settings.left_out.items())))
    parts += ["## Use", _USE]
    return "\n\n".join(parts) + "\n"


_MEASURED = "Errors are measured on the weights that the model uses."
_GUARANTEED: dict[Guarantee, str] = {
    "max_abs": "The weights of the experts are compressed under a guaranteed bound on the error of "
    "every single weight, measured on the weights that the model uses.",
    "lossless": "The weights of the experts are compressed without loss: each has the bits it had.",
    "rmse": "The weights of the experts are compressed under a bound on their root mean square "
    f"error. Single weights may be off by more. {_MEASURED}",
    "none": "The weights of the experts are compressed without a guarantee: how far they are off "
    f"was measured, and not promised. {_MEASURED}",
}
_USE = f"""\
```python
import moebound  # teaches transformers to read this folder
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this-folder")
```

`moebound verify this-folder` checks every hash, and with `--against` the original measures every
bound again. `moebound decompress this-folder out` makes an ordinary checkpoint. The promise for
each matrix, and what was found, is in `{CERTIFICATES_FILE}`. The original
model's own card, if it had one, is `{ORIGINAL_CARD_FILE}`."""


def _front_matter(source: str) -> str:
    lines = ["library_name: transformers", "tags: [moebound, mixture-of-experts, compressed]"]
    if _HUB_ID.fullmatch(source):
        lines.append(f"base_model: {source}")
    return "\n".join(["---", *lines, "---"])


def _promised(
    settings: Settings, totals: ExpertTotals, plan: Plan | None
) -> Iterable[tuple[str, str]]:
    yield "base model", _text(settings.source or "-")
    if settings.stored_as is not None:
        yield "stored as", f"{_text(settings.stored_as)}; bounds are against dequantized weights"
    yield "guarantee", totals.guarantee
    if plan is None:
        if settings.bound is not None:
            yield "bound", str(settings.bound)
    elif settings.bound is not None:
        values = sorted(bound.value for bound in plan.bounds)
        yield (
            "bounds",
            (
                f"{len(set(values))} of mode {settings.bound.mode} per {settings.bound.scope}, "
                f"{values[0]:.3g} to {values[-1]:.3g}, median {values[len(values) // 2]:.3g}"
            ),
        )
    if totals.worst is not None:
        # Rounded down: a promise that was just kept must not look broken.
        yield "largest error over bound", f"{math.floor(totals.worst * 1e4) / 1e4:.4f}"
    yield "largest error, in weight units", f"{totals.max_abs_error:.3g}"
    yield "root mean square error, in weight units", f"{totals.rmse:.3g}"
    yield "method", settings.method
    yield "experts", str(totals.n_experts)
    bits = 8 * totals.bytes_after / totals.n_weights if totals.n_weights else 0.0
    yield "bits per weight, experts only", f"{bits:.3f}"
    if totals.bytes_after:
        yield (
            "experts' size",
            (
                f"{totals.bytes_before} -> {totals.bytes_after} bytes, "
                f"{totals.bytes_before / totals.bytes_after:.2f} times smaller"
            ),
        )


def _others(asked: Others, found: OtherTotals) -> str:
    if asked == "keep":
        return "All other tensors are as they were."
    if found.guarantee == "lossless":
        return "All other tensors have the bits that they had; some are coded."
    return (
        f"Other matrices are compressed, too: no weight of one moved by more than {asked:g} times "
        "its matrix's mean |weight|. Routers, norms and all else have the bits that they had."
    )


def _coded(found: OtherTotals) -> Iterable[tuple[str, str]]:
    if not found.n_tensors:
        return
    yield (
        "other tensors that are coded",
        f"{found.n_tensors}: {found.bytes_before} -> {found.bytes_after} bytes, "
        f"{found.bytes_before / found.bytes_after:.2f} times smaller",
    )
    if found.guarantee != "lossless" and found.worst is not None:
        yield "their guarantee", found.guarantee
        yield "their largest error over bound", f"{math.floor(found.worst * 1e4) / 1e4:.4f}"
        yield "their largest error, in weight units", f"{found.max_abs_error:.3g}"


_CALIBRATED = (
    "Experts were rounded by what they got as inputs on a text. What became of their outputs there "
    "was measured, and is no promise for other texts; the bound on every weight is."
)


def _calibrated(text: Of, found: OutputTotals) -> Iterable[tuple[str, str]]:
    yield "text", f"{_text(text.text)}, {text.n_sequences} sequences, {text.n_tokens} tokens"
    yield "SHA-256 of its tokens", f"`{_text(text.text_sha256)}`"
    yield "experts that saw no token", f"{found.without_tokens} of {found.n_experts}"
    yield f"experts that saw fewer than {FEW_TOKENS}", str(found.few_tokens)
    if not text.routed:
        yield "tokens", "all were shown to every expert"
    if text.fisher:
        yield "tokens weighted by", "what the model's predictions feel of them (Fisher)"
    if text.answer_weight != 1:
        yield "answers' tokens count", f"{text.answer_weight:g} times"
    for name, value in (("median", found.median), ("largest", found.largest)):
        if value is not None:
            yield f"error of a matrix's outputs over their power, {name}", f"{100 * value:.3g} %"


def _without(found: WithoutWeights) -> Iterable[tuple[str, str]]:
    if found:
        yield "experts without weights of their own", str(found)


def _planned_text(plan: Plan) -> str:
    asked = ", ".join(f"{name} {value:g}" for name, value in plan.budget.items())
    return (
        f"The bounds are those of `moebound.plan.json`: scheme {plan.scheme}, for {asked}, a bound "
        f"for each {plan.made.get('bound_per', 'expert')}."
    )


def _planned(plan: Plan, totals: ExpertTotals) -> Iterable[tuple[str, str]]:
    off = 100 * (totals.bytes_after / plan.n_bytes - 1) if plan.n_bytes else 0.0
    yield "predicted bits per weight", f"{plan.bits_per_weight:.3f}"
    yield "predicted bytes", f"{plan.n_bytes} (written: {off:+.2f} %)"
    yield "predicted KL, nats per token", "not known" if plan.kl is None else f"{plan.kl:.3g}"
    if plan.measured is not None:
        for field, text in kl_lines(plan.measured.score):
            yield f"measured {field.title}, nats per token", text
        task = _text(plan.measured.task)
        yield (
            "measured on",
            f"{plan.measured.n_problems} problems of {task} that planning did not see",
        )
    for name in ("sensitivity", "profile"):
        found = plan.made.get(name)
        if isinstance(found, Mapping):
            task = f", task {_text(found['task'])}" if "task" in found else ""
            yield f"from {name}", f"{_text(found.get('file', '-'))}{task}"


def _measured(measurement: Measurement) -> str:
    document = measurement.document
    task = document.get("task")
    title = f"### {_text(task)}" if isinstance(task, str) else f"### {measurement.name}"
    rows = [row for name, value in document.items() if name != "task" for row in _rows(name, value)]
    return _table(title, rows[:_MOST_ROWS])


def _rows(name: str, value: Any) -> Iterable[tuple[str, str]]:
    """Figures and short words of an evaluation; with their interval, where they have one."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield name, f"{value:.5g}"
    elif isinstance(value, str) and len(value) <= 80:
        yield name, _text(value)
    elif isinstance(value, Mapping):
        best = next((k for k in ("value", "rate", "mean") if _is_number(value.get(k))), None)
        if best and _is_number(value.get("low")) and _is_number(value.get("high")):
            yield name, f"{value[best]:.4g} ({value['low']:.4g} to {value['high']:.4g})"
            return
        for inner, item in value.items():
            yield from _rows(f"{name}: {inner}", item)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [title, ""] if title else []
    lines += ["| | |", "|---|---|"]
    lines += [f"| {_text(name)} | {value} |" for name, value in rows]
    return "\n".join(lines)


def _text(value: object) -> str:
    """Words from a file, so that they stay in their cell."""
    return re.sub(r"[|\r\n`<>]", " ", str(value)).strip()


def read_measurement(path: Path) -> Measurement:
    """Raises StoreError, naming the file."""
    with disk_errors(path, "cannot be read"):
        data = path.read_bytes()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: no JSON: {error}") from error
    if not isinstance(document, dict):
        raise StoreError(f"{path}: expected what `moebound eval --json` prints, found no object")
    return Measurement(path.name, document)
