"""What `moebound plan` does for schemes of widths (docs/plan.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebound.cli.output import Output
from moebound.cli.progress import progress_bar

if TYPE_CHECKING:
    from moebound.checkpoint import Checkpoint
    from moebound.files.formats.statistics import Statistics
    from moebound.plan import Deciding, Evidence, Family

WIDTH_SCHEMES = ["pmq_re", "mxmoe_re", "edgemoe_re", "mptqs_re", "milo_re"]
_DIVIDING = [*WIDTH_SCHEMES, "rfid", "frequency"]
"""Those that choose widths where the method is one of integers."""


def family_of(method: str | None, scheme: str | None) -> Family | None:
    """The method's, where its integers are what the plan chooses; None of one that has none, or
    with a scheme that knows no widths."""
    from moebound.plan import Family

    if method is None or scheme not in _DIVIDING or not _is_family(method):
        return None
    return Family.of(method)


def refuse_family(method: str) -> None:
    """Raises MethodError for a method of integers, where a scheme chooses bounds."""
    from moebound.errors import MethodError

    if _is_family(method):
        raise MethodError(
            f"method {method!r} knows no bound, and plans choose bounds; schemes that choose "
            f"widths are {', '.join(_DIVIDING)}"
        )


def _is_family(method: str) -> bool:
    from moebound.errors import MethodError
    from moebound.plan import Family

    try:
        Family.of(method)
    except MethodError:
        return False
    return True


def without(evidence: Evidence, setting: str) -> Evidence:
    """What a plan of widths goes by: no losses, and statistics only where its method rounds by
    them, others than those that it chooses by."""
    from dataclasses import replace

    from moebound.methods import get_method

    kept = evidence.calibration if get_method(setting).statistics else None
    return replace(evidence, sensitivity=None, study=None, calibration=kept)


def check_widths(
    scheme: str, family: Family | None, evidence: Evidence, statistics: Statistics | None
) -> None:
    """Raises PlanError for what a scheme needs and lacks, BackendUnavailable for a method whose
    library is missing."""
    from moebound.errors import PlanError
    from moebound.methods import get_method
    from moebound.plan.make_widths import check_blocks
    from moebound.plan.planners import BY_COUNTS, BY_OUTPUTS

    if family is not None:
        check_blocks(scheme, family)
        get_method(family.setting(4)).check_installed()
    if statistics is not None:
        return
    if scheme in BY_OUTPUTS:
        raise PlanError(
            f"scheme {scheme!r} goes by what rounding does to outputs: give --calibration, what "
            "`moebound calibrate` wrote"
        )
    if scheme in BY_COUNTS and evidence.profile is None:
        raise PlanError(f"scheme {scheme!r} needs routing counts: give --profile or --calibration")


def deciding(
    output: Output,
    checkpoint: Checkpoint,
    scheme: str,
    family: Family | None,
    evidence: Evidence,
    statistics: Statistics | None,
    *,
    widths: tuple[int, ...] | None,
    seed: int,
    jobs: int | None,
) -> Deciding:
    """What widths cost: of the method, or of rtn where the plan is of bounds (family None)."""
    from moebound.plan import Deciding, Family
    from moebound.plan.losses import shares_from_profile
    from moebound.plan.planners import BY_COUNTS
    from moebound.store import measure_widths

    with progress_bar(output, "measuring widths") as progress:
        offers = measure_widths(
            checkpoint, family or Family("rtn"), statistics,
            counts=scheme in BY_COUNTS and statistics is not None, ranks=scheme == "rfid",
            jobs=jobs, progress=progress,
        )  # fmt: skip
    shares = None
    if evidence.profile is not None:
        shares = shares_from_profile(evidence.profile, [expert.key for expert in offers.experts])
    made = None if statistics is None else statistics.of.to_json()
    return Deciding(offers, widths, seed, shares, made)
