"""All experts of a loaded model as a plan would have them in a store, in place.

    with planned(live, plan):
        ...  # the model computes with what the methods gave back

Undone exactly, as in `perturb.py`. Where that puts one error into some experts, here every expert
has a method, and every matrix a bound, of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from moebound.checkpoint.families import Role
from moebound.errors import MoeboundError
from moebound.methods import ExpertView, GroupView, compress, get_method
from moebound.model.live import LiveExpert, LiveExperts
from moebound.model.undo import exactly_undone
from moebound.plan import Plan, PlannedExpert
from moebound.sensitivity.decoded import as_live
from moebound.sensitivity.noise import arrays_of
from moebound.types import DType, ErrorBound, ExpertKey


@contextmanager
def planned(experts: LiveExperts, plan: Plan, *, dtype: DType | None = None) -> Iterator[int]:
    """Inside of the `with`, every expert is what its method makes of it within its bounds.

    plan: of exactly these experts. dtype: of the weights in their checkpoint; found out for each
    expert if None. Yields the bytes that it all takes, framing included (of families that keep two
    projections in one tensor a little more than in a store, which encodes them as one). Keeps a
    copy of all experts' weights meanwhile.

    Guarantee: on leaving, every weight has the bits that it had on entering, whatever happened.
    Raises MoeboundError for a plan of other experts or projections than these, for methods that
    edit the routing, and for experts that are perturbed already; what the methods raise.
    """
    others = sorted(experts.keys() ^ set(plan.keys))
    if others:
        which = "nothing planned for" if others[0] in experts else "planned is"
        more = f" and {len(others) - 1} more" if others[1:] else ""
        has = "which the model has" if others[0] in experts else "which the model has not"
        raise MoeboundError(f"{which} {others[0]}, {has}{more}")
    n_bytes = 0
    with exactly_undone(tuple(experts.values())) as undo:
        for setting, group in _groups(plan):
            method = get_method(setting)
            views = tuple(_view(experts[entry.key], entry, dtype) for entry in group)
            artifact = compress(method, GroupView(views))
            if artifact.router is not None and not artifact.router.is_empty:
                raise MoeboundError(
                    f"method {setting!r} edits the routing of layer {artifact.router.layer}, which "
                    "is not done in place; compress, and load the store"
                )
            for entry in group:
                expert = experts[entry.key]
                undo.replace(expert, as_live(expert, artifact))
            n_bytes += artifact.n_bytes
        yield n_bytes


def _groups(plan: Plan) -> Iterator[tuple[str, list[PlannedExpert]]]:
    """Experts that a method sees together, with its setting."""
    found: dict[tuple[object, ...], list[PlannedExpert]] = defaultdict(list)
    for entry in plan.experts:
        setting = plan.method_of(entry.key)
        alone = get_method(setting).scope == "expert"
        found[(*entry.key,) if alone else (entry.key.layer, setting, entry.group)].append(entry)
    for group in found.values():
        yield plan.method_of(group[0].key), group


def _view(expert: LiveExpert, entry: PlannedExpert, dtype: DType | None) -> ExpertView:
    arrays = arrays_of(expert.matrices, dtype)
    if not entry.bounds:
        return ExpertView(entry.key, arrays)
    bounds = {role: _bound(entry.bounds, role, entry.key) for role in arrays}
    return ExpertView(entry.key, arrays, bounds)


def _bound(bounds: Mapping[str, ErrorBound], role: Role, key: ExpertKey) -> ErrorBound:
    for name in (role, *(("gate_up",) if role in ("gate", "up") else ())):
        if name in bounds:
            return bounds[name]
    raise MoeboundError(f"{key}: no bound for {role}, only for {', '.join(sorted(bounds))}")
