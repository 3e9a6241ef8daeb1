"""The report as one HTML page that needs nothing else: no script, no font, nothing to fetch."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from moebound.page import document
from moebound.paper.report import page_tables, page_verdicts, paper, plots
from moebound.paper.report.by_layer import whole_layers
from moebound.paper.report.cells import RANDOMISED, source_name
from moebound.paper.report.claims import PTS
from moebound.paper.report.report import Report

IN_SHORT = ("gaussian-sd-predicts", "gaussian-power-predicts", "where-most-sensitive",
            "deep-gain-by-magnitude")  # fmt: skip
_HEAT = {
    False: "how far the predictions move",
    True: "the same, each row over its own mean: red layers are more sensitive than the others",
}
_ANSWER = {"supports": "Yes.", "contradicts": "No.", "open": "Left open."}


def style() -> str:
    """What reports add to the style of all pages."""
    return files("moebound.paper.report").joinpath("page.css").read_text(encoding="utf-8")


def render(report: Report) -> str:
    """The whole page. Everything that comes from the study's files is escaped."""
    sections = [
        _opening(report),
        page_verdicts.conclusions(report),
        page_verdicts.questions(report),
        _tables(report),
        _heat_maps(report),
        _curves(report),
        _forests(report),
        _propagation(report),
        _how(report),
        _facts(report),
    ]
    return document(
        f"Errors in experts: {report.study.model}", sections, more_style=style(), contents=True
    )


def _opening(report: Report) -> str:
    study, counts = report.study, report.counts
    total = sum(counts.values())
    gaps = ""
    if report.gaps:
        items = "".join(f"<li>{escape(gap)}</li>" for gap in report.gaps)
        gaps = f'<div class="gaps"><p>What this study does not have:</p><ul>{items}</ul></div>'
    short = "".join(
        f"<li><b>{escape(verdict.claim.text)}</b> {_ANSWER[verdict.outcome]} "
        f"{escape(verdict.finding.why)}</li>"
        for verdict in map(report.verdict, IN_SHORT)
    )
    return (
        f"<header><h1>Where errors in experts hurt: {escape(study.model)}</h1>\n"
        f'<p class="lead">Of {total} conclusions of the paper {escape(paper.TITLE)}, this model '
        f"supports {counts['supports']}, contradicts {counts['contradicts']}, and leaves "
        f"{counts['open']} open.</p>\n"
        "<p>Errors were put into the experts of the model, simulated ones as in the paper and "
        "those of real compressors, and its answers and predictions compared with those of the "
        f"model without an error: {len(study.rows)} of {len(study.conditions)} conditions, "
        f"{study.n_problems} problems each where answers were asked. <b>ICA</b>: right answer in "
        "the format asked. <b>PIA</b>: right answer in any format. <b>KL</b>: how far the "
        f"distribution of the next token moved.</p>\n{gaps}\n"
        f'<ol class="short">{short}</ol></header>'
    )


def _tables(report: Report) -> str:
    if not report.tables:
        return ""
    body = "\n".join(page_tables.table_html(table) for table in report.tables)
    return (
        "<section><h2>The paper's tables, beside this model's</h2>\n"
        '<p class="note"><b>▼ ▲</b> lower, higher than without an error, significant after the '
        f"correction. <b>=</b> any change is within ±{PTS} (the whole 95 % "
        "interval). No mark: neither can be said. <b>/</b> no valid output. <b>·</b> not asked to "
        "answer. KL in nats a token: of the solutions' tokens, and of all text, prompts included. "
        "The paper's layers L1 to L26 are set beside the layers at "
        f"the same relative depth.</p>\n{body}</section>"
    )


def _heat_maps(report: Report) -> str:
    figures = [
        f'<figure class="wide"><div class="scroll">{drawn}</div><figcaption><b>{escape(task)}</b>'
        f" · {words}</figcaption></figure>"
        for task in report.study.tasks
        for relative, words in _HEAT.items()
        if (drawn := plots.heat_map(report.suite, task, relative=relative))
    ]
    if not figures:
        return ""
    n = len({layer for at in whole_layers(report.suite).values() for layer in at})
    return (
        f"<section><h2>Sensitivity by depth: {n} layers, each with an error in all experts</h2>\n"
        + "\n".join(figures)
        + "</section>"
    )


def _legend(report: Report) -> str:
    order = plots.series_of(report.suite.sources)
    items = "".join(
        f'<span><span class="swatch s{index % 8}"></span>{escape(source_name(source))}</span>'
        for source, index in order.items()
        if source != RANDOMISED
    )
    return f'<div class="legend">{items}</div>'


def _curves(report: Report) -> str:
    figures = [
        f"<figure>{drawn}<figcaption><b>{escape(title)}</b> · {escape(task)}</figcaption></figure>"
        for task in report.study.tasks
        for title, drawn in plots.curves(report.suite, task)
    ]
    if not figures:
        return ""
    return (
        "<section><h2>Simulated and real errors of the same bound</h2>\n"
        "<p>Where the paper's noise predicts the real codec, the curves lie on each other. Points: "
        "mean over noise seeds; bars: lowest and highest seed.</p>\n"
        f'{_legend(report)}<div class="plots small">\n' + "\n".join(figures) + "</div></section>"
    )


def _forests(report: Report) -> str:
    sources = [
        s for s in (report.suite.simulation, report.suite.codec) if s in report.suite.sources
    ]
    order, figures = plots.series_of(report.suite.sources), []
    for task in report.study.tasks:
        tables = [table for table in report.tables if table.task == task]
        for metric in ("ica", "pia"):
            drawn = plots.forest(tables, metric, sources, order, task)
            if drawn:
                figures.append(
                    f'<figure class="wide"><div class="scroll">{drawn}</div><figcaption>'
                    f"<b>{metric.upper()}</b> · {escape(task)}</figcaption></figure>"
                )
    if not figures:
        return ""
    items = "".join(
        f'<span><span class="swatch s{order[source] % 8}"></span>'
        f"{escape(source_name(source))}</span>"
        for source in sources
    )
    return (
        "<section><h2>Accuracies with their intervals</h2>\n"
        "<p>Bars: 95 % intervals (Wilson). Line and band: the model without an error. Diamonds: "
        f'the paper\'s numbers for its model.</p>\n<div class="legend">{items}</div>\n'
        + "\n".join(figures)
        + "</section>"
    )


def _propagation(report: Report) -> str:
    suite, figures = report.suite, []
    sources = [source for source in (suite.simulation, suite.codec) if source in suite.sources]
    for task in report.study.tasks:
        for name in ("6", "4", "8"):
            cells = [c for s in sources for c in suite.table(name, s) if c.key.task == task]
            drawn = plots.propagation(cells, report.study.layers, task)
            if drawn:
                figures.append(
                    f'<figure class="wide"><div class="scroll">{drawn}</div><figcaption><b>Table '
                    f"{name}</b> · {escape(task)}. Full: {escape(source_name(sources[0]))}"
                    + (f"; dashed: {escape(source_name(sources[1]))}" if sources[1:] else "")
                    + "</figcaption></figure>"
                )
                break
    if not figures:
        return ""
    cascade = report.verdict("cascade").finding.why
    return (
        "<section><h2>Where an error goes</h2>\n"
        "<p>On the way through the layers behind the perturbed one: how much the residual stream "
        "differs from that without an error, and how many of the routers' decisions. "
        f"{escape(cascade)}</p>\n" + "\n".join(figures) + "</section>"
    )


def _how(report: Report) -> str:
    return (
        "<section><h2>How it was decided</h2>\n"
        "<p>Every condition answers the same problems, so a difference is tested problem by "
        "problem: McNemar's exact test, and with several noise seeds its extension to the share of "
        "seeds that are right (exact sign-flip test; with one seed the two are the same). All "
        f"{report.suite.n_comparisons:,} comparisons of this page are corrected together (Holm): "
        "with no effect anywhere, the chance of even one mark or verdict by accident is 5 %. "
        "Ratios of KL are compared with the spread between seeds (Student). What is not "
        "significant is not called equal: that takes an interval within the margin. Tests are of "
        "these draws of noise on these problems.</p>\n"
        f"<pre>moebound report {escape(report.study.folder.name)}</pre></section>"
    )


def _facts(report: Report) -> str:
    study = report.study
    facts = {
        "model": study.model,
        "MoE layers": f"{len(study.layers)} (decoder layers {study.layers[0]} to "
        f"{study.layers[-1]}), {study.n_experts} experts each",
        "suite": study.suite,
        "tasks": ", ".join(study.tasks),
        "conditions": f"{len(study.rows)} of {len(study.conditions)}",
        "error sources": ", ".join(map(source_name, report.suite.sources)),
        "begun": study.created,
        "time measured": f"{sum(row.seconds for row in study.rows) / 60:.0f} min",
    }
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value
    )
    return f"<section><h2>Model and study</h2>\n<dl>{items}</dl></section>"
