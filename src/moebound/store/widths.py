"""What every expert of a checkpoint takes at every width of a grid method, and what that does to
its outputs: by encoding it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moebound.checkpoint import Checkpoint, Expert, Role, experts_name
from moebound.files.formats.statistics import Statistics
from moebound.methods import compress, get_method
from moebound.methods.outputs import residual_errors
from moebound.methods.shrinkage import shrunk
from moebound.plan import ExpertWidths, Family, Offers, effective_rank
from moebound.store.recipe import Recipe
from moebound.store.sizes import each_expert
from moebound.store.summary import ProgressCallback
from moebound.types import Array


def measure_widths(
    checkpoint: Checkpoint,
    family: Family,
    calibration: Statistics | None = None,
    *,
    counts: bool = False,
    ranks: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> Offers:
    """Every routed expert at every width that a method has: bytes, the store's to the byte; with
    statistics the error of its outputs, by second moments shrunk toward its layer's
    (`methods/shrinkage.py`), so that an expert that saw no token is not free.

    counts: read what the router sends, too. ranks: measure effective ranks. jobs: experts at a
    time, None for `MOEBOUND_THREADS` or the CPUs. Raises MoeboundError for statistics of another
    model, and for those without what is asked, naming it.
    """
    n_tokens = 0
    if calibration is not None:
        calibration.check_model(experts_name(checkpoint), checkpoint.name)
        n_tokens = calibration.of.n_tokens
    widths = family.widths

    def measure(expert: Expert) -> ExpertWidths:
        sizes: dict[str, list[int]] = {matrix.role: [] for matrix in expert.matrices}
        errors: dict[str, list[float]] = {matrix.role: [] for matrix in expert.matrices}
        matrices: Mapping[Role, Array] = {}
        for width in widths:
            method = get_method(family.setting(width))
            seen = Recipe.of(None, method.setting, calibration).seen(checkpoint, [expert], method)
            [view] = seen.experts
            matrices = view.matrices
            artifact = compress(method, seen)
            for role, matrix in artifact.experts[expert.key].items():
                sizes[role].append(len(matrix.data))
            if calibration is None:
                continue
            moments = shrunk(calibration)
            lost = residual_errors(
                matrices,
                artifact.weights(expert.key),
                moments.moments(expert.key, "inputs"),
                moments.moments(expert.key, "hidden"),
                view.transposed,
            )
            for role, error in lost.items():
                errors[role].append(error / max(1, n_tokens))
        reads = calibration if counts else None
        return ExpertWidths(
            key=expert.key,
            n_weights={matrix.role: matrix.size for matrix in expert.matrices},
            n_bytes=expert.n_bytes,
            sizes={role: np.array(found, np.int64) for role, found in sizes.items()},
            errors={role: np.array(found) for role, found in errors.items() if found},
            sent=None if reads is None else float(reads.array(expert.key, "sent")),
            gates=None if reads is None else float(reads.array(expert.key, "sent_gates")),
            effective_rank=effective_rank(list(matrices.values())) if ranks else None,
        )

    found = each_expert(checkpoint, measure, jobs, progress)
    return Offers(family, widths, tuple(found), n_tokens)
