"""Which of a token's experts are left out while a model runs: the rules of four papers.

    policy = get_policy("modes_re:target0.4", Path("thresholds.json"))
    with skipping(model, policy) as counts:            # model/skipping.py
        ...

    lu_re                           w_i < beta_l w_1; needs medians
    odp_re[:layersN][:protectS]     the same, in N layers and for all but a share S of the tokens;
                                    needs medians, and what each layer matters
    modes_re[:targetS | :tauX]      alpha_l w_i < tau; needs what each layer matters, and points
    hobbit_re[:aboveS][:lowS][:renorm]
                                    those behind a share S of a token's weights; needs nothing

w_1 >= w_2 >= ... are a token's weights as its router gives them. The expert with the largest is
never skipped, whatever a rule says. Nothing is stored with the model.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from moebound.errors import MoeboundError
from moebound.files.formats.skipping import Thresholds
from moebound.files.formats.statistics import read_statistics

POLICIES = ("lu_re", "odp_re", "modes_re", "hobbit_re")

ODP_LAYERS = 10 / 32
"""The released code drops experts in 10 of Mixtral's 32 layers."""
ODP_PROTECT = 0.02
MODES_TARGET = 0.8
"""The released code's default."""
HOBBIT_ABOVE = 0.9
"""T2 of the paper: behind this share of a token's weights an expert is skipped."""
HOBBIT_LOW = 0.6
"""T1: behind this one it is computed in low precision."""


class Policy(ABC):
    """setting: how it is asked for, in full. rescales: whether what is left gets the weight of what
    was skipped. protect: share of a sequence's tokens, those that matter most, that keep all."""

    rescales: ClassVar[bool] = True

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.protect = 0.0

    def check_layers(self, layers: tuple[int, ...]) -> None:  # noqa: B027  # most need none
        """Raises MoeboundError for a layer that it has no threshold of."""

    @abstractmethod
    def skips(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        """weights: [..., K], the router's. Returns bool of that shape; what it says of a token's
        largest weight does not count."""


class LuRe(Policy):
    """Lu et al.'s dynamic skipping (2402.14800, section 3.3).

        w_i < beta_l w_1,     beta_l: the median of w_2 / w_1 in layer l, on a calibration text

    Deviations: the paper's models choose two experts; with more, every one behind the first is
    judged so. Medians of statistics are those of 256 steps (`ratios`), those of thresholds exact.
    A model whose weights do not add up to 1 keeps their sum.
    """

    def __init__(self, betas: Mapping[int, float], setting: str = "lu_re") -> None:
        super().__init__(setting)
        self.betas = dict(betas)

    def check_layers(self, layers: tuple[int, ...]) -> None:
        _check_layers(layers, tuple(self.betas))

    def skips(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        return weights < self.betas[layer] * weights.amax(dim=-1, keepdim=True)


class OdpRe(LuRe):
    """Online dynamic pruning of MC (2410.06270, "ODP", and its released code).

    Lu et al.'s rule, in the n layers that matter least (`answer_kl`), for all but a share of the
    tokens of a sequence that are important:

        I_j = |x_j|_1 · (1 / (L - j)) sum_{i >= j} A_ij      x: what the experts get, A: attention

    Deviations: the released code sums A over keys, where every row adds up to 1, so that late
    tokens are protected; here it is summed over queries, as the formula says. A is the mean over
    heads. beta_l and the layers' order are constants of Mixtral there; here they are measured on
    the model, and n is 10/32 of its layers. All behind the first are judged with K > 2.
    floor(share · L) tokens of each sequence of L are protected among those of one forward pass:
    later tokens do not attend to a prompt that is being read, and of a text that is written, token
    by token, none is protected. Reading a text at once, as KL is measured, sees ahead of decoding.
    Attention is computed by transformers' "eager", which gives A.
    """

    def __init__(
        self, setting: str, betas: Mapping[int, float], layers: frozenset[int], protect: float
    ) -> None:
        super().__init__(betas, setting)
        self.layers, self.protect = layers, protect

    def skips(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        if layer not in self.layers:
            return torch.zeros_like(weights, dtype=torch.bool)
        return super().skips(layer, weights)


class ModesRe(Policy):
    """MoDES (2511.15690), for text: globally modulated local gates.

        alpha_l w_i < tau,     alpha_l = kl_l / sum over layers of kl

    kl_l: KL(whole || without the routed experts of layer l) on the tokens of answers. Weights are
    not scaled afterwards, as in the paper.

    Deviations: one modality, so one tau, and the frontier search is a walk over points. tau is the
    least of the points in the thresholds that skipped the target; the paper's grid has 100 by a
    sigmoid, ours is at equal shares of the pairs. The released rule may drop all of a token's
    experts; here the largest is kept, so 1 - 1/K is the most that can be asked.
    """

    rescales = False

    def __init__(self, setting: str, alphas: Mapping[int, float], tau: float) -> None:
        super().__init__(setting)
        self.alphas, self.tau = dict(alphas), tau

    def check_layers(self, layers: tuple[int, ...]) -> None:
        _check_layers(layers, tuple(self.alphas))

    def skips(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        return self.alphas[layer] * weights.float() < self.tau


class HobbitRe(Policy):
    """HOBBIT's rule (2411.01433). s: the share of a token's weights that larger ones have.

        s <= T1 (low): as it is,   s <= T2 (above): in low precision,   else: skipped

    Deviations: the paper does so on a miss only. Here every expert counts as missed: texts do not
    depend on what is in memory, and quality is that of the worst case. Low precision is a store
    under a wider bound (`coarse_copies.py`, `moebound eval --coarse`), the original without one. On
    a miss only: `--coarse` and `--skip-above` of a model that is offloaded (`offload/fallback.py`).
    Whether the rest is renormalised is not stated; `renorm` does.
    """

    rescales = False

    def __init__(
        self, setting: str = "hobbit_re", above: float = HOBBIT_ABOVE, low: float = HOBBIT_LOW
    ) -> None:
        super().__init__(setting)
        self.above, self.low = above, low

    def skips(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        return _share_before(weights) > self.above

    def coarser(self, weights: torch.Tensor) -> torch.Tensor:
        """As `skips`: what is computed in low precision, where it is not skipped."""
        return _share_before(weights) > self.low


def _share_before(weights: torch.Tensor) -> torch.Tensor:
    """[..., K]: of a token's weights, what those larger than each have together."""
    ordered, order = weights.float().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    share = before / ordered.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.zeros_like(share).scatter(-1, order, share)


class _HobbitRenormed(HobbitRe):
    rescales = True


@dataclass(frozen=True)
class _Asked:
    """A setting, taken apart: numbers by their names, and words."""

    name: str
    numbers: Mapping[str, float]
    words: frozenset[str]


_KNOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lu_re": ((), ()),
    "odp_re": (("layers", "protect"), ()),
    "modes_re": (("target", "tau"), ()),
    "hobbit_re": (("above", "low"), ("renorm",)),
}


def _parse(setting: str) -> _Asked:
    name, *options = setting.split(":")
    if name not in _KNOWN:
        raise MoeboundError(f"--skip {setting}: expected one of {', '.join(POLICIES)}")
    known, words = _KNOWN[name]
    numbers, said = dict[str, float](), set[str]()
    for option in options:
        match = re.fullmatch(r"([a-z]+)([0-9.]+(?:e-?[0-9]+)?)", option)
        if option in words:
            said.add(option)
        elif match is not None and match[1] in known and match[1] not in numbers:
            numbers[match[1]] = _number(setting, match[2])
        else:
            takes = [f"{known_name}NUMBER" for known_name in known] + list(words)
            raise MoeboundError(
                f"--skip {setting}: {option!r}: {name} takes {', '.join(takes) or 'no options'}, "
                "each once"
            )
    return _Asked(name, numbers, frozenset(said))


def _number(setting: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MoeboundError(f"--skip {setting}: {text!r} is no number") from None


def check_setting(setting: str, calibration: Path | None) -> None:
    """What can be told of a setting before a file is read. Raises MoeboundError."""
    asked = _parse(setting)
    if asked.name == "hobbit_re" and calibration is not None:
        raise MoeboundError(f"--skip {setting} needs no --calibration; leave it out")
    if asked.name != "hobbit_re" and calibration is None:
        statistics = "statistics, or " if asked.name == "lu_re" else ""
        raise MoeboundError(
            f"--skip {setting} needs --calibration: {statistics}what `moebound thresholds` wrote"
        )
    _share(setting, asked.numbers.get("protect", 0.0), "protect", below_1=False)
    _share(setting, asked.numbers.get("target", 0.5), "target", below_1=True)
    for name in ("above", "low"):
        _share(setting, asked.numbers.get(name, 0.5), name, below_1=False)
    if {"target", "tau"} <= set(asked.numbers):
        raise MoeboundError(f"--skip {setting}: expected target or tau, found both")


def get_policy(setting: str, calibration: Path | None = None) -> Policy:
    """The policy that a setting asks for. calibration: statistics or thresholds.

    Raises MoeboundError for a setting that is none, for a file that is missing or lacks what the
    policy needs, and for a target that no point reaches, with the nearest that can be.
    """
    check_setting(setting, calibration)
    asked = _parse(setting)
    if asked.name == "hobbit_re":
        above = asked.numbers.get("above", HOBBIT_ABOVE)
        low = asked.numbers.get("low", HOBBIT_LOW)
        return (_HobbitRenormed if asked.words else HobbitRe)(setting, above, low)
    assert calibration is not None  # check_setting saw it
    if calibration.is_dir():
        if asked.name != "lu_re":
            raise MoeboundError(
                f"--skip {setting}: {calibration} has statistics, which do not say how much a "
                "layer matters; expected a file that `moebound thresholds` wrote"
            )
        return LuRe(read_statistics(calibration).median_ratios(), setting)
    if not calibration.exists():
        raise MoeboundError(
            f"--skip {setting}: {calibration}: no such file; `moebound thresholds SRC --task TASK "
            f"-o {calibration.name}` writes it"
        )
    found = Thresholds.load(calibration)
    betas = {line.layer: line.median_ratio for line in found.layers}
    if asked.name == "lu_re":
        return LuRe(betas, setting)
    if asked.name == "odp_re":
        return OdpRe(setting, betas, _least(found, asked, setting), asked.numbers.get(
            "protect", ODP_PROTECT))  # fmt: skip
    total = math.fsum(line.answer_kl for line in found.layers)
    if not total > 0:
        raise MoeboundError(
            f"--skip {setting}: {calibration}: no layer changes an answer when it is left out, so "
            "none can be told from another; measure with more problems"
        )
    alphas = {line.layer: line.answer_kl / total for line in found.layers}
    tau = asked.numbers.get("tau")
    return ModesRe(setting, alphas, _tau(found, asked, setting) if tau is None else tau)


def _least(found: Thresholds, asked: _Asked, setting: str) -> frozenset[int]:
    """The layers that matter least."""
    n = len(found.layers)
    wanted = asked.numbers.get("layers", max(1, round(ODP_LAYERS * n)))
    if wanted != int(wanted) or not 1 <= wanted <= n:
        raise MoeboundError(f"--skip {setting}: layers{wanted:g}: expected 1 to {n}")
    by_kl = sorted(found.layers, key=lambda line: (line.answer_kl, line.layer))
    return frozenset(line.layer for line in by_kl[: int(wanted)])


def _tau(found: Thresholds, asked: _Asked, setting: str) -> float:
    target = asked.numbers.get("target", MODES_TARGET)
    for point in found.points:
        if point.share >= target:
            return point.tau
    most = max((point.share for point in found.points), default=0.0)
    raise MoeboundError(
        f"--skip {setting}: a share of {target:g} was not reached; the nearest is "
        f"modes_re:target{math.floor(1000 * most) / 1000:g} (a token keeps one expert at least)"
    )


def _share(setting: str, value: float, name: str, *, below_1: bool) -> None:
    if not 0 <= value <= 1 or (below_1 and value == 1):
        raise MoeboundError(
            f"--skip {setting}: {name}{value:g}: expected 0 to 1" + (", and less" * below_1)
        )


def _check_layers(layers: tuple[int, ...], known: tuple[int, ...]) -> None:
    for layer in layers:
        if layer not in known:
            raise MoeboundError(
                f"no threshold of layer {layer}; expected those of this model, and they are of "
                f"layers {', '.join(map(str, sorted(known)))}"
            )
