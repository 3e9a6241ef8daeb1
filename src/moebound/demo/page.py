"""The report as one HTML page that needs nothing else: no script, no font, no picture to fetch."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from moebound.demo import page_model, page_stores
from moebound.demo.report import Report
from moebound.page import document
from moebound.page.parts import code, facts, machine


def render(report: Report) -> str:
    """The whole page."""
    style = files("moebound.demo").joinpath("page.css").read_text(encoding="utf-8")
    sections = [
        _opening(report),
        page_model.model(report),
        page_model.routing(report),
        page_model.sensitivity(report),
        page_stores.plan(report),
        page_stores.table(report),
        page_stores.verified(report),
        page_stores.samples(report),
        page_stores.speeds(report),
        _limit(report),
        _again(report),
        _facts(report),
    ]
    return document("moebound: the whole road on one model", sections, more_style=style)


def _opening(report: Report) -> str:
    verdict = (
        '<p class="verdict">Every store verified: all hashes match, and no weight of any expert is '
        "farther from the original than was promised.</p>"
        if report.ok
        else '<p class="verdict bad">A promise is broken. See the table, and demo.json for which '
        "tensors.</p>"
    )
    points = "".join(f"<li>{point}</li>" for point in _in_short(report))
    return (
        "<header><h1>Smaller experts, with a promise on every weight</h1>\n"
        '<p class="lead">moebound makes the experts of a Mixture-of-Experts language model several '
        "times smaller, and guarantees that no single weight moves by more than a bound that you "
        "set. This page is one run of it from beginning to end, on a small trained model: what "
        "the model can do, which experts it uses, where errors hurt it, what to spend bytes on, "
        f'and what that came to.</p>\n{verdict}\n<ul class="short">{points}</ul>\n'
        f"<p>Beside every figure is the command that gives it for your own model: put a folder or "
        f"a model id of the hub in the place of {code(report.model.name)}, and "
        "a task of your own (also a file with problems) in the place of "
        f"{code(report.task)}.</p></header>"
    )


def _in_short(report: Report) -> list[str]:
    """The first things to know, in figures of this run."""
    found, first = list[str](), page_stores.first_row(report)
    tally = report.original[report.task].total
    if first is not None and first.rate is not None:
        text = (
            f"At rate {first.rate:g} (no weight moves by more than {first.rate:g} times the mean "
            f"|weight| of its expert) {code(first.codec)} keeps the experts in "
            f"<b>{first.expert_bits_per_weight:.2f} bits a weight instead of 16</b>. The model "
            f"then solves {first.tally.pia} of {report.n_problems} problems; the original "
            f"{tally.pia}."
        )
        others = [
            f"{code(row.codec)} takes {row.expert_bits_per_weight:.2f}"
            for row in report.rows
            if row.rate == first.rate and not row.planned and row.codec != first.codec
        ]
        if others:
            text += f" For the same promise {' and '.join(others)}."
        found.append(text)
        planned = report.row(first.codec, first.rate, planned=True)
        if planned is not None and first.score.answer_kl_nats:
            found.append(
                "With a bound of its own for every expert, chosen from measurements, the same "
                f"bytes move the model's predictions {page_stores.times(planned, first)} "
                '(<a href="#plan">the plan</a>).'
            )
    counts = report.study.counts
    found.append(
        f"Of {sum(counts.values())} conclusions of a paper on errors in experts, a quick look at "
        f"this model supports {counts['supports']}, contradicts {counts['contradicts']} and leaves "
        f'{counts["open"]} open (<a href="#study">where errors hurt</a>).'
    )
    return found


def _limit(report: Report) -> str:
    m = report.model
    return (
        "<section><h2>What this does not show</h2>\n"
        f'<p class="limit">The model has {m.n_parameters / 1e6:.1f} million parameters and one '
        "narrow kind of task; how much a larger model loses at the same rate has to be measured on "
        f"that model. {report.n_problems} problems tell accuracies apart that differ by about "
        f"{100 * _apart(report):.0f} points; KL sees far smaller changes, but does not say what "
        "they mean for answers. An expert matrix here has "
        f"{m.weights_per_matrix:,} weights, so headers and tables weigh more in the bits than they "
        "would in a large one.</p></section>"
    )


def _apart(report: Report) -> float:
    """Half the width of the interval of the original's accuracy."""
    share = report.original[report.task].total.pia_share
    return (share.high - share.low) / 2


def _again(report: Report) -> str:
    first = page_stores.first_row(report)
    folder = f"stores/{first.name if first else report.rows[0].name}"
    return (
        "<section><h2>Make this page, use the result</h2>\n"
        f"<pre>{escape(report.command)}</pre>\n"
        "<p>Everything it made lies beside this page; a run that is stopped goes on. The stores "
        "are ordinary checkpoints:</p>\n"
        "<pre>import moebound  # teaches transformers to load them\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{escape(folder)}")</pre></section>'
    )


def _facts(report: Report) -> str:
    about = {
        **machine(report.environment),
        "time taken": f"{sum(report.seconds.values()):.0f} s, as the clock on the wall goes: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in report.seconds.items()),
    }
    return f"<section><h2>Machine and versions</h2>\n{facts(about)}</section>"
