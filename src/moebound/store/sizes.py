"""What every expert of a checkpoint would take, at every rate a plan may choose: by encoding it."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from moebound.checkpoint import Checkpoint, Expert
from moebound.codec import stats, thread_count
from moebound.jobs.ordered import in_order
from moebound.methods.bounded import Bounded
from moebound.plan import RATES, ExpertSizes, effective_rank
from moebound.store.summary import Meter, ProgressCallback
from moebound.types import ErrorBound, TensorStats


def measure_sizes(
    checkpoint: Checkpoint,
    *,
    codec: str = "bound",
    ranks: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> list[ExpertSizes]:
    """Bytes of each matrix of each routed expert at each of `RATES`, of the expert's mean |weight|.

    Within 1 % of what `compress` writes, exact for matrices of up to a million weights.
    ranks: measure effective ranks too. jobs: experts at a time, None for `MOEBOUND_THREADS` or the
    CPUs; memory is that of jobs + 1 experts.
    """
    method = Bounded.from_options(codec)
    experts = checkpoint.experts()
    meter = Meter(
        progress,
        total_bytes=sum(expert.n_bytes for expert in experts),
        total_experts=len(experts),
    )

    def measure(expert: Expert) -> ExpertSizes:
        arrays = {m.role: np.ascontiguousarray(checkpoint.read(m)) for m in expert.matrices}
        whole = sum((stats(array) for array in arrays.values()), TensorStats())
        sizes = method.estimate(
            arrays, [ErrorBound(rate, "rate", "expert") for rate in RATES.tolist()]
        )
        return ExpertSizes(
            key=expert.key,
            n_weights={matrix.role: matrix.size for matrix in expert.matrices},
            sizes={str(role): found for role, found in sizes.items()},
            n_bytes=expert.n_bytes,
            mean_abs=whole.mean_abs,
            effective_rank=effective_rank(list(arrays.values())) if ranks else None,
        )

    found = list[ExpertSizes]()
    jobs = thread_count() if jobs is None else jobs
    with closing(in_order(measure, experts, jobs=jobs)) as measured:
        for expert, sizes in zip(experts, measured, strict=True):
            found.append(sizes)
            meter.add(str(expert.key), n_bytes=expert.n_bytes, experts=1)
    return found
