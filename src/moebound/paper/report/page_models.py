"""The page of several models: what differs by design, then verdicts, depths and effects beside
each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from moebound.page import document
from moebound.paper.report import paper, plots
from moebound.paper.report.cells import source_name
from moebound.paper.report.claims import PTS, WORDS
from moebound.paper.report.evidence import factor
from moebound.paper.report.models import Depth, Effect, Facts, Judged, Models
from moebound.paper.report.page import style
from moebound.paper.report.page_tables import MARKS, number
from moebound.paper.report.tables import Accuracy, Measured
from moebound.score import KL

TOGETHER = {
    "conclusion": {"all": "holds in all", "none": "in none", "differ": "differs", "open": ""},
    "question": {"all": "yes in all", "none": "no in all", "differ": "differs", "open": ""},
}
ANSWER = {
    "supports": "Yes: every model supports all three patterns.",
    "contradicts": "No: at least one model contradicts one of the three patterns.",
    "open": "Left open: no model contradicts a pattern, and not every model supports all three.",
}
FAVOURS = {"for": "middle above both", "against": "middle below one", "neither": "undecided"}


def render_models(models: Models) -> str:
    """The whole page. Everything that comes from the studies' files is escaped."""
    sections = [
        _opening(models),
        _facts(models),
        _verdicts(models),
        _depths(models),
        _effects(models),
        _how(models),
    ]
    return document(
        "Errors in experts: " + ", ".join(models.names), sections, more_style=style(), contents=True
    )


def _opening(models: Models) -> str:
    items = "".join(
        f"<li><b>{escape(entry.claim.text)}</b> "
        + "; ".join(
            f"{escape(name)}: {WORDS['conclusion'][outcome]}"
            for name, outcome in zip(models.names, entry.outcomes, strict=True)
        )
        + ".</li>"
        for entry in models.patterns
    )
    gaps = "".join(
        f"<li>{escape(report.study.model)}: {escape(gap)}</li>"
        for report in models.reports
        for gap in report.gaps
    )
    missing = f'<div class="gaps"><p>What is missing:</p><ul>{gaps}</ul></div>' if gaps else ""
    return (
        f"<header><h1>Does it generalise? {len(models.names)} models side by side</h1>\n"
        f'<p class="lead">{ANSWER[models.generalises]}</p>\n'
        f"<p>The three patterns are those that {escape(paper.TITLE)} leaves open for other "
        f'architectures.</p>\n<ol class="short">{items}</ol>\n{missing}</header>'
    )


def _facts(models: Models) -> str:
    facts = models.facts
    rows = [
        ("layers with experts", [str(f.layers) for f in facts]),
        ("dense layers before them", [str(f.first_layer) for f in facts]),
        ("experts a layer", [str(f.experts) for f in facts]),
        ("experts a token uses", ["" if f.top_k is None else str(f.top_k) for f in facts]),
        ("suite, problems", [f"{f.suite}, {f.n_problems}" for f in facts]),
        ("conditions", [f"{f.finished} of {f.conditions}" for f in facts]),
        *_baselines(facts),
    ]
    return (
        "<section><h2>What differs by design</h2>\n"
        "<p>The models differ in all of this at once. So where they disagree, a pattern is not "
        "general; which of the differences is the reason cannot be said.</p>\n"
        f"{_table(['', *models.names], rows)}</section>"
    )


def _baselines(facts: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """Accuracies without an error: the first task of each model in one line, and so on."""
    rows = []
    for at in range(max(len(f.baseline) for f in facts)):
        of = [list(f.baseline.items())[at : at + 1] for f in facts]
        tasks = dict.fromkeys(task for found in of for task, _ in found)
        rows.append(
            (
                f"PIA without an error, {', '.join(tasks)}",
                [f"{_share(found[0][1].pia)}" if found else "" for found in of],
            )
        )
    return rows


def _share(found: Accuracy) -> str:
    return f"{100 * found.share:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _verdicts(models: Models) -> str:
    parts = []
    for kind, title in (("conclusion", "Conclusions"), ("question", "Open questions")):
        rows = [
            (
                entry.claim.text,
                [*(_badges(entry, at) for at in range(len(models.names))),
                 TOGETHER[kind][entry.together]],
            )
            for entry in models.judged if entry.claim.kind == kind
        ]  # fmt: skip
        table = _table([title, *models.names, "together"], rows, text=True)
        parts.append(table)
    return (
        "<section><h2>The paper's conclusions, by model</h2>\n"
        "<p>The first badge is the verdict with the paper's own simulated errors, the dashed one "
        "that with the real codec. Each is decided by its own model's study alone.</p>\n"
        + "\n".join(parts)
        + "</section>"
    )


def _badges(entry: Judged, at: int) -> str:
    words, real = WORDS[entry.claim.kind], entry.real[at]
    outcome = entry.outcomes[at]
    badges = f'<span class="badge {outcome}">{words[outcome]}</span>'
    if real is not None:
        badges += f' <span class="badge second {real}">{words[real]}</span>'
    return badges


def _depths(models: Models) -> str:
    n_tasks = len(models.reports[0].study.tasks)
    figures = "".join(
        f'<figure class="wide"><div class="scroll">{drawn}</div><figcaption><b>'
        f"{escape(', '.join(dict.fromkeys(r.study.tasks[at] for r in models.reports)))}</b> · KL "
        "over the model's own mean over layers</figcaption></figure>"
        for at in range(n_tasks)
        if (drawn := plots.relative_depth([r.suite for r in models.reports], at))
    )
    if not models.by_depth:
        return ""
    each = range(len(models.names))
    rows = [
        (_depth_name(models, entry), [_contrast(models, entry, at) for at in each])
        for entry in models.by_depth
    ]
    return (
        "<section><h2>Sensitivity by relative depth</h2>\n"
        "<p>An error in all experts of one layer at a time, by what it does to the predictions. "
        "0 is the first layer with experts, 1 the last. Shallow: up to 0.3; deep: from "
        f"0.7.</p>\n{figures}\n<h3>The middle against both ends</h3>\n"
        "<p>Geometric mean KL of the middle layers over that of the shallow, and of the deep ones; "
        "95 % intervals, the layers a sample.</p>\n"
        f"{_table(['source, bound, task', *models.names], rows, text=True)}</section>"
    )


def _depth_name(models: Models, entry: Depth) -> str:
    tasks = dict.fromkeys(report.study.tasks[entry.task] for report in models.reports)
    return f"{source_name(entry.source)}, {100 * entry.rate:g} %, {', '.join(tasks)}"


def _contrast(models: Models, entry: Depth, at: int) -> str:
    found = entry.contrasts[at]
    if found is None:
        return "not measured"
    layers = models.reports[at].study.layers
    depth = layers.index(found.top.key.layers[0]) / max(len(layers) - 1, 1)
    return (
        f"shallow: {escape(factor(found.to_shallow))}<br>deep: {escape(factor(found.to_deep))}<br>"
        f"<small>{FAVOURS[found.favours]}; most sensitive at depth {depth:.2f}</small>"
    )


def _effects(models: Models) -> str:
    shown = [paper.SIMULATION, *filter(None, [models.reports[0].suite.codec])]
    parts = [
        _effect_table(models, table, source, found)
        for table in dict.fromkeys(effect.table for effect in models.effects)
        for source in shown
        if (found := [e for e in models.effects if (e.table, e.source) == (table, source)])
    ]
    return (
        "<section><h2>The same errors at the same relative depth</h2>\n"
        "<p>Change against the same model without an error, in points of accuracy with its 95 % "
        "interval; KL in nats a token, of the solutions' tokens and of all text. <b>▼ ▲</b> "
        f"beyond chance after the correction, <b>=</b> within ±{PTS}. <b>/</b> no valid output. "
        f"Other error sources are in the JSON.</p>\n{''.join(parts)}</section>"
    )


def _effect_table(models: Models, name: str, source: str, effects: list[Effect]) -> str:
    known = paper.table(name)
    title = f"{known.name}: {known.title}" if known else "All experts of all layers"
    groups = "".join(
        f'<th class="group edge" colspan="{2 + len(KL)}">{escape(model)}</th>'
        for model in models.names
    )
    columns = '<th class="edge">ICA</th><th>PIA</th>' + "".join(f"<th>{f.title}</th>" for f in KL)
    body = "".join(
        f'<tr><td class="label">{escape(effect.where)}</td><td>{_depth_of(effect)}</td>'
        f"<td>{'' if effect.rate is None else f'{100 * effect.rate:g} %'}</td>"
        + "".join(map(_cell, effect.measured))
        + "</tr>\n"
        for effect in effects
    )
    table = (
        f"<table>\n<thead><tr><th></th><th></th><th></th>{groups}</tr>\n<tr><th>paper's place</th>"
        f"<th>depth</th><th>bound</th>{columns * len(models.names)}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table>"
    )
    shown = f'<div class="scroll">{table}</div>'
    heading = f'{escape(title)} <span class="task">· {escape(source_name(source))}</span>'
    return f"<h3>{heading}</h3>\n{shown}\n"


def _depth_of(effect: Effect) -> str:
    return " / ".join("" if depth is None else f"{depth:.2f}" for depth in effect.depths)


def _cell(cell: Measured | None) -> str:
    if cell is None:
        return '<td class="edge"></td>' + "<td></td>" * (1 + len(KL))
    read = "".join(
        f"<td><small>{number(f, cell.figures[f.name][0]) if f.name in cell.figures else ''}"
        "</small></td>"
        for f in KL
    )
    if cell.silent:
        return f'<td class="edge">/</td><td>/</td>{read}'
    return f'<td class="edge">{_change(cell.ica)}</td><td>{_change(cell.pia)}</td>{read}'


def _change(found: Accuracy) -> str:
    d = found.difference
    if math.isnan(found.share) or d is None:
        return "<small>·</small>"
    sign, words = MARKS[found.mark]
    text = f"{100 * d.value:+.1f} <small>[{100 * d.low:+.1f}, {100 * d.high:+.1f}]</small>"
    mark = f'<span class="mark {found.mark}" title="{words}">{sign}</span>'
    return text.replace("-", "−") + mark


def _how(models: Models) -> str:
    counts = ", ".join(
        f"{escape(report.study.model)} {report.suite.n_comparisons:,}" for report in models.reports
    )
    folders = " ".join(escape(report.study.folder.name) for report in models.reports)
    return (
        "<section><h2>How it was decided</h2>\n"
        "<p>Each model is judged by its own study, as its own report says: comparisons within a "
        f"study are corrected together (Holm): {counts}. Nothing is pooled over models. A pattern "
        "holds in all if every model supports it, and differs if one supports it and another "
        "contradicts it. Effects of a model with few layers are larger, because one layer is more "
        "of it: compare their signs and their order by depth rather than their size.</p>\n"
        f"<pre>moebound report {folders}</pre></section>"
    )


def _table(
    head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, text: bool = False
) -> str:
    """rows: a name, which is escaped, and cells of HTML."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
        for name, cells in rows
    )
    kind = ' class="text"' if text else ""
    return (
        f'<div class="scroll"><table{kind}>\n<thead><tr>{names}</tr></thead>\n<tbody>\n{body}'
        "</tbody></table></div>"
    )
