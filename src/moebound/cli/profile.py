"""`moebound profile`: which experts a task uses, how often, and with what weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moebound.profile.profile import Profile, TaskUse
    from moebound.profile.profiling import Text


@click.command()
@click.argument("src")
@click.option("--task", "tasks", required=True, multiple=True, metavar="TASK",
              help="wordmath, wordmath-hard, gsm8k, math, or a file; repeatable.")  # fmt: skip
@click.option("-o", "--output", "out", type=click.Path(dir_okay=False, path_type=Path),
              required=True, help="Where to write the profile, a JSON file.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N",
              help="The first N problems of each task only.")  # fmt: skip
@click.option("--read", "text", type=click.Choice(["answers", "references"]), default="answers",
              show_default=True,
              help="After each prompt: the model's own answer, or the solution.")  # fmt: skip
@click.option("--figures", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Draw the paper's figures 1 to 5 there.")  # fmt: skip
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Keep every routing decision in this .npz file.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
              default="float32", show_default=True, help="What to compute with.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True,
              help="Where: cpu, cuda, or auto for all there are.")  # fmt: skip
@output_options
def profile(
    output: Output,
    src: str,
    tasks: tuple[str, ...],
    out: Path,
    limit: int | None,
    text: Text,
    figures: Path | None,
    trace: Path | None,
    dtype: str,
    device: str,
) -> int:
    """Record which experts SRC, a checkpoint or a store, chooses while it works through a task.

    For every layer and expert: how often it is chosen, and with what weights; for every layer, how
    evenly experts are used. `moebound study` and `moebound plan` know by it which experts are used
    most.

    Killed and started again, it goes on from where it was.
    """
    if len(set(tasks)) < len(tasks):
        raise click.UsageError(f"--task: each task once, found {', '.join(tasks)}")
    for path in (out, trace):
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{path}: there is no folder {path.parent}")
    # Threads of torch that spin while they wait would keep other programs from their work; it is
    # read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moebound.evaluate.loading import load
    from moebound.extras import check
    from moebound.profile.profiling import profile_tasks
    from moebound.tasks import get_task

    # Everything that can be wrong with what was asked is found before the model is loaded.
    if figures is not None:
        check("--figures", "matplotlib")
    asked = [(task, task.problems(limit)) for task in map(get_task, tasks)]
    loaded = load(src, dtype=dtype, device=device)
    with step_bar(output) as say:
        found = profile_tasks(loaded, asked, out, text=text, trace=trace, progress=say)
    drawn: list[Path] = []
    if figures is not None:
        from moebound.profile.figures import draw

        drawn = draw(found, figures)
    output.result(_document(found, out, trace, drawn), *_tables(found, out))
    if drawn:
        output.note(f"figures: {figures}")
    return exits.OK


def _document(found: Profile, out: Path, trace: Path | None, drawn: list[Path]) -> dict[str, Any]:
    """The profile without the histograms, which are in the file."""
    document = found.to_json()
    for task in document["tasks"]:
        task.pop("layers")
    return document | {
        "ok": True,
        "output": str(out),
        "trace": None if trace is None else str(trace),
        "figures": [str(path) for path in drawn],
    }


def _tables(found: Profile, out: Path) -> list[RenderableType]:
    tables: list[RenderableType] = [f"{found.model}: {out}"]
    for task in found.tasks:
        tables += _of_task(task)
    return tables


def _of_task(task: TaskUse) -> list[RenderableType]:
    from moebound.profile.profile import balance_of

    columns = ("layer", "experts", "most used", "share", "least used", "share", "imbalance",
               "utilisation", "entropy", "Gini", "median weight")  # fmt: skip
    rows = []
    for layer in task.layers:
        measured, most, least = balance_of(layer), layer.ranking[0], layer.ranking[-1]
        if measured is None:
            rows.append((str(layer.layer), str(layer.n_experts), *["-"] * 9))
            continue
        rows.append(
            (
                str(layer.layer), str(layer.n_experts),
                str(most), wording.percent(layer.frequencies[most], 1),
                str(least), wording.percent(layer.frequencies[least], 1),
                f"{measured.imbalance:.3f}", f"{measured.utilisation:.3f}",
                f"{measured.entropy:.3f}", f"{measured.gini:.3f}",
                f"{layer.weight_quantile(0.5):.3f}",
            )
        )  # fmt: skip
    kind = "answers of the model" if task.text == "answers" else "solutions of the task"
    said = f"{task.task}: {task.n_sequences} prompts with {kind}, {task.n_tokens} tokens"
    return [said, wording.grid(columns, rows, text_columns=0)]
