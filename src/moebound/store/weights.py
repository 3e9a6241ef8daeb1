"""How many weights a store stands for, which is what bits a weight are counted over."""

from __future__ import annotations

from math import prod

from moebound.store.reader import Store


def n_parameters(store: Store) -> int:
    """Of the source: what was kept, what is coded, and every expert's."""
    kept = sum(prod(store.tensors[name].shape) for name in store.kept)
    coded = sum(stored.record.certificate.n_weights for stored in store.coded.values())
    return kept + coded + sum(expert.n_weights for expert in store.experts())


def model_bits_per_weight(store: Store) -> float:
    """Of all tensors, headers and certificates not counted."""
    total, weights = sum(t.n_bytes for t in store.tensors.values()), n_parameters(store)
    return 8 * total / weights if weights else 0.0
