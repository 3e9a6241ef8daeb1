"""How evenly a layer's experts are used: the four quantities of the paper's Table 2, defined.

The paper (MoE-Compression, 2509.07727, Table 2 and Figure 4) names them and says in a line what
each is for, without formulas. Here, with c_e the number of times expert e of a layer was chosen,
E the number of experts, c̄ = Σ c_e / E and p_e = c_e / Σ c:

  imbalance score      sqrt(Σ (c_e - c̄)² / E) / c̄
  expert utilisation   |{e : c_e > 0}| / E
  normalised entropy   -Σ p_e ln p_e / ln E
  Gini coefficient     Σ_i Σ_j |c_i - c_j| / (2 E² c̄)

Which reading was taken, where the paper leaves one open:

- Imbalance score, "whether the number of times experts are called is balanced": the coefficient of
  variation of the counts, the measure of load that mixture-of-experts papers balance by (Shazeer et
  al. 2017, 1701.06538, section 4). 0 is even. `peak_load`, the other common reading, is kept too.
- Expert utilisation, "the proportion of experts used": chosen at least once. The paper reads values
  below 1 as "experts that remain inactive", which fixes it.
- Normalised entropy, "the uncertainty of model decisions": of the layer's choices taken together,
  since the paper uses it to show uneven use; not the mean entropy of the router's distribution for
  one token.
- Gini coefficient: of the counts, without the small-sample correction E / (E - 1).

All four are of one layer. A router that chooses K different experts a token cannot be as uneven as
it may seem: the least even use there is (always the same K) has imbalance sqrt(E / K - 1),
utilisation K / E, entropy ln K / ln E and Gini 1 - K / E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moebound.errors import MoeboundError
from moebound.types import Array


@dataclass(frozen=True)
class Balance:
    """How evenly the experts of one layer are used.

    imbalance: 0 if evenly; grows without limit of its own. utilisation: in (0, 1]. entropy: in
    [0, 1], 1 if evenly. gini: in [0, 1), 0 if evenly. peak_load: count of the most used expert
    over the mean count, at least 1.
    """

    imbalance: float
    utilisation: float
    entropy: float
    gini: float
    peak_load: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def balance(counts: Sequence[int] | Array) -> Balance:
    """The measures of one layer. counts: [E], how often each expert was chosen.

    A layer with one expert is even, of entropy 1. Raises MoeboundError for counts that are negative
    or all 0: how evenly nothing is shared out has no answer.
    """
    c = np.asarray(counts, np.float64)
    if c.ndim != 1 or not len(c) or (c < 0).any() or not np.isfinite(c).all():
        raise MoeboundError(
            f"counts {list(counts)[:8]}: expected a number, 0 or above, for each expert"
        )
    if not c.any():
        raise MoeboundError("no expert of this layer was ever chosen: nothing to measure")
    return Balance(
        imbalance=imbalance_score(c),
        utilisation=expert_utilisation(c),
        entropy=normalised_entropy(c),
        gini=gini_coefficient(c),
        peak_load=float(c.max() / c.mean()),
    )


def imbalance_score(counts: Array) -> float:
    """sqrt(Σ (c_e - c̄)² / E) / c̄: standard deviation over mean."""
    return float(counts.std() / counts.mean())


def expert_utilisation(counts: Array) -> float:
    """|{e : c_e > 0}| / E: the share of experts chosen at least once."""
    return float(np.count_nonzero(counts) / len(counts))


def normalised_entropy(counts: Array) -> float:
    """-Σ p_e ln p_e / ln E, with 0 ln 0 = 0; 1 where E is 1."""
    if len(counts) == 1:
        return 1.0
    p = counts[counts > 0] / counts.sum()
    return abs(float(-(p * np.log(p)).sum() / math.log(len(counts))))  # abs: not -0.0


def gini_coefficient(counts: Array) -> float:
    """Σ_i Σ_j |c_i - c_j| / (2 E² c̄), by the equal sum over the sorted counts."""
    ordered = np.sort(counts)
    n = len(ordered)
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return float((ranks * ordered).sum() / (n * ordered.sum()))


def by_chance(n_experts: int, top_k: float, n_tokens: int) -> float:
    """The imbalance score that chance alone gives: K of E experts drawn evenly for each of T
    tokens. About sqrt((E / K - 1) / T): a measured score near it says nothing about the router.

    From the variance of a binomial count, T · (K / E) · (1 - K / E), over its mean T · K / E.
    """
    return math.sqrt((n_experts / top_k - 1) / n_tokens) if n_tokens else math.inf
