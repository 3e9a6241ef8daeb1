"""`moebound compare`: how far one model is from another, on a text, as a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebound.cli import exits, wording
from moebound.cli.options import check_text, reads_a_text
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moebound.evaluate.loading import Loaded
    from moebound.evaluate.receipt import Reading, Receipt
    from moebound.score import Score
    from moebound.tasks.base import Task


@click.command()
@click.argument("src")
@click.argument("other")
@reads_a_text(least_window=2)
@click.option("--skip", type=click.IntRange(min=0), default=0, metavar="N",
              help="Leave out the first N problems.  [default: 0]")  # fmt: skip
@click.option(
    "--floor",
    metavar="FILE",
    help="An unquantized GGUF file of SRC: how far engines alone are apart.",
)
@output_options
def compare(
    output: Output,
    src: str,
    other: str,
    task: str | None,
    text: Path | None,
    limit: int | None,
    skip: int,
    window: int | None,
    floor: str | None,
) -> int:
    """Say how far OTHER, made from SRC, predicts something else than SRC.

    OTHER is a store, a checkpoint, a model id, or a GGUF file, which llama.cpp runs. KL(SRC ||
    OTHER) of the next token: its mean, median, 99 % and 99.9 %, over all tokens, and over those of
    solutions; how often both hold the same token for the most likely; perplexities; and every byte
    of OTHER's files over the weights of SRC. `moebound card DST --measured FILE` puts what --json
    prints into a store's card.
    """
    check_text(task, text, skip=skip or None, window=window)
    if floor is not None and not (floor.endswith(".gguf") and other.endswith(".gguf")):
        raise click.UsageError("--floor is a GGUF file, and goes with OTHER as a GGUF file")
    for name in (other, floor):
        if name is not None and name.endswith(".gguf") and not Path(name).is_file():
            raise click.UsageError(f"{name}: no such file")
    from moebound.evaluate.receipt import receipt
    from moebound.tasks import get_task

    asked = None if task is None else get_task(task)

    def read(loaded: Loaded) -> Reading:
        return _reading(loaded, asked, text, limit, skip=skip, window=window)

    with step_bar(output) as say:
        found = receipt(src, other, read, floor=floor, say=say)
    output.result(found.to_json(), *_tables(found))
    return exits.OK


def _reading(
    loaded: Loaded, task: Task | None, file: Path | None, limit: int | None, *, skip: int,
    window: int | None,
) -> Reading:  # fmt: skip
    from moebound.calibrate.text import of_file, solved, whole
    from moebound.evaluate.receipt import Reading

    if task is None:
        assert file is not None
        windows = of_file(loaded, file, limit, window=window)
        halves = [(row[:1], row[1:]) for row in windows.rows]
        return Reading(windows.name, windows.sha256, halves, has_answers=False)
    rows = solved(loaded, task, limit, skip=skip)
    return Reading(task.name, whole(task, rows).sha256, rows, has_answers=True)


def _tables(found: Receipt) -> list[RenderableType]:
    text, score = found.text, found.score
    tokens = f"{score.n_tokens} tokens in {score.n_problems} sequences"
    if text.has_answers:
        tokens += f", {score.n_answer_tokens} of them of solutions"
    lines = [
        ("text", f"{text.name}, {tokens}"),
        ("SHA-256 of its tokens", text.sha256),
        ("original", f"{found.original.engine}, {wording.n_bytes(found.original.n_bytes)}"),
        ("other", f"{found.other.engine}, {wording.n_bytes(found.other.n_bytes)}, "
         f"{found.whole_bits_per_weight:.3f} bits per weight of the whole model"),
    ]  # fmt: skip
    columns = ["nats a token", "mean", "median", "99 %", "99.9 %", "same top token", "perplexity"]
    rows = [_row("all tokens", score, "", found.other.perplexity.value)]
    if text.has_answers:
        rows.append(_row("solutions", score, "answer_", found.other.answers.value))
    if found.floor is not None:
        rows.append(_row("engines alone, all tokens", found.floor, ""))
    rows.append(["original", "", "", "", "", "", f"{found.original.perplexity.value:.5g}"])
    if text.has_answers:
        solved = f"{found.original.answers.value:.5g}"
        rows.append(["original, solutions", "", "", "", "", "", solved])
    return [wording.facts(f"{found.other.name} against {found.original.name}", lines),
            wording.grid(columns, rows)]  # fmt: skip


def _row(name: str, score: Score, prefix: str, perplexity: float | None = None) -> list[str]:
    def figure(kind: str) -> str:
        value, error = (getattr(score, f"{prefix}kl_{kind}{end}") for end in ("nats", "stderr"))
        return f"{value:.3g} ± {error:.2g}"

    agreement = getattr(score, f"{prefix}top1_agreement")
    return [
        name, figure(""), *(figure(f"{kind}_") for kind in ("median", "p99", "p999")),
        f"{100 * agreement:.2f} %", "" if perplexity is None else f"{perplexity:.5g}",
    ]  # fmt: skip
