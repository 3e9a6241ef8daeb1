"""`moebound study`: run a suite of errors on a model, and write down what each does."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.hands import hire, works_in_parts
from moebound.cli.output import Output, output_options

if TYPE_CHECKING:
    from moebound.paper.study.run import Outcome, Step

HARDER = {"wordmath": "wordmath-hard"}
"""Which task stands where the paper has its harder one, if a suite wants two and one is given."""


@click.command()
@click.argument("src")
@click.option("--suite", required=True, help="paper, quick, or a JSON file with conditions.")
@click.option("--task", "tasks", multiple=True, required=True,
              help="What the model is asked; if given twice, the harder one second.")  # fmt: skip
@click.option("-o", "--output", "folder", required=True,
              type=click.Path(file_okay=False, path_type=Path),
              help="Folder for the results; one that is begun is gone on with.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Problems a condition.")
@click.option("--seeds", type=click.IntRange(min=1), help="Draws of each simulated error.")
@click.option("--sources", help="Error sources, separated by commas.")
@works_in_parts("a model of its own")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--dtype", default="float32", show_default=True,
              help="What it computes with: float32, bfloat16, float16 or auto.")  # fmt: skip
@output_options
def study(
    output: Output,
    src: str,
    suite: str,
    tasks: tuple[str, ...],
    folder: Path,
    limit: int | None,
    seeds: int | None,
    sources: str | None,
    workers: int,
    ray_address: str | None,
    device: str,
    dtype: str,
) -> int:
    """Put errors into experts of SRC, suite by suite, and measure what each does.

    Suite paper has all conditions of the MoE-Compression paper, with simulated errors and real
    codecs side by side; quick is a look at the same in two minutes. `moebound report` makes a page
    of the results, `moebound plan --study` a plan.

    Stopped in any way and started again, it goes on from where it was.
    """
    # Threads of torch that spin while they wait would keep other programs from their work; it is
    # read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moebound.jobs.workers import InProcess
    from moebound.paper.study.measure import Setup
    from moebound.paper.study.run import run_study
    from moebound.paper.study.suite_file import get_suite
    from moebound.sensitivity.noise import parse_source
    from moebound.tasks import get_task

    chosen = get_suite(suite)
    if chosen.name == "paper" and len(tasks) == 1 and tasks[0] in HARDER:
        tasks = (tasks[0], HARDER[tasks[0]])
    names = [get_task(text).name for text in tasks]
    if len(set(names)) < len(names):
        raise click.UsageError(f"--task: each task once; found {', '.join(names)}")
    if chosen.name in ("paper", "quick") and len(names) == 1:
        output.note("tables 8 and 9 need a second, harder --task: left out")
    listed = None
    if sources is not None:
        listed = [str(parse_source(part.strip())) for part in sources.split(",")]
    setup = Setup(
        src, tasks, limit or chosen.n_problems, min(chosen.n_read, limit or chosen.n_read),
        dtype=dtype, device=device,
    )  # fmt: skip
    hands_of = hire(workers, ray_address, device=device) or (lambda setup: InProcess(setup.open()))
    with _steps(output, folder) as say, hands_of(setup) as hands:
        outcome = run_study(
            folder, chosen, setup, hands,
            task_names=names, sources=listed, n_seeds=seeds, say=say,
        )  # fmt: skip
    output.result(_document(outcome), _facts(outcome))
    return exits.OK


@contextlib.contextmanager
def _steps(output: Output, folder: Path) -> Iterator[Callable[[Step], None]]:
    """Says every step: a bar where somebody watches, else a line. And, stopped, how to go on."""
    last: list[Step] = []
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(_bar()) if output.shows_progress else _lines(output)

        def say(step: Step) -> None:
            last[:] = [step]
            show(step)

        try:
            yield say
        except KeyboardInterrupt:
            if last:
                output.note(
                    f"stopped: {last[0].done} of {last[0].total} conditions are in {folder}; the "
                    "same command goes on from there"
                )
            raise


def _lines(output: Output) -> Callable[[Step], None]:
    def show(step: Step) -> None:
        output.note(f"[{step.done}/{step.total}] {_said(step)}; {_left(step)}")

    return show


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Step], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}"), console=Console(file=sys.stderr), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None, left="")

        def show(step: Step) -> None:
            bar.update(
                task, description=_said(step), completed=step.done, total=step.total,
                left=_left(step),
            )  # fmt: skip

        yield show


def _said(step: Step) -> str:
    from moebound.score import Score, kl_lines

    row = step.last
    if row is None:
        return "measuring how it is without errors" if not step.done else "going on"
    what = f"{row['task']}: {step.label}"
    if row["source"] != "none":
        rate = "" if row["rate"] is None else f" {row['rate']:g}"
        what += f", {row['source']}{rate}"
    found = []
    if row["n"]:
        found = [f"ICA {row['ica'] / row['n']:.1%}", f"PIA {row['pia'] / row['n']:.1%}"]
    if row["kl"] is None:
        found.append("no numbers left")
    else:
        score = Score.from_json(row.get("score", {"answer_kl_nats": row["kl"]}))
        found += [f"{field.title} {field.value(score):.2g}" for field, _ in kl_lines(score)]
    return f"{what}: {', '.join(found)}"


def _left(step: Step) -> str:
    if step.left_s is None:
        return "time left unknown"
    return wording.time_left(step.left_s)


def _document(outcome: Outcome) -> dict[str, Any]:
    asked = outcome.asked
    return {
        "ok": True,
        "output": str(outcome.folder),
        "model": asked.facts.name,
        "suite": asked.suite,
        "tasks": list(asked.tasks),
        "conditions": len(asked.conditions),
        "measured": outcome.n_measured,
        "found": outcome.n_found,
    }


def _facts(outcome: Outcome) -> Any:
    asked = outcome.asked
    lines = [
        ("model", f"{asked.facts.name}: {len(asked.facts.layers)} MoE layers, "
                  f"{asked.facts.n_experts} experts, {asked.facts.top_k} a token"),
        ("tasks", f"{', '.join(asked.tasks)}; {asked.n_problems} problems a condition"),
        ("conditions", f"{len(asked.conditions)}: {outcome.n_measured} measured now, "
                       f"{outcome.n_found} found"),
        ("next", f"moebound report {outcome.folder}"),
    ]  # fmt: skip
    return wording.facts(f"study {asked.suite}: {outcome.folder}", lines)
