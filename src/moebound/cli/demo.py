"""`moebound demo`: the whole road on a built-in model, as tables, a page and a JSON file."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import RenderableType

from moebound.cli import exits, wording
from moebound.cli.options import CodecIds, Numbers
from moebound.cli.output import Output, finite, output_options
from moebound.cli.steps import step_bar
from moebound.wordmath.builtin import MODELS

if TYPE_CHECKING:
    from moebound.demo.report import Report


@click.command()
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("moebound-demo"),
    show_default=True,
    help="Where the page goes.",
)
@click.option(
    "--model",
    type=click.Choice(MODELS),
    default=MODELS[0],
    show_default=True,
    help="Whose experts; both solve the word problems that are asked.",
)
@click.option("--rates", type=Numbers(), default=None, help="Bounds to try, as in 0.1,0.3.")
@click.option("--codecs", type=CodecIds(), default=None, help="Codecs to compare.")
@click.option(
    "--prompts",
    type=click.IntRange(min=2),
    default=None,
    metavar="N",
    help="Problems of each task.  [default: 128]",
)
@click.option(
    "--suite",
    default=None,
    help="What the study measures: quick, or a file with conditions.  [default: quick]",
)
@output_options
def demo(
    output: Output,
    folder: Path,
    model: str,
    rates: list[float] | None,
    codecs: list[str] | None,
    prompts: int | None,
    suite: str | None,
) -> int:
    """Go the whole road on a small trained model, and make a page of it.

    Which experts its task uses, where errors hurt, a bound for every expert, compressed models side
    by side, verified and compared, and what codecs do on matrices of full size. Writes index.html
    (a page that needs no network), demo.json, and beside them what the commands profile, study,
    sensitivity, plan and compress write. Takes some 500 s of CPU time, mostly in two processes;
    stopped and started again, it goes on from where it was.
    """
    # Threads of torch that spin while they wait would keep other programs from their work; it is
    # read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moebound.demo.folder import Folder
    from moebound.demo.page import render
    from moebound.demo.road import Asked, run
    from moebound.files.documents import save_json
    from moebound.files.durable import disk_errors

    default = Asked()
    asked = Asked(
        tuple(sorted(set(rates))) if rates else default.rates,
        tuple(dict.fromkeys(codecs)) if codecs else default.codecs,
        prompts or default.n_problems,
        suite or default.suite,
        model,
    )
    given = _options(model, rates, codecs, prompts, suite)
    command = shlex.join(["moebound", "demo", "-o", folder.name, *given])
    with step_bar(output) as say:
        report = run(folder, asked, command=command, say=say)
    document, place = finite(report.to_json()), Folder(folder)
    with disk_errors(place.page):
        place.page.write_text(render(report), encoding="utf-8")
    save_json(place.data, document)
    output.result(document, *_tables(report))
    output.note(f"page: {place.page} (open it in a browser)")
    return exits.OK if report.ok else exits.NEGATIVE


def _options(
    model: str,
    rates: list[float] | None,
    codecs: list[str] | None,
    prompts: int | None,
    suite: str | None,
) -> list[str]:
    """The options that were given, to be printed on the page."""
    given = {
        "--model": "" if model == MODELS[0] else model,
        "--rates": ",".join(f"{rate:g}" for rate in rates or ()),
        "--codecs": ",".join(codecs or ()),
        "--prompts": "" if prompts is None else str(prompts),
        "--suite": "" if suite is None else Path(suite).name,
    }
    return [part for name, value in given.items() if value for part in (name, value)]


def _tables(report: Report) -> list[RenderableType]:
    from moebound.demo.columns import speed_columns, store_columns

    columns, speeds = store_columns(report), speed_columns(report.speeds)
    tables: list[RenderableType] = [
        wording.grid(
            [column.narrow_title for column in columns],
            [[column.cell(row) for column in columns] for row in report.rows],
        )
    ]
    if report.speeds.rows:
        shape = " x ".join(map(str, report.speeds.rows[0].shape))
        low, high = sorted(report.speeds.memcpy_gb_per_s)
        tables += [
            f"The codecs on a synthetic matrix of {shape}, as large models have; memcpy wrote "
            f"{low:.1f} to {high:.1f} GB/s:",
            wording.grid(
                [column.narrow_title for column in speeds],
                [[column.cell(row) for column in speeds] for row in report.speeds.rows],
            ),
        ]
    return tables
