"""The report as one HTML page that needs nothing else: no script, no font, no picture to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from moebound.demo.columns import FULL_SIZE_COLUMNS, main_columns
from moebound.demo.plots import bits_against_kl, rate_against_kl
from moebound.demo.report import Report, Row

STORE_RATE = 0.3


def render(report: Report) -> str:
    """The whole page."""
    style = files("moebound.demo").joinpath("page.css").read_text(encoding="utf-8")
    sections = [
        _opening(report),
        _table(report),
        _plots(report),
        _samples(report),
        _full_size(report),
        _limit(report),
        _how(report),
        _facts(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>moebound: what a bound on every weight costs</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _opening(report: Report) -> str:
    verdict = (
        '<p class="verdict">Every store verified: all hashes match, and no weight of any expert is '
        "farther from the original than was promised.</p>"
        if report.ok
        else '<p class="verdict bad">A promise is broken. See the table, and demo.json for which '
        "tensors.</p>"
    )
    return (
        "<header><h1>What a bound on every weight costs</h1>\n"
        f'<p class="lead">{_finding(report)}</p>\n'
        "<p>The experts of a small trained Mixture-of-Experts model were compressed so that no "
        "weight moves by more than a chosen share (the <em>rate</em>) of its expert's mean "
        "|weight|. Each result is a checkpoint on disk that was verified against the original, "
        "loaded with <code>AutoModelForCausalLM.from_pretrained</code>, and compared with the "
        f"original model on {report.n_prompts} prompts.</p>\n{verdict}</header>"
    )


def _finding(report: Report) -> str:
    """The first thing to know, in figures of this run."""
    lossy = [row for row in report.rows if row.rate is not None]
    if not lossy:
        return "Exact copies only: nothing was lost, and little was gained."
    rate = min({row.rate for row in lossy if row.rate}, key=lambda value: abs(value - STORE_RATE))
    first, *others = (row for row in lossy if row.rate == rate)
    text = (
        f"At rate {rate:g}, <code>{escape(first.codec)}</code> keeps the experts in "
        f"{first.expert_bits_per_weight:.2f} bits per weight instead of 16, and "
        f"{first.reproduced} of {report.n_prompts} problems are solved; the original solves "
        f"{report.model.reproduced}."
    )
    for row in others:
        text += (
            f" <code>{escape(row.codec)}</code> takes {row.expert_bits_per_weight:.2f} bits for "
            "the same promise."
        )
    return text


def _swatch(row: Row, lossy: Sequence[str]) -> str:
    series = f" s{lossy.index(row.codec) % 4}" if row.codec in lossy else ""
    return f'<span class="swatch{series}"></span>'


def _table(report: Report) -> str:
    columns = main_columns(report)
    lossy = list(dict.fromkeys(row.codec for row in report.rows if row.rate is not None))
    groups = "".join(
        f'<th class="group" colspan="{len(list(members))}">{escape(name)}</th>'
        if name
        else "<th></th>"
        for name, members in groupby(columns, key=lambda column: column.group)
    )
    names = "".join(f'<th scope="col">{escape(column.name)}</th>' for column in columns)
    body, last = [], None
    for row in report.rows:
        cells = [escape(column.cell(row)) for column in columns]
        cells[0] = _swatch(row, lossy) + cells[0]
        if not row.verified:
            cells[2] = f'<span class="off">{cells[2]} broken</span>'
        first = ' class="first"' if row.codec != last else ""
        body.append(f"<tr{first}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        last = row.codec
    return (
        '<section><h2>Size, error, speed and what the model makes of it</h2>\n<div class="scroll">'
        f"<table>\n<thead><tr>{groups}</tr>\n<tr>{names}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table></div>\n"
        '<p class="note"><b>kept/asked</b>: the largest error of any weight, after rounding to '
        "bf16, over the error allowed; above 1 would be a broken promise. <b>experts</b>: all "
        "bytes of the compressed experts. <b>model</b>: the weight files whole, headers and every "
        "tensor that was not compressed included. <b>decode</b>: one thread, memory to memory. "
        "<b>KL</b>: how far the distribution of the next token moved, KL(original || "
        "compressed), with prompt and reference solution as the text "
        f"({report.n_positions:,} positions, float32). "
        "<b>solutions</b>: only where the model was trained, on the solution. <b>top-1</b>: the "
        "most likely token is the same. <b>right</b>: at every step of the reference solution the "
        "most likely token is the reference's, so that greedy decoding gives it, in the format "
        f"asked; the original gets {report.model.reproduced}. {_notes(report)}</p></section>"
    )


def _notes(report: Report) -> str:
    notes = {
        "sz3": "<b>sz3</b>: the real library without prediction, its smallest on weights, patched "
        "where rounding to bf16 would break the bound.",
        "cuszp:fixed": "<b>cuszp:fixed</b>: the stream of cuSZp without differences, its smallest "
        "on weights, patched likewise. It has no entropy coder: 32 weights take the bits of the "
        "largest.",
    }
    found = {row.codec for row in report.rows}
    return " ".join(note for codec, note in notes.items() if codec in found)


def _plots(report: Report) -> str:
    if not any(row.rate is not None and row.kl_nats > 0 for row in report.rows):
        return ""
    return (
        '<section><h2>Error in, error out</h2>\n<div class="plots">\n<figure>'
        f"{rate_against_kl(report.rows)}\n<figcaption>A larger bound moves the model farther, "
        "smoothly. Codecs with the same bound do about the same damage: what differs is the size. "
        "Bars: two standard errors over prompts.</figcaption></figure>\n<figure>"
        f"{bits_against_kl(report.rows)}\n<figcaption>The same runs by size: lower and farther "
        "left is better. The gap between the curves is what the better coding saves at equal "
        "damage; on matrices as small as these, part of it is fixed cost."
        "</figcaption></figure>\n</div></section>"
    )


def _samples(report: Report) -> str:
    if not report.samples:
        return ""
    codec = f"{escape(report.samples_codec)}, rate {report.samples_rate:g}"
    body = "\n".join(
        '<tr class="first">'
        + "".join(f"<td>{escape(t)}</td>" for t in (s.prompt, s.original, s.compressed))
        + "</tr>"
        for s in report.samples
    )
    return (
        "<section><h2>Where it begins to hurt</h2>\n"
        "<p>Greedy answers at the coarsest bound, chosen to show the effect: the first problem "
        "that stays right, then the first ones that only the compressed model gets wrong.</p>\n"
        '<div class="scroll"><table class="text">\n<thead><tr><th>problem</th><th>original</th>'
        f"<th>{codec}</th></tr></thead>\n<tbody>\n{body}\n</tbody></table></div></section>"
    )


def _full_size(report: Report) -> str:
    if not report.full_size:
        return ""
    rows, cols = report.full_size[0].shape
    names = "".join(f'<th scope="col">{escape(column.name)}</th>' for column in FULL_SIZE_COLUMNS)
    ordered = sorted(report.full_size, key=lambda row: row.codec.partition(":")[0])
    body, last = [], None
    for row in ordered:
        codec = row.codec.partition(":")[0]
        first = ' class="first"' if codec != last else ""
        cells = "".join(f"<td>{escape(column.cell(row))}</td>" for column in FULL_SIZE_COLUMNS)
        body.append(f"<tr{first}>{cells}</tr>")
        last = codec
    return (
        f"<section><h2>The same codecs on a matrix of {rows} x {cols}</h2>\n"
        "<p>As large as one expert matrix of a 16-billion-parameter model: synthetic bf16 values, "
        "rows of unequal scale as in trained weights. Fixed costs per matrix disappear here, in "
        "size and in speed.</p>\n"
        f'<div class="scroll"><table>\n<thead><tr>{names}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>\n"
        '<p class="note"><b>entropy</b>: of an ideal uniform quantizer that treats all weights '
        "alike; knowing which rows are small allows less. <code>sz3</code> is the smallest of its "
        "algorithms in each line. One thread. <code>moebound bench codec</code> measures more "
        "matrices, for longer.</p></section>"
    )


def _limit(report: Report) -> str:
    m = report.model
    return (
        "<section><h2>What this does not show</h2>\n"
        f'<p class="limit">The model has {m.n_parameters / 1e6:.1f} million parameters and one '
        "narrow task; how much a larger model loses at the same rate has to be measured on that "
        f"model. An expert matrix here has {m.weights_per_matrix:,} weights, so headers and tables "
        "weigh more in the bits, and calls more in the decode speed, than they would in a large "
        "one.</p></section>"
    )


def _how(report: Report) -> str:
    return (
        "<section><h2>Make this page, use the result</h2>\n"
        f"<pre>{escape(report.command)}</pre>\n"
        "<p>One of the stores was left beside this page, in <code>store/</code>:</p>\n"
        "<pre>import moebound\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("store")</pre></section>'
    )


def _facts(report: Report) -> str:
    m = report.model
    model = {
        "model": f"{m.name}, architecture {m.model_type}",
        "parameters": f"{m.n_parameters:,}; {m.expert_weights:,} of them in experts "
        f"({100 * m.expert_weights / m.n_parameters:.0f} %)",
        "experts": f"{m.n_experts:,} in {m.n_moe_layers} MoE layers, "
        f"{m.experts_per_token} chosen per token",
        "weight file": f"{m.weight_file_bytes / 1e6:.1f} MB in bf16",
    }
    return (
        "<section><h2>Model, machine, versions</h2>\n<dl>"
        + "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
            for name, value in {
                **model,
                **report.machine,
                "versions": ", ".join(f"{name} {text}" for name, text in report.versions.items()),
                "time taken": f"{report.seconds:.0f} s",
            }.items()
        )
        + "</dl></section>"
    )
