"""The plan that a store carried out, and whether its certificates promise what was planned."""

from __future__ import annotations

from collections.abc import Iterator

from moebound.errors import MoeboundError, PlanError, StoreError
from moebound.methods import Method, get_method
from moebound.plan import Plan
from moebound.store.format import PLAN_FILE, CodedRecord, MatrixRecord
from moebound.store.reader import Store, StoredExpert
from moebound.store.summary import Problem


def plan_of(store: Store) -> Plan | None:
    """The plan that a store carried out, None if it was made with one bound.

    Raises PlanError if the plan's file is damaged, StoreError if it is missing or another's.
    """
    if store.settings.plan is None:
        return None
    path = store.path / PLAN_FILE
    if not path.is_file():
        raise StoreError(f"{path}: missing; config.json says that the store has a plan")
    plan = Plan.load(path)
    if plan.sha256 != store.settings.plan:
        raise StoreError(f"{path}: is not the plan that config.json names")
    return plan


def broken_plan(store: Store) -> Iterator[Problem]:
    """What a store's certificates promise otherwise than its plan."""
    try:
        plan = plan_of(store)
    except (PlanError, StoreError) as error:
        yield Problem("file", PLAN_FILE, str(error))
        return
    if plan is None:
        return
    left = {expert.key for expert in plan.experts}
    for expert in store.experts():
        left.discard(expert.key)
        yield from _broken(expert, plan)
    for key in sorted(left):
        yield Problem("certificate", PLAN_FILE, f"{key} is planned and not in the store")


def _broken(expert: StoredExpert, plan: Plan) -> Iterator[Problem]:
    try:
        planned, made = plan[expert.key].bounds, get_method(plan.method_of(expert.key))
    except MoeboundError as error:
        yield Problem("certificate", expert.matrices[0].tensor.name, str(error))
        return
    if expert.method != made.setting and not expert.exact:
        message = f"planned {made.setting}, certified {expert.method}"
        yield Problem("certificate", expert.matrices[0].tensor.name, message)
    for matrix in expert.matrices:
        asked, found = planned.get(matrix.record.role), matrix.record.certificate.bound
        if asked != found and not unpromised(matrix.record, made):
            message = f"planned {asked}, promised {found}"
            yield Problem("certificate", matrix.tensor.name, message)


def unpromised(record: MatrixRecord | CodedRecord, method: Method) -> bool:
    """Whether this is a matrix of which nothing can be promised, whatever bound was given: of an
    expert that the method dropped, or put another in the place of."""
    return method.coder is not None and (
        method.merges or record.certificate.method == method.setting
    )
