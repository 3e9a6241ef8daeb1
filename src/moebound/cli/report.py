"""`moebound report`: what a study found, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import RenderableType
from rich.text import Text

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options

if TYPE_CHECKING:
    from moebound.paper.report import Models, Report

PAGE_FILE, MODELS_FILE = "report.html", "models.html"
_TOGETHER = {"all": "in all", "none": "in none", "differ": "differs", "open": ""}


@click.command()
@click.argument(
    "folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "-o",
    "--output",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Where to write the page.  [default: DIR/report.html; of several, models.html in the "
    "first]",
)
@output_options
def report(output: Output, folders: Sequence[Path], page: Path | None) -> int:
    """Make one page of what `moebound study` found in DIR, or of several models side by side.

    Of one study: each table of the MoE-Compression paper beside the paper's own numbers, and a
    verdict on each of its conclusions and open questions for this model. Of several: verdicts and
    effects by model and relative depth, and whether the paper's patterns hold in all. A study that
    is not finished gives a page that says what is missing. The page needs no network.
    """
    from moebound.extras import check
    from moebound.files.durable import save_bytes
    from moebound.paper.report import compare_models, make_report, read_study
    from moebound.paper.report.page import render
    from moebound.paper.report.page_models import render_models

    check("the page of a report", "matplotlib")
    reports = [make_report(read_study(folder)) for folder in folders]
    if len(reports) == 1:
        html, found, shown = render(reports[0]), reports[0].to_json(), _summary(reports[0])
    else:
        models = compare_models(reports)
        html, found, shown = render_models(models), models.to_json(), _beside(models)
    path = folders[0] / (PAGE_FILE if len(reports) == 1 else MODELS_FILE) if page is None else page
    save_bytes(path, html.encode())
    output.result({"ok": True, "page": str(path), **found}, *shown)
    output.note(f"page: {path} (open it in a browser)")
    return exits.OK


def _beside(models: Models) -> list[RenderableType]:
    """Verdicts with simulated errors, then those with the real codec where they differ."""
    from moebound.paper.report.claims import WORDS

    rows = []
    for entry in models.judged:
        words = WORDS[entry.claim.kind]
        cells = [
            words[outcome] + ("" if real in (None, outcome) else f" (codec: {words[real]})")
            for outcome, real in zip(entry.outcomes, entry.real, strict=True)
        ]
        rows.append([entry.claim.text, *cells, _TOGETHER[entry.together]])
    answer = WORDS["question"][models.generalises]
    return [
        wording.grid(["", *models.names, "together"], rows),
        Text(f"Do the paper's three patterns hold in all of these models: {answer}."),
    ]


def _summary(found: Report) -> list[RenderableType]:
    from moebound.paper.report.claims import WORDS

    rows = [
        [
            v.claim.text,
            WORDS[v.claim.kind][v.outcome],
            "" if v.real is None else WORDS[v.claim.kind][v.real.outcome],
        ]
        for v in found.verdicts
    ]
    study = found.study
    done = f"{len(study.rows)} of {len(study.conditions)} conditions"
    # Text, not str: a name with brackets in it is no markup.
    parts: list[RenderableType] = [Text(f"{study.model}, suite {study.suite}: {done}")]
    parts += [Text(f"  {gap}") for gap in found.gaps]
    return [*parts, wording.grid(["", "simulated errors", "real codec"], rows)]
