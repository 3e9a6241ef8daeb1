"""`moebound bench methods`: every method at the same bytes."""

from __future__ import annotations

from pathlib import Path

import click

from moebound.cli import exits
from moebound.cli.hands import hire, works_in_parts
from moebound.cli.options import Numbers
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar


@click.command("methods")
@click.argument("src")
@click.option("--task", required=True, metavar="TASK", help="As in `moebound eval`.")
@click.option(
    "--methods",
    metavar="LIST",
    help="What to measure, without its size: bound,rtn,svd:f8,reap_re,reap_re+rtn,"
    "residual:svd:r2:f8,plan:fisher.  [default: all there are]",
)
@click.option(
    "--bits",
    type=Numbers(),
    metavar="LIST",
    help="Sizes: bits a weight of the experts, everything counted.  [default: 8,6,5,4,3,2.5,2,1.5]",
)
@click.option(
    "--removed",
    type=Numbers(),
    metavar="LIST",
    help="Percents of the experts' bytes to save, as papers on low rank state sizes (25,40,60): "
    "at these, svd, d2_moe_fixed, mobe_fixed, rfid_re, pruning and merging are compared, too.",
)
@click.option(
    "--residuals",
    metavar="LIST",
    help="Bases whose residual is compared with plain bound, at several rates: svd:r2:f8.  "
    "[default: some of each kind; none where --methods are given]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="STATS",
    help="What `moebound calibrate --search` wrote, of other text, for methods that need it.",
)
@click.option(
    "--fisher",
    type=click.Path(path_type=Path),
    metavar="STATS",
    help="What `moebound calibrate --fisher` wrote, of other text, for plan:fisher: planned for "
    "each size by what the loss feels, and coded by these.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep rows here: the same command goes on from them.",
)
@click.option(
    "--page",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write a page, too: plots, what papers claim and whether it holds here, every row.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N problems only.")
@click.option(
    "--answers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Answer the first N of them only, which is what takes long; KL is over all.",
)
@works_in_parts("a model of its own")
@output_options
def bench_methods(
    output: Output,
    src: str,
    task: str,
    methods: str | None,
    bits: list[float] | None,
    removed: list[float] | None,
    residuals: str | None,
    calibration: Path | None,
    fisher: Path | None,
    work: Path | None,
    page: Path | None,
    limit: int | None,
    answers: int | None,
    workers: int,
    ray_address: str | None,
) -> int:
    """What a model loses to each way of making its experts small, at the same bytes.

    Every row is a store, within a percent of the size, verified, loaded and compared with the
    original; what a method cannot come to is a row that says so, and the nearest that it can.

    A method is named without its size, which is found for it: ranks, how much is kept, integers
    and groups, or a bound. Behind a + is what codes the experts that are kept. plan:FOLDER stands
    for files of `moebound plan`, each at its own size.
    """
    from moebound.bench.methods import BITS, run
    from moebound.bench.methods.claims import to_json
    from moebound.bench.methods.page import render
    from moebound.bench.methods.table import render_methods
    from moebound.extras import check
    from moebound.files.durable import save_bytes
    from moebound.files.formats.statistics import read_statistics
    from moebound.tasks import get_task

    if page is not None:
        check("--page", "matplotlib")  # before long work
    names, bases = (
        None if asked is None else [part.strip() for part in asked.split(",") if part.strip()]
        for asked in (methods, residuals)
    )
    with step_bar(output, says_left=True) as say:
        report = run(
            src, get_task(task), methods=names, bits=bits or BITS, removed=removed or (),
            bases=bases,
            calibration=None if calibration is None else read_statistics(calibration),
            fisher=None if fisher is None else read_statistics(fisher),
            limit=limit, answers=answers, rows=work, workers=hire(workers, ray_address), say=say,
        )  # fmt: skip
    if page is not None:
        save_bytes(page, render(report).encode())
    output.result(to_json(report), render_methods(report))
    return exits.NEGATIVE if any(row.violated for row in report.rows) else exits.OK
