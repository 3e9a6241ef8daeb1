"""`moebound decompress`: a store in, an ordinary checkpoint out."""

from __future__ import annotations

import click

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options
from moebound.cli.progress import progress_bar


@click.command()
@click.argument("dst", type=click.Path(file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=None,
    help="Experts to work on at a time.  [default: one a CPU]",
)
@click.option("--overwrite", is_flag=True, help="Replace what is in OUT, once all is written.")
@output_options
def decompress(output: Output, dst: str, out: str, jobs: int | None, overwrite: bool) -> int:
    """Write the store DST as an ordinary checkpoint to OUT.

    transformers loads OUT without moebound. Names, shapes and shards are those of the original.
    """
    from moebound import store

    with progress_bar(output, "decompressing") as progress:
        done = store.decompress(dst, out, jobs=jobs, overwrite=overwrite, progress=progress)
    output.result(
        done.to_json(),
        wording.facts(
            f"{dst} -> {out}",
            [
                ("experts", f"{done.n_experts} decoded"),
                ("written", f"{done.n_tensors} tensors in {done.n_shards} files, "
                 f"{wording.n_bytes(done.n_bytes)}"),
                ("time", f"{done.seconds:.1f} s"),
            ],
        ),
    )  # fmt: skip
    return exits.OK
