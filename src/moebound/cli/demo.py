"""`moebound demo`: the main job on the built-in model, as a table, a page and a JSON file."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import RenderableType

from moebound.cli import exits, wording
from moebound.cli.options import CodecIds, Numbers
from moebound.cli.output import Output, output_options, write_json
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from moebound.demo.report import Report

PAGE_FILE = "index.html"
DATA_FILE = "demo.json"


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
@click.option("--rates", type=Numbers(), default=None, help="Bounds to try, as in 0.1,0.3.")
@click.option("--codecs", type=CodecIds(), default=None, help="Codecs to compare.")
@click.option(
    "--prompts",
    type=click.IntRange(min=2),
    default=None,
    metavar="N",
    help="Use only the first N sample prompts.",
)
@output_options
def demo(
    output: Output,
    folder: Path,
    rates: list[float] | None,
    codecs: list[str] | None,
    prompts: int | None,
) -> int:
    """Compress a small trained model at several bounds, and show what it does to the model.

    Writes index.html (a page that needs no network), demo.json and one of the stores. Takes about
    three minutes on two cores.
    """
    # Threads of torch that spin while they wait would keep other programs from their work; it is
    # read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moebound.demo.page import render
    from moebound.demo.run import CODECS, EXACT_CODEC, RATES, run

    command = shlex.join(["moebound", "demo", "-o", folder.name, *_options(rates, codecs, prompts)])
    with step_bar(output) as say:
        report = run(
            folder,
            rates=rates or RATES,
            codecs=codecs or (*CODECS, EXACT_CODEC),
            n_prompts=prompts,
            command=command,
            say=say,
        )
    document = report.to_json()
    page = folder / PAGE_FILE
    page.write_text(render(report), encoding="utf-8")
    with (folder / DATA_FILE).open("w", encoding="utf-8") as data:
        write_json(document, data)
    output.result(document, *_tables(report))
    output.note(f"page: {page} (open it in a browser)")
    return exits.OK if report.ok else exits.NEGATIVE


def _options(rates: list[float] | None, codecs: list[str] | None, prompts: int | None) -> list[str]:
    """The options that were given, to be printed on the page."""
    given = []
    if rates:
        given += ["--rates", ",".join(f"{rate:g}" for rate in rates)]
    if codecs:
        given += ["--codecs", ",".join(codecs)]
    if prompts:
        given += ["--prompts", str(prompts)]
    return given


def _tables(report: Report) -> list[RenderableType]:
    from moebound.demo.columns import FULL_SIZE_COLUMNS, main_columns

    columns = main_columns(report)
    names = [column.narrow_title for column in columns]
    rows, full = report.rows, report.full_size
    tables: list[RenderableType] = [
        wording.grid(names, [[column.cell(row) for column in columns] for row in rows]),
    ]
    if full:
        shape = " x ".join(map(str, full[0].shape))
        tables += [
            f"The same codecs on a synthetic matrix of {shape}, as large models have:",
            wording.grid(
                [column.name for column in FULL_SIZE_COLUMNS],
                [[column.cell(row) for column in FULL_SIZE_COLUMNS]
                 for row in sorted(full, key=lambda row: row.codec.partition(":")[0])],
            ),
        ]  # fmt: skip
    return tables
