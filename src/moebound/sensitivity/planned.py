"""All experts of a loaded model as a plan would have them in a store, in place.

    with planned(live, plan):
        ...  # the model computes with what the methods gave back

Undone exactly, as in `perturb.py`. Where that puts one error into some experts, here every expert
has a method, and every matrix a bound, of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from moebound.checkpoint.families import Role
from moebound.errors import MethodError, MoeboundError
from moebound.files.formats.statistics import Statistics
from moebound.methods import ExpertView, GroupView, compress, get_method
from moebound.methods.shrinkage import wanted as read_wanted
from moebound.model.dtypes import arrays_of
from moebound.model.live import LiveExpert, LiveExperts
from moebound.model.undo import exactly_undone
from moebound.plan import Plan, PlannedExpert
from moebound.sensitivity.decoded import as_live
from moebound.store.encoded import Made, Memo, name_of
from moebound.types import Array, DType, ErrorBound, ExpertKey


@contextmanager
def planned(
    experts: LiveExperts,
    plan: Plan,
    *,
    dtype: DType | None = None,
    calibration: Statistics | None = None,
    only: Collection[ExpertKey] | None = None,
    memo: Memo | None = None,
) -> Iterator[int]:
    """Inside of the `with`, every expert is what its method makes of it within its bounds.

    plan: of exactly these experts. dtype: of the weights in their checkpoint; found out for each
    expert if None. calibration: for methods that need statistics. only: change these, None for all.
    memo: of experts that were made before, by plans of this model with these statistics. Yields
    the bytes that it all takes, framing included (of families that keep two projections in one
    tensor a little more than in a store, which encodes them as one). Keeps a copy of what it
    replaces meanwhile.

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
    wanted = set(experts if only is None else only)
    with exactly_undone(tuple(experts.values())) as undo:
        for setting, group in _groups(plan):
            if wanted.isdisjoint(entry.key for entry in group):
                continue
            taken, made = _made(experts, setting, group, memo, calibration, dtype)
            for key in wanted & made.keys():
                undo.replace(experts[key], as_live(experts[key], made[key]))
            n_bytes += taken
        yield n_bytes


def _made(
    experts: LiveExperts,
    setting: str,
    group: Sequence[PlannedExpert],
    memo: Memo | None = None,
    calibration: Statistics | None = None,
    dtype: DType | None = None,
) -> tuple[int, dict[ExpertKey, Mapping[Role, Array]]]:
    """Bytes of a group, and the weights of each of its experts."""
    # A checkpoint may keep in one matrix what the model has apart.
    name = name_of(get_method(setting).setting, group[0])
    if memo is not None and len(group) == 1:
        for known in (memo.get(name), memo.get(("live", *name))):
            if known is not None and set(known.weights) == set(experts[group[0].key].roles):
                return known.n_bytes, {group[0].key: known.weights}
    method = get_method(setting)
    if method.wanted_statistics() and calibration is None:
        raise MethodError(
            f"method {setting!r} needs statistics of the model's inputs: make them with "
            "`moebound calibrate`, and give the folder with --calibration"
        )
    views = tuple(_view(experts[entry.key], entry, dtype) for entry in group)
    keys = [entry.key for entry in group]
    names = method.wanted_statistics(shared=keys[0].shared)
    statistics = {} if calibration is None else read_wanted(calibration, names, keys)
    artifact = compress(method, GroupView(views, statistics))
    if artifact.router is not None and not artifact.router.is_empty:
        raise MoeboundError(
            f"method {setting!r} edits the routing of layer {artifact.router.layer}, which "
            "is not done in place; compress, and load the store"
        )
    found: dict[ExpertKey, Mapping[Role, Array]] = {key: artifact.weights(key) for key in keys}
    if memo is not None and len(group) == 1:
        memo.keep(("live", *name), Made(found[keys[0]], artifact.n_bytes))
    return artifact.n_bytes, found


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
