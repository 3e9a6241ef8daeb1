"""`moebound thresholds`: what skipping policies need to know of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from moebound.files.formats.skipping import Thresholds


@click.command()
@click.argument("src")
@click.option("--task", required=True, metavar="TASK",
              help="Its problems with their solutions are read: wordmath, wordmath-hard, gsm8k, "
                   "math, or a file of problems.")  # fmt: skip
@click.option("--out", "-o", type=click.Path(dir_okay=False, path_type=Path), required=True,
              metavar="FILE", help="Where the thresholds are written.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="N problems of the task.")
@click.option("--skip", type=click.IntRange(min=0), default=0, metavar="N", show_default=True,
              help="Leave out the first N problems, for measuring.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
              default="float32", show_default=True, help="What to compute with.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True,
              help="Where: cpu, cuda, or auto for all there are.")  # fmt: skip
@output_options
def thresholds(
    output: Output,
    src: str,
    task: str,
    out: Path,
    limit: int | None,
    skip: int,
    dtype: str,
    device: str,
) -> int:
    """Measure by what experts of SRC, a checkpoint or a store, may be skipped while it runs.

    Of each layer: the median ratio of a token's second weight to its first, and the KL divergence
    from the whole model without the layer's experts. Then what 20 thresholds of MoDES skip and
    cost. `--skip` of eval, generate and serve reads the file (`--calibration FILE`).
    """
    from moebound.calibrate.thresholds import measure_thresholds
    from moebound.evaluate.loading import load
    from moebound.tasks import get_task

    asked = get_task(task)
    loaded = load(src, dtype=dtype, device=device)
    with step_bar(output) as say:
        found = measure_thresholds(loaded, asked, limit, skip=skip, say=say)
    found.save(out)
    document: dict[str, Any] = {"ok": True, "output": str(out), **found.to_json()}
    output.result(document, *_tables(found, out))
    return exits.OK


def _tables(found: Thresholds, out: Path) -> list[Any]:
    layers = [
        (str(line.layer), f"{line.median_ratio:.3f}", f"{line.kl:.3g}", f"{line.answer_kl:.3g}")
        for line in found.layers
    ]
    points = [
        (f"{point.tau:.3g}", f"{100 * point.share:.1f} %", f"{point.kl:.3g}",
         f"{point.answer_kl:.3g}")
        for point in found.points
    ]  # fmt: skip
    text = f"{found.task}, {found.n_sequences} problems, {found.n_tokens} tokens"
    return [
        wording.facts(found.model, [("text", text), ("written", str(out))]),
        wording.grid(("layer", "median w2 / w1", "KL without it", "answers"), layers),
        wording.grid(("MoDES' tau", "skipped", "KL", "answers"), points),
    ]
