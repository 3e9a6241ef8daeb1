"""`moebound plan`: a bound for every expert, under a budget."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebound.cli import exits, wording
from moebound.cli.options import BoundValue, CodecId, IndexSet, PlannedMethod
from moebound.cli.output import Output, output_options
from moebound.cli.planning import SEARCH_PROBLEMS, Asked, Trying
from moebound.cli.widths import (
    WIDTH_SCHEMES,
    family_of,
    refuse_family,
    without,
)

if TYPE_CHECKING:
    from moebound.plan import (
        Evidence,
        Plan,
        Scheme,
    )  # fmt: skip
    from moebound.score import Tokens

SCHEMES = [
    "fisher",
    "search",
    "sensitivity",
    "layer",
    "frequency",
    "rfid",
    "uniform",
    *WIDTH_SCHEMES,
]
N_SEARCHED = 96
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("src")
@click.option("-o", "--output", "out", type=click.Path(dir_okay=False, path_type=Path),
              required=True, help="Where to write the plan, a JSON file.")  # fmt: skip
@click.option("--sensitivity", type=_FILE, help="What `moebound sensitivity` measured.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="STATS",
              help="What `moebound calibrate` wrote of SRC: a plan of method calibrated, searched "
              "for on the model.")  # fmt: skip
@click.option("--study", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A folder that `moebound study` wrote, for its layers' losses.")  # fmt: skip
@click.option("--profile", type=_FILE, help="What `moebound profile` counted.")
@click.option("--bpw", type=BoundValue(), help="At most so many bits per weight, experts only.")
@click.option("--ratio", type=BoundValue(), help="Experts at least so many times smaller.")
@click.option("--max-kl", type=BoundValue(),
              help="The smallest size whose KL is at most this, in nats a token: measured, where "
              "plans are measured, else predicted.")  # fmt: skip
@click.option("--task", help="On whose problems plans are measured.  [default: that of the map or "
              "statistics]")  # fmt: skip
@click.option("--tokens", type=click.Choice(["all", "answers"]), default=None,
              help="Which tokens a plan protects: all that the model reads, or those of solutions "
              "only.  [default: those of the map, else all]")  # fmt: skip
@click.option("--problems", type=click.IntRange(min=2), default=None,
              help="Measure the plan on so many problems that neither map, statistics nor search "
              "read.  [default: 384]")  # fmt: skip
@click.option("--search", "n_searched", type=click.IntRange(min=1), default=None,
              help=f"Measurements of scheme search.  [default: {N_SEARCHED}]")  # fmt: skip
@click.option("--search-problems", type=click.IntRange(min=2), default=None,
              help="Problems that each of them reads, others than the plan is measured on.  "
              f"[default: {SEARCH_PROBLEMS}]")  # fmt: skip
@click.option("--no-measure", is_flag=True,
              help="Load no model, and go by predictions, which are too low.")  # fmt: skip
@click.option("--scheme", type=click.Choice(SCHEMES), default=None,
              help="How to divide the budget.  [default: by the best data given]")  # fmt: skip
@click.option("--per", type=click.Choice(["expert", "matrix"]), default=None,
              help="A bound for each.  [default: matrix, where losses are known so]")  # fmt: skip
@click.option("--codec", type=CodecId(), default=None,
              help="Whose sizes to plan with, and to compress with.  [default: bound]")  # fmt: skip
@click.option("--method", type=PlannedMethod(), default=None,
              help="Instead of a codec: calibrated, or calibrated:k1.5; for schemes of widths "
              "rtn or hqq, as in rtn:g128.  [default: calibrated with --calibration]")  # fmt: skip
@click.option("--widths", type=IndexSet(), default=None,
              help="Bits that a scheme of widths may choose.  [default: the scheme's]")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=None,
              help="Of scheme mptqs_re, which draws.  [default: 0]")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), default=None,
              help="Experts to work on at a time.  [default: one a CPU]")  # fmt: skip
@output_options
def plan(
    output: Output,
    src: str,
    out: Path,
    sensitivity: Path | None,
    calibration: Path | None,
    study: Path | None,
    profile: Path | None,
    bpw: float | None,
    ratio: float | None,
    max_kl: float | None,
    task: str | None,
    tokens: Tokens | None,
    problems: int | None,
    n_searched: int | None,
    search_problems: int | None,
    no_measure: bool,
    scheme: Scheme | None,
    per: str | None,
    codec: str | None,
    method: str | None,
    widths: set[int] | None,
    seed: int | None,
    jobs: int | None,
) -> int:
    """Choose a bound for each expert of SRC so that the experts fit a budget.

    Exactly one of --bpw, --ratio and --max-kl is the budget. --sensitivity or --study say where
    errors hurt; without them, --profile says which experts are used most. `moebound compress
    --plan` then carries the plan out.

    With --sensitivity the plan is tried on the model, and what it loses on other problems than the
    map's is measured. --max-kl is then kept by what was measured, in a few tries.

    With --calibration experts are rounded by what they see. With a map beside it the plan goes by
    the map; without one, layers' rates are searched for by measuring whole plans, as with --scheme
    search; with statistics of `calibrate --fisher` nothing is searched for, since they say what the
    loss feels of each matrix. Killed and started again, a search goes on from where it was.
    `compress --plan` needs the same --calibration.

    The schemes whose names end in _re are other papers' planners. They choose widths for the
    integers of --method rtn or hqq, or for bounds that cost as many bits, and go by --calibration.
    """
    asked = {"--bpw": bpw, "--ratio": ratio, "--max-kl": max_kl}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise click.UsageError(f"expected one of {', '.join(asked)}, found {found}")
    if sensitivity is not None and study is not None:
        raise click.UsageError("--sensitivity and --study both measure losses: give one of them")
    if problems is not None and (no_measure or not (sensitivity or calibration or task)):
        other = "--no-measure" if no_measure else "no --sensitivity, --calibration or --task"
        raise click.UsageError(f"--problems is for measuring with a map: found {other}")
    if codec is not None and method is not None:
        raise click.UsageError("--codec and --method exclude each other")
    by_widths = scheme in WIDTH_SCHEMES
    if codec is not None and calibration is not None and not by_widths:
        raise click.UsageError("--codec rounds without --calibration: leave one of them out")
    # Read once, when torch is loaded; see `moebound sensitivity`.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from moebound.checkpoint import open_checkpoint
    from moebound.plan import Budget

    evidence = _read(sensitivity, calibration, study, profile)
    family = family_of(method, scheme)
    if widths is not None and not by_widths and family is None:
        raise click.UsageError("--widths is for schemes of widths")
    if seed is not None and scheme != "mptqs_re":
        raise click.UsageError("--seed is for scheme mptqs_re")
    if family is not None:
        setting = family.setting(4)
    else:
        setting = _setting(codec, method, calibration is not None, by_widths)
    statistics = evidence.calibration
    if by_widths or family is not None:
        evidence = without(evidence, setting)
    asks = n_searched is not None or search_problems is not None
    fisher = statistics is not None and statistics.of.fisher
    by_search = calibration is not None and (asks or (sensitivity is None and not fisher))
    searches = not no_measure and (scheme == "search" or (scheme is None and by_search))
    for name, value in (("--search", n_searched), ("--search-problems", search_problems)):
        if value is not None and not searches and max_kl is None:
            raise click.UsageError(f"{name} is for scheme search")
    asked_for = Asked(
        src,
        open_checkpoint(src),
        evidence,
        Budget(bpw=bpw, ratio=ratio, max_kl=max_kl),
        setting,
        scheme,
        None if per is None else per == "matrix",
        jobs,
        statistics,
        family,
        None if widths is None else tuple(sorted(widths)),
        seed or 0,
    )
    asked_for.check()
    trying = None
    if not no_measure and (evidence.sensitivity or statistics or task):
        protected = tokens or (evidence.map.tokens if evidence.map is not None else "all")
        searches = searches or (max_kl is not None and not asked_for.knows_losses)
        trying = Trying(
            output, asked_for, out, task, protected, problems, search_problems, searches
        )
    n_most = N_SEARCHED if n_searched is None else n_searched
    try:
        made = asked_for.make(output, trying, searches, n_most)
    except BaseException:
        if trying is not None:
            trying.stopped()
        raise
    made.save(out)
    if trying is not None:
        trying.finished()
    document = made.to_json()
    del document["experts"]
    output.result({"path": str(out), **document}, wording.facts(f"{src} -> {out}", _lines(made)))
    return exits.OK


def _setting(codec: str | None, method: str | None, calibrated: bool, by_widths: bool) -> str:
    """Raises MethodError for a method that plans cannot be made of, PlanError for statistics that
    it does not look at."""
    from moebound.errors import MethodError, PlanError
    from moebound.methods import get_method

    if codec is not None or (method is None and not calibrated):
        return f"bounded:{codec or 'bound'}"
    if method is not None:
        refuse_family(method)
    made = get_method(method or "calibrated")
    if not made.takes_bound:
        raise MethodError(f"method {made.setting!r} knows no bound, and plans choose bounds")
    if calibrated and not made.statistics and not by_widths:
        raise PlanError(f"method {made.setting!r} looks at no statistics: leave out --calibration")
    return made.setting


def _read(
    sensitivity: Path | None, calibration: Path | None, study: Path | None, profile: Path | None
) -> Evidence:
    from moebound.files.formats import profile as profile_file
    from moebound.files.formats import sensitivity_map
    from moebound.files.formats.statistics import read_statistics
    from moebound.files.formats.study import read_rows
    from moebound.plan import Evidence

    return Evidence(
        None if sensitivity is None else sensitivity_map.FORMAT.read(sensitivity),
        None if study is None else read_rows(study),
        None if profile is None else profile_file.FORMAT.read(profile),
        None if calibration is None else read_statistics(calibration),
    )


def _lines(made: Plan) -> list[tuple[str, str]]:
    asked = ", ".join(f"{name} {value:g}" for name, value in made.budget.items())
    what = "bound" if made.bounds else "width"
    return [
        ("scheme", f"{made.scheme}, a {what} for each {made.made['bound_per']}"),
        ("asked", asked),
        ("experts", f"{len(made.experts)}, {made.n_weights} weights"),
        ("predicted size", f"{wording.n_bytes(made.n_bytes)}, "
         f"{wording.ratio(made.source_bytes, made.n_bytes)}, "
         f"{wording.bits(made.bits_per_weight)}"),
        ("predicted KL", "not known: no losses were given" if made.kl is None
         else f"{made.kl:.3g} nats a token"),
        *_measured(made),
        _given(made),
    ]  # fmt: skip


def _given(made: Plan) -> tuple[str, str]:
    """What experts get."""
    values = sorted(bound.value for bound in made.bounds)
    if values:
        middle = values[len(values) // 2]
        return "rates", f"{values[0]:.3g} to {values[-1]:.3g}, median {middle:.3g}"
    count = Counter(made.method_of(key) for key in made.keys)
    return "methods", ", ".join(f"{n} x {setting}" for setting, n in sorted(count.items()))


def _measured(made: Plan) -> list[tuple[str, str]]:
    found = made.measured
    if found is None:
        return [] if made.kl is None else [("measured KL", "not measured: expect more")]
    from moebound.score import kl_lines

    tried = f", the best of {found.n_tried} plans tried" if found.n_tried > 1 else ""
    return [
        *((f"measured {field.title}", text) for field, text in kl_lines(found.score)),
        ("measured on", f"{found.n_problems} other problems of {found.task}{tried}"),
        ("protects", "all tokens" if found.tokens == "all" else "answers only"),
    ]
