"""`moebound report`: what a study found, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import RenderableType
from rich.text import Text

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options

if TYPE_CHECKING:
    from moebound.paper.report import Report

PAGE_FILE = "report.html"
_WORDS = {
    "conclusion": {"supports": "supported", "contradicts": "contradicted", "open": "left open"},
    "question": {"supports": "yes", "contradicts": "no", "open": "left open"},
}


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Where to write the page.  [default: DIR/report.html]",
)
@output_options
def report(output: Output, folder: Path, page: Path | None) -> int:
    """Make one page of what `moebound study` found in DIR.

    Each table of the MoE-Compression paper beside the paper's own numbers, and a verdict on each of
    its conclusions and open questions for this model. A study that is not finished gives a report
    that says what is missing. The page needs no network.
    """
    from moebound.files.durable import save_bytes
    from moebound.paper.report import make_report, read_study
    from moebound.paper.report.page import render

    found = make_report(read_study(folder))
    path = folder / PAGE_FILE if page is None else page
    save_bytes(path, render(found).encode())
    output.result({"ok": True, "page": str(path), **found.to_json()}, *_summary(found))
    output.note(f"page: {path} (open it in a browser)")
    return exits.OK


def _summary(found: Report) -> list[RenderableType]:
    rows = [
        [
            v.claim.id,
            _WORDS[v.claim.kind][v.outcome],
            "" if v.real is None else _WORDS[v.claim.kind][v.real.outcome],
        ]
        for v in found.verdicts
    ]
    study = found.study
    done = f"{len(study.rows)} of {len(study.conditions)} conditions"
    # Text, not str: a name with brackets in it is no markup.
    parts: list[RenderableType] = [Text(f"{study.model}, suite {study.suite}: {done}")]
    parts += [Text(f"  {gap}") for gap in found.gaps]
    return [*parts, wording.grid(["", "simulated errors", "real codec"], rows)]
