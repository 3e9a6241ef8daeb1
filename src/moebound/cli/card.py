"""`moebound card`: a store's model card, written anew with what was measured since."""

from __future__ import annotations

from pathlib import Path

import click

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options


@click.command()
@click.argument("dst", type=click.Path(file_okay=False))
@click.option(
    "--measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="What `moebound eval --json` or `moebound compare --json` printed for this store. May be "
    "given several times.",
)
@output_options
def card(output: Output, dst: str, measured: tuple[Path, ...]) -> int:
    """Write the model card (README.md) of a store: promises, plan and measurements.

    `moebound compress` writes one too; this one replaces it.
    """
    from moebound.cli.verify import require_store
    from moebound.store import read_measurement, write_card

    require_store(Path(dst))
    path = write_card(dst, [read_measurement(file) for file in measured])
    output.result(
        {"path": str(path), "measured": [str(file) for file in measured]},
        wording.facts(dst, [("model card", str(path)), ("measurements", str(len(measured)))]),
    )
    return exits.OK
