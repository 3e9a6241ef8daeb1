"""`moebound verify`: is the store what was written, and is every promise kept?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options
from moebound.cli.progress import progress_bar
from moebound.errors import StoreError

if TYPE_CHECKING:
    from moebound.store.summary import VerifyReport

SHOWN = 20


@click.command()
@click.argument("dst", type=click.Path(file_okay=False))
@click.option("--against", metavar="SRC", help="The original, to measure every error again.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="STATS",
    help="The statistics that it was made by, to compute again what became of outputs.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=None,
    help="Experts to work on at a time.  [default: one a CPU]",
)
@output_options
def verify(
    output: Output, dst: str, against: str | None, calibration: Path | None, jobs: int | None
) -> int:
    """Check a store: every hash, every certificate, with --against every bound, and with
    --calibration what became of outputs on the text that it was made by.

    Exit code 1 if anything is not as promised.
    """
    from moebound import store
    from moebound.files.formats.statistics import read_statistics

    require_store(Path(dst))
    # None there, or an unfinished one, is no broken promise.
    stats = None if calibration is None else read_statistics(calibration)
    with progress_bar(output, "verifying") as progress:
        report = store.verify(dst, against=against, calibration=stats, jobs=jobs, progress=progress)

    n_problems = len(report.problems) + report.more
    verdict = "good" if report.ok else f"{n_problems} problem{'s' if n_problems > 1 else ''}"
    measured = "measured again" if against is not None else "as certified; --against measures it"
    lines = [
        ("verdict", verdict),
        ("whole model", wording.bits(report.model_bits_per_weight)),
        ("looked at", f"{report.n_experts} experts, {report.n_tensors} tensors, "
         f"{wording.n_bytes(report.n_bytes)}"),
        *wording.promise(report.guarantee, report.worst, report.max_abs_error, measured),
        *wording.outputs(report.outputs, _computed(report)),
        *wording.without_weights(report.without_weights),
        ("time", f"{report.seconds:.1f} s"),
    ]  # fmt: skip
    problems = [
        Text(f"{problem.kind}: {f'{problem.tensor}: ' if problem.tensor else ''}{problem.message}")
        for problem in report.problems[:SHOWN]
    ]
    if len(report.problems) > SHOWN:
        problems.append(Text(f"and {len(report.problems) - SHOWN} more; --json has them all"))
    if report.more:
        problems.append(Text(f"and {report.more} more, which the first problem explains"))
    output.result(report.to_json(), wording.facts(dst, lines), *problems)
    return exits.OK if report.ok else exits.NEGATIVE


def _computed(report: VerifyReport) -> str:
    """How much of the outputs' figures was looked at."""
    if report.calibration is None:
        return "not checked: --calibration STATS with --against computes them again"
    if report.against is None:
        return "tokens and promises computed again; --against has the errors"
    return "computed again"


def require_store(path: Path) -> None:
    """A folder that never was a store is a typing error, not a broken promise.

    Anything with a trace of a store goes on to be judged. Raises StoreError.
    """
    from moebound.cli.inspect import is_store
    from moebound.store.format import CERTIFICATES_FILE
    from moebound.store.reader import existing_folder

    existing_folder(path)
    if not (is_store(path) or (path / CERTIFICATES_FILE).exists()):
        raise StoreError(
            f"{path}: this is no store; `moebound compress` makes one, `moebound inspect` shows "
            "what a folder is"
        )
