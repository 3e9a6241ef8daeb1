"""Ways to divide a budget. All get the same budget in real bytes, so that they can be compared.

    uniform      one rate for every expert
    layer        one rate for each layer, by the layer's measured sensitivity
    frequency    an expert's rate by how often it is chosen
    rfid         an expert's bits by frequency and effective rank fused, as RFID-MoE divides ranks
    sensitivity  each expert's rate by its own measured curve: the optimum under those curves
    search       layers' rates by what whole plans lose when they are measured (`search.py`)
    pmq_re, mxmoe_re, edgemoe_re, mptqs_re, milo_re     by widths (`planners.py`)

The rules behind layer and frequency: a loss of c·α² at n·(const - log2 α) bits is least, for a
given total, where every weight loses the same, α ∝ sqrt(n/c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moebound.errors import PlanError
from moebound.plan.allocate import within_bytes, within_loss
from moebound.plan.items import ExpertSizes, Floats, Items
from moebound.types import ExpertKey

Scheme = Literal[
    "uniform", "layer", "frequency", "rfid", "sensitivity", "fisher", "search",
    "pmq_re", "mxmoe_re", "edgemoe_re", "mptqs_re", "milo_re",
]  # fmt: skip

RFID_FUSION = 0.8
"""ξ of RFID-MoE (2602.09316): the weight of effective rank; 1 - ξ is frequency's."""

_HALVINGS = 60


def sensitivity(items: Items, *, budget_bytes: int | None, max_kl: float | None) -> Floats:
    """[N] rates of the grid: least loss in so many bytes, or fewest bytes for so much loss."""
    loss = _known(items, "sensitivity")
    if max_kl is not None:
        return items.rates[within_loss(items.sizes, loss, max_kl)]
    assert budget_bytes is not None
    return items.rates[within_bytes(items.sizes, loss, budget_bytes)]


def uniform(items: Items, *, budget_bytes: int | None, max_kl: float | None) -> Floats:
    """[N] the same rate for all."""
    return scaled(items, np.ones(len(items.keys)), budget_bytes=budget_bytes, max_kl=max_kl)


def by_layer(items: Items, *, budget_bytes: int | None, max_kl: float | None) -> Floats:
    """[N] one rate a layer, by the sum of its experts' losses at the middle rate of the grid."""
    loss = _known(items, "layer")[:, len(items.rates) // 2]
    layers = np.array([key.layer for key in items.keys])
    per_weight = np.bincount(layers, loss) / np.maximum(np.bincount(layers, items.n_weights), 1)
    return scaled(
        items, _inverse_root(per_weight[layers]), budget_bytes=budget_bytes, max_kl=max_kl
    )


def by_frequency(
    items: Items,
    share: Mapping[ExpertKey, float],
    *,
    budget_bytes: int | None,
    max_kl: float | None,
) -> Floats:
    """[N] rates by the share of its layer's routing that each expert has."""
    frequency = np.array([share[key] for key in items.keys])
    return scaled(items, _inverse_root(frequency), budget_bytes=budget_bytes, max_kl=max_kl)


def rfid(
    items: Items,
    share: Mapping[ExpertKey, float],
    ranks: Mapping[ExpertKey, float],
    *,
    budget_bytes: int | None,
    max_kl: float | None,
    fusion: float = RFID_FUSION,
) -> Floats:
    """[N] rates so that bits per weight are proportional to ξ·E + (1 - ξ)·F.

    E: effective rank, F: frequency, each over its mean in the layer. The paper (2602.09316) divides
    the ranks of shared bases this way; here bits stand for ranks. Rates end where the grid does, so
    that the budget holds where the paper's rounding loses it.
    """
    layers = np.array([key.layer for key in items.keys])
    rank = _over_mean(np.array([ranks[key] for key in items.keys]), layers)
    frequency = _over_mean(np.array([share[key] for key in items.keys]), layers)
    score = fusion * rank + (1 - fusion) * frequency

    def rates(scale: float) -> Floats:
        # More bits for a smaller scale, as in `scaled`.
        return _rates_for(items, score / scale * items.n_weights)

    return _search(items, rates, 1e-3, 1e3, budget_bytes, max_kl)


def scaled(
    items: Items, shape: Floats, *, budget_bytes: int | None, max_kl: float | None
) -> Floats:
    """[N] λ·shape, kept inside the grid, with the λ that meets the budget."""
    low, high = items.rates[0], items.rates[-1]

    def rates(scale: float) -> Floats:
        return np.clip(scale * shape, low, high)

    return _search(items, rates, low / shape.max(), high / shape.min(), budget_bytes, max_kl)


def effective_rank(matrices: Iterable[npt.NDArray[Any]]) -> float:
    """exp(entropy of σ²/Σσ²) of an expert's matrices, stacked along the axis they share.

    matrices: [rows, cols] each; those that have the same number of columns as the first are stacked
    as they are, others transposed. Between 1 and the hidden size. Source: RFID-MoE, 2602.09316.
    Raises PlanError if they share no axis.
    """
    parts = [np.asarray(matrix, np.float32) for matrix in matrices]
    width = _shared_extent([part.shape for part in parts])
    gram = np.zeros((width, width))
    for part in parts:
        aligned = part if part.shape[1] == width else part.T
        gram += aligned.T @ aligned
    power = np.maximum(np.linalg.eigvalsh(gram), 0)
    if not power.sum():
        return 1.0
    q = power / power.sum()
    q = q[q > 0]
    return float(np.exp(-(q * np.log(q)).sum()))


def _shared_extent(shapes: Sequence[tuple[int, ...]]) -> int:
    for extent in (shapes[0][1], shapes[0][0]):
        if all(extent in shape for shape in shapes):
            return extent
    raise PlanError(f"matrices of shapes {list(shapes)} share no axis to be stacked along")


def ranks_of(experts: Iterable[ExpertSizes]) -> dict[ExpertKey, float]:
    """Raises PlanError if they were not measured."""
    found: dict[ExpertKey, float] = {}
    for expert in experts:
        if expert.effective_rank is None:
            raise PlanError(f"{expert.key}: its effective rank was not measured")
        found[expert.key] = expert.effective_rank
    return found


def _search(
    items: Items,
    rates: Callable[[float], Floats],
    low: float,
    high: float,
    budget_bytes: int | None,
    max_kl: float | None,
) -> Floats:
    """The smallest scale within a budget of bytes, or the largest within a limit of loss."""
    if max_kl is not None:
        return _widest(items, rates, low, high, max_kl)
    assert budget_bytes is not None
    least = int(items.sizes_at(rates(high)).sum())
    if least > budget_bytes:
        raise PlanError(
            f"a budget of {budget_bytes} bytes cannot be met: the smallest is {least} bytes"
        )
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        if items.sizes_at(rates(middle)).sum() <= budget_bytes:
            high = middle
        else:
            low = middle
    return rates(high)


def _widest(
    items: Items, rates: Callable[[float], Floats], low: float, high: float, max_kl: float
) -> Floats:
    _known(items, "limit of loss (--max-kl)")

    def lost(scale: float) -> float:
        loss = items.loss_at(rates(scale))
        assert loss is not None
        return float(loss.sum())

    if (least := lost(low)) > max_kl:
        raise PlanError(
            f"a KL of {max_kl:g} cannot be met: the least that a plan reaches is {least:g}"
        )
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        if lost(middle) <= max_kl:
            low = middle
        else:
            high = middle
    return rates(low)


def _rates_for(items: Items, n_bits: Floats) -> Floats:
    """[N] the rate at which each item takes so many bits; the grid's ends beyond it."""
    logs = np.log(items.rates)
    falling = np.minimum.accumulate(items.sizes, axis=1) * 8.0
    return np.exp(
        [np.interp(bits, row[::-1], logs[::-1]) for bits, row in zip(n_bits, falling, strict=True)]
    )


def _known(items: Items, what: str) -> Floats:
    if items.loss is None:
        raise PlanError(f"a {what} needs measured losses: give --sensitivity or --study")
    return items.loss


def _inverse_root(values: Floats) -> Floats:
    least = values[values > 0].min(initial=1.0)
    return np.asarray(1 / np.sqrt(np.maximum(values, least * 1e-3)))


def _over_mean(values: Floats, layers: npt.NDArray[np.int64]) -> Floats:
    mean = np.bincount(layers, values) / np.maximum(np.bincount(layers), 1)
    return np.asarray(values / mean[layers])
