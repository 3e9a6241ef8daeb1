"""Scheme `fisher`: every matrix gets the bound at which the loss feels its steps as it feels those
of all others.

With Fisher statistics (`calibrate/fisher.py`), A = M Mᵀ, a step Δ_ij costs (r_i / Σ r) M_jj² Δ_ij²
nats, and the bits that it saves depend on its logarithm alone. So the least loss in so many bits
has Δ_ij (r_i / Σ r)^(1/2) M_jj = λ everywhere, with one λ for the whole model (reverse
water-filling; Cover and Thomas, theorem 10.3.3): nothing has to be searched for but λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moebound.errors import PlanError
from moebound.plan.items import ExpertSizes, Floats, Items
from moebound.types import ExpertKey

Widest = Mapping[tuple[ExpertKey, str], float]
"""By expert and role: log2 of the widest bound of the matrix, in weight units, at λ = 1."""


def shape(items: Items, experts: Sequence[ExpertSizes], widest: Widest) -> Floats:
    """[N] what rates are in proportion to. An item of several matrices has the geometric mean of
    theirs. Raises PlanError for an expert without statistics."""
    mean_abs = {expert.key: expert.mean_abs for expert in experts}
    found = []
    for key, roles in zip(items.keys, items.roles, strict=True):
        try:
            octave = float(np.mean([widest[key, role] for role in roles]))
        except KeyError:
            raise PlanError(f"{key}: no Fisher statistics of it") from None
        found.append(octave - np.log2(mean_abs[key] or 1.0))
    octaves = np.array(found)
    shaped: Floats = np.exp2(octaves - octaves.mean())
    return shaped
