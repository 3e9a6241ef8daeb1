"""What the loss feels of every matrix of a checkpoint, by Fisher statistics, and the plan by that:
scheme `fisher`."""

from __future__ import annotations

import math

from moebound.checkpoint import Checkpoint, Expert, experts_name
from moebound.checkpoint.families import HALVES
from moebound.files.formats.statistics import Statistics
from moebound.methods import get_method
from moebound.methods.calibrated import row_weights
from moebound.methods.geometry import Geometry, row_levels
from moebound.methods.one_thread import one_thread
from moebound.methods.outputs import side_of
from moebound.methods.shrinkage import shrunk
from moebound.plan import Budget, Evidence, Plan, make_plan
from moebound.plan.fisher import Widest
from moebound.store.encoded import Encoded, Memo
from moebound.store.recipe import Recipe
from moebound.store.sizes import Known, each_expert, measure_calibrated
from moebound.store.summary import ProgressCallback
from moebound.types import ErrorBound, ExpertKey


def fisher_bounds(
    checkpoint: Checkpoint,
    calibration: Statistics,
    *,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> Widest:
    """Of every matrix of every routed expert, as method `calibrated` rounds it: log2 of the widest
    bound, in weight units, where a step's product with the root of what the loss feels is 1.

    Raises MoeboundError for statistics of another model, and for those without `fisher`.
    """
    calibration.check_model(experts_name(checkpoint), checkpoint.name)
    calibration.check_fisher()
    method = get_method("calibrated")
    damping = shrunk(calibration).rule.least_damping

    def of(expert: Expert) -> dict[tuple[ExpertKey, str], float]:
        # The bound does not matter: the view is what knows how rows lie.
        recipe = Recipe.of(ErrorBound(1.0, "rate", "expert"), method.setting, calibration)
        seen = recipe.seen(checkpoint, [expert], method)
        [view] = seen.experts
        rows = row_weights(seen, view)
        found: dict[tuple[ExpertKey, str], float] = {}
        sums = {
            part: float(calibration.array(expert.key, f"{part}_rows").sum())
            for role in view.matrices for part in HALVES.get(role, (role,))
        }  # fmt: skip
        with one_thread():
            geometry = {
                side: Geometry.of(seen.statistics[side][expert.key], damping)
                for side in {side_of(role) for role in view.matrices}
            }
        for role, matrix in view.matrices.items():
            columns = geometry[side_of(role)]
            n_rows = matrix.size // len(columns.levels)
            # Of a mean row, of all rows whose inputs the moments are of.
            own = sum(sums[part] for part in HALVES.get(role, (role,)))
            whole = sum(n for part, n in sums.items() if side_of(part) == side_of(role))
            share = own / whole / n_rows if whole > 0 else 1 / n_rows
            weight = max(columns.mean * share, math.ulp(0.0))
            factor = row_levels(rows[role])[1] if role in rows else 0.0
            found[expert.key, role] = columns.widest + factor - 0.5 * math.log2(weight)
        return found

    merged: dict[tuple[ExpertKey, str], float] = {}
    for one in each_expert(checkpoint, of, jobs, progress):
        merged |= one
    return merged


def fisher_plan(
    checkpoint: Checkpoint,
    calibration: Statistics,
    budget: Budget,
    *,
    method: str = "calibrated",
    widest: Widest | None = None,
    known: Known | None = None,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> Plan:
    """The plan of scheme `fisher` within a budget of bytes: the one of `moebound plan --no-measure`
    by these statistics. All experts are encoded at a dozen rates, and as plans have them. widest:
    of `fisher_bounds`, and known: as of `measure_calibrated`, for who plans several times; None to
    find it out.

    Raises PlanError for a budget that cannot be met, and as `fisher_bounds` does.
    """
    setting = get_method(method).setting
    if widest is None:
        widest = fisher_bounds(checkpoint, calibration, jobs=jobs, progress=progress)
    weights = sum(expert.size for expert in checkpoint.experts())
    most = budget.n_bytes(n_weights=weights, source_bytes=checkpoint.expert_bytes)
    sizes = measure_calibrated(
        checkpoint, calibration, method=setting,
        bits_per_weight=None if most is None else 8 * most / weights, known=known,
        jobs=jobs, progress=progress,
    )  # fmt: skip
    return make_plan(
        sizes,
        Evidence(calibration=calibration),
        budget,
        source=checkpoint.name,
        method=setting,
        scheme="fisher",
        encoded=Encoded(checkpoint, calibration, memo=Memo(room=0), jobs=jobs),
        widest=widest,
    )
