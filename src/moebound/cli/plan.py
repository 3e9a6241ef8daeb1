"""`moebound plan`: a bound for every expert, under a budget."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebound.cli import exits, wording
from moebound.cli.options import BoundValue, CodecId
from moebound.cli.output import Output, output_options
from moebound.cli.progress import progress_bar

if TYPE_CHECKING:
    from moebound.checkpoint import Checkpoint
    from moebound.plan import Document, Evidence, Measure, Measured, Plan, Scheme

SCHEMES = ["sensitivity", "layer", "frequency", "rfid", "uniform"]
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("src")
@click.option("-o", "--output", "out", type=click.Path(dir_okay=False, path_type=Path),
              required=True, help="Where to write the plan, a JSON file.")  # fmt: skip
@click.option("--sensitivity", type=_FILE, help="What `moebound sensitivity` measured.")
@click.option("--study", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A folder that `moebound study` wrote, for its layers' losses.")  # fmt: skip
@click.option("--profile", type=_FILE, help="What `moebound profile` counted.")
@click.option("--bpw", type=BoundValue(), help="At most so many bits per weight, experts only.")
@click.option("--ratio", type=BoundValue(), help="Experts at least so many times smaller.")
@click.option("--max-kl", type=BoundValue(),
              help="The smallest size whose KL is at most this, in nats a token: measured, where "
              "plans are measured, else predicted.")  # fmt: skip
@click.option("--problems", type=click.IntRange(min=2), default=None,
              help="Measure the plan on so many problems of the map's task that the map did not "
              "read.  [default: 384]")  # fmt: skip
@click.option("--no-measure", is_flag=True,
              help="Load no model, and go by predictions, which are too low.")  # fmt: skip
@click.option("--scheme", type=click.Choice(SCHEMES), default=None,
              help="How to divide the budget.  [default: by the best data given]")  # fmt: skip
@click.option("--per", type=click.Choice(["expert", "matrix"]), default=None,
              help="A bound for each.  [default: matrix, where losses are known so]")  # fmt: skip
@click.option("--codec", type=CodecId(), default="bound", show_default=True,
              help="Whose sizes to plan with, and to compress with.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), default=None,
              help="Experts to work on at a time.  [default: one a CPU]")  # fmt: skip
@output_options
def plan(
    output: Output,
    src: str,
    out: Path,
    sensitivity: Path | None,
    study: Path | None,
    profile: Path | None,
    bpw: float | None,
    ratio: float | None,
    max_kl: float | None,
    problems: int | None,
    no_measure: bool,
    scheme: Scheme | None,
    per: str | None,
    codec: str,
    jobs: int | None,
) -> int:
    """Choose a bound for each expert of SRC so that the experts fit a budget.

    Exactly one of --bpw, --ratio and --max-kl is the budget. --sensitivity or --study say where
    errors hurt; without them, --profile says which experts are used most. `moebound compress
    --plan` then carries the plan out.

    With --sensitivity the plan is tried on the model, and what it loses on other problems than the
    map's is measured. --max-kl is then kept by what was measured, in a few tries.
    """
    asked = {"--bpw": bpw, "--ratio": ratio, "--max-kl": max_kl}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise click.UsageError(f"expected one of {', '.join(asked)}, found {found}")
    if sensitivity is not None and study is not None:
        raise click.UsageError("--sensitivity and --study both measure losses: give one of them")
    if problems is not None and (no_measure or sensitivity is None):
        other = "--no-measure" if no_measure else "no --sensitivity"
        raise click.UsageError(f"--problems is for measuring with a map: found {other}")
    # Read once, when torch is loaded; see `moebound sensitivity`.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from moebound.checkpoint import open_checkpoint
    from moebound.plan import Budget, make_plan
    from moebound.store import measure_sizes

    evidence = _read(sensitivity, study, profile)
    budget = Budget(bpw=bpw, ratio=ratio, max_kl=max_kl)
    chosen = evidence.scheme if scheme is None else scheme
    checkpoint = open_checkpoint(src)
    measure = None
    if evidence.sensitivity is not None and not no_measure:
        measure = _trial(output, src, checkpoint, evidence.sensitivity, problems)
    with progress_bar(output, "measuring sizes") as progress:
        sizes = measure_sizes(
            checkpoint, codec=codec, ranks=chosen == "rfid", jobs=jobs, progress=progress
        )
    made = make_plan(
        sizes,
        evidence,
        budget,
        source=checkpoint.name,
        codec=codec,
        scheme=chosen,
        per_role=None if per is None else per == "matrix",
        measure=measure,
    )
    made.save(out)
    document = made.to_json()
    del document["experts"]
    output.result({"path": str(out), **document}, wording.facts(f"{src} -> {out}", _lines(made)))
    return exits.OK


def _trial(
    output: Output, src: str, checkpoint: Checkpoint, sensitivity: Document, problems: int | None
) -> Measure:
    """What measures plans of SRC. Raises MoeboundError where it cannot be done."""
    from moebound.errors import MoeboundError
    from moebound.evaluate.loading import load
    from moebound.score import kl_lines
    from moebound.sensitivity.trial import N_PROBLEMS, Trial, check_memory, unread

    @contextmanager
    def hinted() -> Iterator[None]:
        try:
            yield
        except MoeboundError as error:
            hint = "--no-measure plans without measuring, by the map's predictions"
            raise type(error)(f"{error}. {hint}") from error

    with hinted():
        check_memory(checkpoint)
        text = unread(sensitivity, N_PROBLEMS if problems is None else problems)

    @cache
    def trial() -> Trial:
        """Loaded when there is a plan to try: what cannot be planned says so sooner."""
        return Trial.of(load(src), *text)

    def measure(plan: Plan) -> Measured:
        with hinted():
            found = trial().measure(plan)
        read = ", ".join(f"{field.title} {text}" for field, text in kl_lines(found.score))
        output.note(
            f"{plan.bits_per_weight:.3f} bits per weight: {read} measured, "
            f"{plan.kl or 0:.3g} predicted"
        )
        return found

    return measure


def _read(sensitivity: Path | None, study: Path | None, profile: Path | None) -> Evidence:
    from moebound.files.formats import profile as profile_file
    from moebound.files.formats import sensitivity_map
    from moebound.files.formats.study import read_rows
    from moebound.plan import Evidence

    return Evidence(
        None if sensitivity is None else sensitivity_map.FORMAT.read(sensitivity),
        None if study is None else read_rows(study),
        None if profile is None else profile_file.FORMAT.read(profile),
    )


def _lines(made: Plan) -> list[tuple[str, str]]:
    values = sorted(bound.value for bound in made.bounds)
    asked = ", ".join(f"{name} {value:g}" for name, value in made.budget.items())
    return [
        ("scheme", f"{made.scheme}, a bound for each {made.made['bound_per']}"),
        ("asked", asked),
        ("experts", f"{len(made.experts)}, {made.n_weights} weights"),
        ("predicted size", f"{wording.n_bytes(made.n_bytes)}, "
         f"{wording.ratio(made.source_bytes, made.n_bytes)}, "
         f"{wording.bits(made.bits_per_weight)}"),
        ("predicted KL", "not known: no losses were given" if made.kl is None
         else f"{made.kl:.3g} nats a token"),
        *_measured(made),
        ("rates", f"{values[0]:.3g} to {values[-1]:.3g}, median {values[len(values) // 2]:.3g}"),
    ]  # fmt: skip


def _measured(made: Plan) -> list[tuple[str, str]]:
    found = made.measured
    if found is None:
        return [] if made.kl is None else [("measured KL", "not measured: expect more")]
    from moebound.score import kl_lines

    tried = f", the best of {found.n_tried} plans tried" if found.n_tried > 1 else ""
    return [
        *((f"measured {field.title}", text) for field, text in kl_lines(found.score)),
        ("measured on", f"{found.n_problems} other problems of {found.task}{tried}"),
    ]
