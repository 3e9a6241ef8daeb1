"""All experts of a loaded model within bounds of their own, as a store would have them, in place.

    with bounded(live, {key: {"gate": ErrorBound(0.3, "rate", "expert"), ...}, ...}):
        ...  # the model computes with what the codec gave back

Undone exactly, as in `perturb.py`. Where that puts one error into some experts, here every matrix
has a bound of its own: what a plan says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from moebound.checkpoint.families import Role
from moebound.errors import MoeboundError
from moebound.model.live import LiveExperts
from moebound.model.undo import exactly_undone
from moebound.sensitivity.decoded import Original
from moebound.types import DType, ErrorBound, ExpertKey

Bounds = Mapping[ExpertKey, Mapping[str, ErrorBound]]
"""By expert and by role of its matrices, as the checkpoint has them: "gate_up" is of both."""


@contextmanager
def bounded(
    experts: LiveExperts, bounds: Bounds, *, codec: str = "bound", dtype: DType | None = None
) -> Iterator[int]:
    """Inside of the `with`, every expert is what `codec` makes of it within its bounds.

    bounds: of exactly these experts. dtype: of the weights in their checkpoint; found out for each
    expert if None. Yields the bytes that the encoded experts take, envelopes included (of families
    that keep two projections in one tensor a little more than in a store, which encodes them as
    one). Keeps a copy of all experts' weights meanwhile.

    Guarantee: on leaving, every weight has the bits that it had on entering, whatever happened.
    Raises MoeboundError for bounds of other experts or projections than these, and for experts that
    are perturbed already; BoundError and CodecError as the codec does.
    """
    others = sorted(experts.keys() ^ bounds.keys())
    if others:
        which = "no bound for" if others[0] in experts else "bounds for"
        more = f" and {len(others) - 1} more" if others[1:] else ""
        has = "which the model has" if others[0] in experts else "which the model has not"
        raise MoeboundError(f"{which} {others[0]}, {has}{more}")
    n_bytes = 0
    with exactly_undone(tuple(experts.values())) as undo:
        for key, expert in experts.items():
            original = Original.of(expert, dtype)
            own = {role: _bound(bounds[key], role, key) for role in original.arrays}
            weights, sizes = original.decoded(own, codec)
            undo.replace(expert, weights)
            n_bytes += sum(sizes.values())
        yield n_bytes


def _bound(bounds: Mapping[str, ErrorBound], role: Role, key: ExpertKey) -> ErrorBound:
    for name in (role, *(("gate_up",) if role in ("gate", "up") else ())):
        if name in bounds:
            return bounds[name]
    raise MoeboundError(f"{key}: no bound for {role}, only for {', '.join(sorted(bounds))}")
