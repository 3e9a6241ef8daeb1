"""`moebound eval`: what a model answers to a task, and what that is worth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.offload import CALIBRATION_HELP, SKIP_HELP, check_skip, skipping_fact
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moebound.evaluate.evaluation import Comparison, Evaluation
    from moebound.evaluate.loading import Loaded
    from moebound.score import Tally
    from moebound.score.statistics import Interval, Paired

LM_EVAL = "lm-eval:"
DOWN = "/"
EVERY_S = 5.0
"""Seconds between two lines about progress where no terminal shows a bar."""


@click.command("eval")
@click.argument("src")
@click.option("--task", required=True, metavar="TASK",
              help="wordmath, wordmath-hard, gsm8k, math, lm-eval:NAME, or a file.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N",
              help="The first N problems only (of a text: N tokens).")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE",
              help="Where gsm8k or math is read from.")  # fmt: skip
@click.option("--answers", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Keep the answers here; go on where they end.")  # fmt: skip
@click.option("--baseline", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Answers of another model, to compare with in pairs.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), metavar="N",
              help="Problems at a time. Default: as many as fit 2 GiB.")  # fmt: skip
@click.option("--skip", metavar="POLICY", help=f"While answering. {SKIP_HELP}")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
              help=CALIBRATION_HELP)  # fmt: skip
@click.option("--coarse", metavar="STORE",
              help="SRC under a wider bound, for --skip hobbit_re: what it reads in low precision "
                   "where an expert is missing, and here all count as missing.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
              default="float32", show_default=True, help="What to compute with.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True,
              help="Where: cpu, cuda, or auto for all there are.")  # fmt: skip
@output_options
def eval_command(
    output: Output,
    src: str,
    task: str,
    limit: int | None,
    data: Path | None,
    answers: Path | None,
    baseline: Path | None,
    batch: int | None,
    skip: str | None,
    calibration: Path | None,
    coarse: str | None,
    dtype: str,
    device: str,
) -> int:
    """Let SRC, a checkpoint or a store, answer the problems of a task, and score the answers.

    ICA is the share of right answers in the format that was asked for, PIA that of right answers
    in any format, each with its 95 percent interval. "/" stands where less than a tenth of the
    answers is valid at all.

    A file is a task too: problems in a .jsonl file (fields prompt and answer, and, if there are
    such, format, reference and id), or a .txt file, whose perplexity is measured.
    """
    refused = {"--answers": answers, "--baseline": baseline}
    if task.startswith(LM_EVAL) or _is_text(task):
        for name, value in {**refused, "--data": data}.items():
            if value is not None:
                raise click.UsageError(f"{name} does not go with --task {task}")

    check_skip(skip, calibration)
    if coarse is not None and (skip is None or not skip.startswith("hobbit_re")):
        raise click.UsageError("--coarse goes with --skip hobbit_re")
    if skip is not None and (task.startswith(LM_EVAL) or _is_text(task)):
        raise click.UsageError(f"--skip does not go with --task {task}")

    from moebound.evaluate.evaluation import compare_to
    from moebound.evaluate.loading import load
    from moebound.evaluate.scoring import evaluate
    from moebound.evaluate.transcript import rescore
    from moebound.model.coarse_copies import skipping_with_copies
    from moebound.model.skip_policies import get_policy
    from moebound.model.skipping import skipping
    from moebound.tasks import get_task

    if task.startswith(LM_EVAL):
        return _lm_eval(output, load(src, dtype=dtype, device=device), task, limit, batch)
    if _is_text(task):
        return _perplexity(output, load(src, dtype=dtype, device=device), Path(task), limit)
    # Everything that can be wrong with what was asked is found before the model is loaded.
    asked = get_task(task, data=data)
    problems = asked.problems(limit)
    before = None if baseline is None else _baseline(baseline, asked.name, problems)
    policy = None if skip is None else get_policy(skip, calibration)
    loaded = load(src, dtype=dtype, device=device)
    with step_bar(output, every_s=EVERY_S) as say, ExitStack() as stack:
        skipped = None
        if policy is not None and coarse is not None:
            other = load(coarse, dtype=dtype, device=device).model
            skipped = stack.enter_context(skipping_with_copies(loaded.model, policy, other))
        elif policy is not None:
            skipped = stack.enter_context(skipping(loaded.model, policy))
        found = evaluate(
            loaded, asked, limit=limit, batch=batch, answers=answers,
            drafts=None if before is None else before.texts,
            progress=lambda done, total: say("answering", done, total),
        )  # fmt: skip
    document: dict[str, Any] = found.to_json()
    human: list[RenderableType] = [*_tables(src, found)]
    if skipped is not None and policy is not None:
        document["skipping"] = skipped.to_json(policy.setting)
        human.append(wording.facts("", [skipping_fact(document["skipping"])]))
    if before is not None:
        compared = compare_to(rescore(before, asked), found)
        document["baseline"] = {"source": before.source, **compared.to_json()}
        human.append(_comparison(str(baseline), compared))
    output.result(document, *human)
    return exits.OK


def _is_text(task: str) -> bool:
    return task.endswith(".txt")


def _baseline(path: Path, task: str, problems: Sequence[Any]) -> Any:
    from moebound.errors import TaskError
    from moebound.evaluate.transcript import read_transcript

    found = read_transcript(path)
    if found.task != task:
        raise TaskError(f"{path}: has answers to task {found.task!r}, expected {task!r}")
    if not any(problem.id in found.answers for problem in problems):
        raise TaskError(f"{path}: has answers to none of the {len(problems)} problems")
    return found


def _lm_eval(
    output: Output, loaded: Loaded, task: str, limit: int | None, batch: int | None
) -> int:
    from moebound.tasks.lm_eval import run_lm_eval

    found = run_lm_eval(loaded.model, loaded.tokenizer, task, limit=limit, batch=batch or 8)
    document = {
        "source": loaded.source.to_json(),
        "task": task,
        "metrics": [metric.to_json() for metric in found],
    }
    rows = [
        (m.task, m.metric, f"{m.value:.4f}", "-" if m.stderr is None else f"{m.stderr:.4f}")
        for m in found
    ]
    table = wording.grid(("task", "metric", "value", "std. error"), rows, text_columns=2)
    output.result(document, table)
    return exits.OK


def _perplexity(output: Output, loaded: Loaded, path: Path, limit: int | None) -> int:
    from moebound.evaluate.perplexity import perplexity

    with step_bar(output, every_s=EVERY_S) as say:
        found = perplexity(
            loaded, path, limit=limit, progress=lambda done, total: say("reading", done, total)
        )
    document = {"source": loaded.source.to_json(), "task": str(path), **found.to_json()}
    lines = [
        ("perplexity", f"{found.value:.4g}"),
        ("nats per token", f"{found.nats:.5f}, standard error {found.stderr:.5f}"),
        ("tokens", f"{found.n_tokens}, in windows of {found.length}"),
    ]
    output.result(document, wording.facts(f"{loaded.source.name} on {path}", lines))
    return exits.OK


def _tables(src: str, found: Evaluation) -> list[RenderableType]:
    total = found.total
    rows = [_row("all", total)]
    if len(found.by_format) > 1:
        rows += [_row(name or "none", tally) for name, tally in found.by_format.items()]
    computed = f"{found.source['dtype']}, experts by {found.source['experts']}"
    return [
        wording.facts(src, [("task", f"{found.task}, {total.n} problems"), ("computed", computed)]),
        wording.grid(("format asked", "n", "ICA", "95 %", "PIA", "95 %", "valid", "cut off"), rows),
    ]


def _row(name: str, tally: Tally) -> tuple[str, ...]:
    valid, unfinished = (
        wording.percent(count, tally.n) for count in (tally.valid, tally.unfinished)
    )
    if tally.down:
        return (name, str(tally.n), DOWN, "", DOWN, "", valid, unfinished)
    ica, pia = tally.ica_share, tally.pia_share
    return (
        name, str(tally.n), f"{ica.value:.3f}", _range(ica), f"{pia.value:.3f}", _range(pia),
        valid, unfinished,
    )  # fmt: skip


def _comparison(baseline: str, compared: Comparison) -> RenderableType:
    def row(name: str, pairs: Paired) -> tuple[str, ...]:
        change = pairs.difference
        return (
            name, str(pairs.n), f"{change.value:+.3f}", _range(change, "+.3f"),
            str(pairs.lost), str(pairs.gained), f"{pairs.p:.3g}",
        )  # fmt: skip

    columns = (f"against {baseline}", "n", "change", "95 %", "lost", "gained", "p (McNemar)")
    return wording.grid(columns, [row("ICA", compared.ica), row("PIA", compared.pia)])


def _range(interval: Interval, digits: str = ".3f") -> str:
    return f"{interval.low:{digits}} to {interval.high:{digits}}"
