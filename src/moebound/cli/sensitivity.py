"""`moebound sensitivity`: what an error in each expert does to the model, at several bounds."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebound.cli import exits, wording
from moebound.cli.hands import everywhere, hire, works_in_parts
from moebound.cli.options import CodecId, Numbers
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moebound.files.formats.sensitivity_map import SensitivityMap
    from moebound.score import Tokens


@click.command()
@click.argument("src")
@click.option("--task", required=True, help="Whose problems and solutions the model reads.")
@click.option("-o", "--output", "out", type=click.Path(dir_okay=False, path_type=Path),
              required=True, help="Where to write the map, a JSON file.")  # fmt: skip
@click.option("--rates", type=Numbers(), default="0.1,0.3,0.5,0.8", show_default=True,
              help="Bounds, each x the mean |weight| of an expert.")  # fmt: skip
@click.option("--codec", type=CodecId(), default="bound", show_default=True,
              help="Whose error.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), default=64, show_default=True,
              help="Read N problems.")  # fmt: skip
@click.option("--skip", type=click.IntRange(min=0), default=0, show_default=True,
              help="Leave out so many before them, to measure on later.")  # fmt: skip
@click.option("--tokens", type=click.Choice(["all", "answers"]), default="all",
              show_default=True,
              help="Which tokens count: all that are read, or those of solutions.")  # fmt: skip
@click.option("--measure", type=click.Choice(["sample", "all", "none"]), default="sample",
              show_default=True,
              help="Of which experts to measure KL too, beside predicting it.")  # fmt: skip
@click.option("--sample", type=click.IntRange(min=1), default=100, show_default=True,
              help="Experts in the sample.")  # fmt: skip
@click.option("--ties", type=click.IntRange(min=0), default=96, show_default=True,
              help="Routing decisions near a tie to follow in each problem. 0 leaves jumps out, "
              "which plans do not use, and takes a third of the time.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the sample and of random probes.")  # fmt: skip
@works_in_parts("a model of its own")
@output_options
def sensitivity(
    output: Output,
    src: str,
    task: str,
    out: Path,
    rates: list[float],
    codec: str,
    limit: int,
    skip: int,
    tokens: Tokens,
    measure: str,
    sample: int,
    ties: int,
    seed: int,
    workers: int,
    ray_address: str | None,
) -> int:
    """Predict, for every expert of SRC, what compressing it does to the model's predictions.

    The result is KL divergence in nats per token, prompts included, for each expert alone and for
    all together; with --tokens answers, per token of the solutions. Some experts are measured too,
    to say how good the predictions are. `moebound plan --sensitivity` turns the map into a bound
    for each expert.

    Killed and started again, it goes on from where it was.
    """
    # Threads of torch that spin while they wait would keep other programs from their work; it is
    # read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from moebound.evaluate.loading import load
    from moebound.jobs.workers import Opening
    from moebound.sensitivity.map.build import Build
    from moebound.sensitivity.map.parts import parts
    from moebound.sensitivity.map.settings import MapSettings
    from moebound.tasks import get_task

    settings = MapSettings(
        rates=tuple(sorted(set(rates))), codec=codec, measure=measure,  # type: ignore[arg-type]
        n_sampled=sample, seed=seed, n_ties=ties,
    )  # fmt: skip
    asked = get_task(task)
    loaded = load(src)
    hands_of = hire(workers, ray_address)
    with step_bar(output) as say, ExitStack() as stack:
        build = Build.of(loaded, asked, limit, settings, out, say, skip=skip, tokens=tokens)
        if build.rows.found:
            output.note(f"resumed: going on from {build.rows.path}")
        hands = None
        if hands_of is not None:
            # Figures depend on the number of threads, so a worker has as many as this process.
            setup = Opening(parts, {
                "src": everywhere(src), "task": everywhere(task), "limit": limit, "skip": skip,
                "tokens": tokens, "settings": settings, "weights": build.weights,
            }, threads=torch.get_num_threads())  # fmt: skip
            hands = stack.enter_context(hands_of(setup))
        found = build.run(hands)
    output.result(_short(found, out), *_tables(found, out))
    return exits.OK


def _short(found: SensitivityMap, out: Path) -> dict[str, object]:
    """The map without its experts, which are in the file."""
    document = found.to_json()
    document["experts"] = len(found.experts)
    return document | {"ok": True, "output": str(out)}


def _tables(found: SensitivityMap, out: Path) -> list[RenderableType]:
    from moebound.score import Score, kl_lines

    checks, joint = found.checks, found.joint
    scores = [Score.from_json(score) for score in joint["scores"]]
    pair = [field for field, _ in kl_lines(scores[0])]
    measured = [field.title.replace("KL", "measured") for field in pair]
    names = ["rate", "all experts: predicted", *measured, "mean of one expert", "largest",
             "which", "rank correlation"]  # fmt: skip
    rows = []
    for r, rate in enumerate(found.bounds):
        worst = max(found.experts, key=lambda line: line.predicted_kl[r])
        mean = sum(line.predicted_kl[r] for line in found.experts) / len(found.experts)
        rank = checks["rank_correlation_by_bound"][r]
        rows.append(
            [f"{rate:g}", f"{joint['predicted_kl'][r]:.3g}",
             *(field.number(field.value(scores[r])) for field in pair),
             f"{mean:.3g}", f"{worst.predicted_kl[r]:.3g}", str(worst.key),
             "" if rank is None else f"{rank:.3f}"]
        )  # fmt: skip
    sampled = checks["n_sampled"]
    facts = wording.facts(
        f"{found.model}, {found.task}: {out}",
        [
            ("experts", f"{len(found.experts)} at {len(found.bounds)} bounds, codec {found.codec}"),
            ("text", f"{found.n_prompts} problems, {found.n_positions} predicted tokens"
             f"{' of solutions' if found.tokens == 'answers' else ''}"),
            ("measured", f"{sampled} experts" if sampled else "none"),
            ("time", f"{checks['predicted_in_s']:.1f} s of computing for predictions; one by one "
             f"it would take {checks['speedup_vs_naive']:.1f} times as long"),
        ],
    )  # fmt: skip
    return [facts, "KL in nats per predicted token:", wording.grid(names, rows)]
