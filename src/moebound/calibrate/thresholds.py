"""What skipping policies need to know of a model: `moebound thresholds`.

Problems of a task with their solutions are read once by the whole model, once without the routed
experts of each layer, and once for each point of MoDES' tau. All are compared to the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moebound.calibrate.text import solved, whole
from moebound.errors import MoeboundError
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import Loaded
from moebound.files.formats.skipping import LayerLine, Point, Thresholds
from moebound.model.live import live_experts
from moebound.model.skip_policies import ModesRe, Policy
from moebound.model.skipping import Skipped, skip_in, skipping
from moebound.tasks.base import Task

N_POINTS = 20
"""Points of tau, at equal shares of the pairs that may be skipped."""

Say = Callable[[str, int, int], None]
"""Called with what is read, passes done, and passes in all."""


class _Nothing(Policy):
    """Skips nothing: for listening."""

    def __init__(self) -> None:
        super().__init__("nothing")

    def skips(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weights, dtype=torch.bool)


def measure_thresholds(
    loaded: Loaded,
    task: Task,
    limit: int | None = None,
    *,
    skip: int = 0,
    say: Say = lambda what, done, total: None,
) -> Thresholds:
    """Read `limit` problems of a task behind the first `skip`.

    Raises as `skip_in`, TaskError for a task without solutions, and MoeboundError for a model that
    gives no number without a layer's experts.
    """
    model = loaded.model
    rows = solved(loaded, task, limit, skip=skip)
    text = whole(task, rows)
    live = live_experts(model)
    total = 1 + len(live.layers) + N_POINTS
    say("the whole model", 0, total)
    heard: dict[int, list[torch.Tensor]] = {layer: [] for layer in live.layers}

    def hear(layer: int, weights: torch.Tensor, _skipped: torch.Tensor) -> None:
        heard[layer].append(weights.detach().float().cpu())

    with skip_in(model, _Nothing(), hear):
        before = Baseline.of(model, rows)
    gates = {layer: torch.cat(parts) for layer, parts in heard.items()}
    lines = list[LayerLine]()
    for layer in live.layers:
        say(f"without the experts of layer {layer}", 1 + len(lines), total)
        modules = [entry.module for entry in live.stacks if entry.layer == layer]
        with _silent(modules):
            score = before.compare(model)
        if not math.isfinite(score.kl_nats):
            raise MoeboundError(
                f"{loaded.source.name}: without the experts of layer {layer} it gives no numbers "
                "any more, so what the layer matters cannot be measured"
            )
        ratio = _median_ratio(gates[layer])
        lines.append(LayerLine(layer, ratio, score.kl_nats, score.answer_kl_nats))
    points = _points(model, before, lines, gates, lambda n: say("points", total - n, total))
    return Thresholds(
        loaded.source.name, task.name, text.sha256, len(rows), text.n_tokens, tuple(lines), points
    )


def _median_ratio(gates: torch.Tensor) -> float:
    """gates: [P, K]. 0 where a token has one expert."""
    if gates.shape[1] < 2 or not len(gates):
        return 0.0
    first, second = gates.topk(2, dim=1).values.unbind(1)
    ratios = (second / first.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)
    return float(ratios.double().quantile(0.5)) if len(ratios) < 1 << 24 else float(ratios.median())


@contextmanager
def _silent(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, these experts modules put out zeros."""

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)

    kept = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own in zip(modules, kept, strict=True):
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def _points(
    model: Any,
    before: Baseline,
    lines: list[LayerLine],
    gates: Mapping[int, torch.Tensor],
    say: Callable[[int], None],
) -> tuple[Point, ...]:
    """tau at equal shares of the pairs behind each token's first, by the whole model's routing, and
    what became of it: what is skipped in a layer changes the routing of those behind it."""
    total = math.fsum(line.answer_kl for line in lines)
    if not total > 0:
        return ()
    alphas = {line.layer: line.answer_kl / total for line in lines}
    behind = [
        (alphas[layer] * weights).sort(dim=1, descending=True).values[:, 1:].reshape(-1)
        for layer, weights in gates.items()
    ]
    products = torch.cat(behind).sort().values
    found = list[Point]()
    for step in range(1, N_POINTS + 1 if len(products) else 1):
        say(N_POINTS - step + 1)
        product = products[math.ceil(step / N_POINTS * len(products)) - 1]
        tau = float(torch.nextafter(product, torch.tensor(math.inf)))
        if found and tau <= found[-1].tau:
            continue
        with skipping(model, ModesRe("modes_re", alphas, tau)) as counts:
            score = before.compare(model)
        if math.isfinite(score.kl_nats):
            found.append(_point(tau, counts, score))
    return tuple(found)


def _point(tau: float, counts: Skipped, score: Any) -> Point:
    return Point(tau, counts.share, score.kl_nats, score.answer_kl_nats)
