"""`from_pretrained(checkpoint, quantization_config=MoeboundConfig(rate=0.3))`: compress on loading.

For trying a bound on an ordinary checkpoint without writing a store. transformers loads the model
as always; then every group of experts that a method sees together is compressed, certified, decoded
and put back in its place, a few groups at a time. Memory is the model's and that of some experts,
and the model computes with what a store of these weights would give. The promise is about the
weights as they were loaded: load with `dtype="auto"` to have it about the checkpoint's.

The model is an ordinary one afterwards: no quantization config, and `save_pretrained` writes an
ordinary checkpoint with the decoded weights, not a store. Routed experts only.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from typing import Any, cast

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from moebound.codec import thread_count
from moebound.codec.arrays import to_numpy, to_torch
from moebound.errors import MethodError, StoreError
from moebound.integrations.transformers.tables import OrdinaryQuantizer, enter
from moebound.jobs.ordered import in_order
from moebound.methods import Artifact, ExpertView, GroupView, Method, compress, get_method
from moebound.model.live import LiveExpert, LiveExperts, live_experts
from moebound.types import ErrorBound

logger = logging.getLogger(__name__)

METHOD = "moebound-compress"
"""`quant_method` of the config while such a model loads; no file has it."""


class MoeboundConfig(QuantizationConfigMixin):
    """How the experts of an ordinary checkpoint are compressed while it loads.

    rate: max |W - Ŵ| <= rate · mean|θ| of each expert; short for bound=ErrorBound(rate, "rate",
    "expert"). bound: any other `ErrorBound`, or its JSON. method, codec: as of `moebound.compress`,
    without either the method that keeps bounds with our own codec.

    Raises BoundError for a bound that is none, MethodError for options that exclude each other, a
    method that is unknown, needs a bound and has none, or has one and knows none, and for one that
    edits the routing or needs statistics, which takes a store (`moebound.compress`).
    """

    dequantize = True

    def __init__(
        self,
        rate: float | None = None,
        bound: ErrorBound | dict[str, Any] | None = None,
        method: str | None = None,
        codec: str | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise MethodError(
                f"MoeboundConfig: unknown options {', '.join(sorted(unknown))}; expected rate, "
                "bound, method, codec. A store has its own config, and needs none given"
            )
        if rate is not None and bound is not None:
            raise MethodError("MoeboundConfig: rate and bound: expected one of them")
        if method is not None and codec is not None:
            raise MethodError(f"method {method!r} and codec {codec!r}: expected one of them")
        if rate is not None:
            bound = ErrorBound(rate, "rate", "expert")
        self.bound = ErrorBound.from_json(bound) if isinstance(bound, dict) else bound
        self.quant_method = METHOD  # type: ignore[assignment]  # a new method
        chosen = get_method(f"bounded:{codec}" if codec else method or "bounded:bound")
        chosen.check_installed()
        self.method = chosen.setting
        if self.bound is None and chosen.needs_bound:
            raise MethodError(
                f"method {self.method!r} needs a bound: give MoeboundConfig(rate=...) or bound=..."
            )
        if self.bound is not None and not chosen.bounded:
            raise MethodError(f"method {self.method!r} knows no bound, and {self.bound} was given")
        if chosen.edits_router or chosen.wanted_statistics():
            what = "edits the routing" if chosen.edits_router else "needs statistics"
            raise MethodError(
                f"method {self.method!r} {what}, which is not done while loading: write a store "
                "with `moebound compress`, and load that"
            )

    def to_dict(self) -> dict[str, Any]:
        bound = None if self.bound is None else self.bound.to_json()
        return {"quant_method": METHOD, "method": self.method, "bound": bound}


class CompressingQuantizer(OrdinaryQuantizer):
    """Takes part in one from_pretrained. Raises UnsupportedArchitectureError, before weights are
    loaded, for a model without experts that are known here."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            raise StoreError(
                f"config.json has quant_method {METHOD!r}, which no checkpoint is stored as; "
                "remove its quantization_config"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        live_experts(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = cast(MoeboundConfig, self.quantization_config)
        compress_in_place(live_experts(model), get_method(config.method), config.bound)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model


def compress_in_place(experts: LiveExperts, method: Method, bound: ErrorBound | None) -> None:
    """Put what compressing makes of each expert in its place. Raises as `methods.compress`, and
    UnsupportedArchitectureError for weights that are not in memory."""
    groups: dict[tuple[int, ...], list[LiveExpert]] = defaultdict(list)
    for key, expert in experts.items():
        alone = method.scope == "expert"
        groups[(key.layer, key.expert) if alone else (key.layer,)].append(expert)

    def made(group: Sequence[LiveExpert]) -> Artifact:
        return compress(method, GroupView(tuple(_view(expert, bound) for expert in group)))

    n_bytes, worst = 0, 0.0
    with closing(in_order(made, groups.values(), jobs=thread_count())) as artifacts:
        for group, artifact in zip(groups.values(), artifacts, strict=True):
            for expert in group:
                _put(expert, artifact)
            n_bytes += artifact.n_bytes
            worst = max(worst, artifact.max_abs_error)
    n_weights = sum(expert.n_weights for expert in experts.values())
    logger.info(
        "moebound: %d experts compressed by %s at %.3f bits a weight; largest error %.3g",
        len(experts), method.setting, 8 * n_bytes / n_weights, worst,
    )  # fmt: skip


def _view(expert: LiveExpert, bound: ErrorBound | None) -> ExpertView:
    arrays = {role: to_numpy(matrix) for role, matrix in expert.matrices.items()}
    return ExpertView(expert.key, arrays, None if bound is None else dict.fromkeys(arrays, bound))


@torch.no_grad()
def _put(expert: LiveExpert, artifact: Artifact) -> None:
    live = expert.matrices
    for role, decoded in artifact.weights(expert.key).items():
        live[role].copy_(to_torch(decoded))


def register() -> None:
    """Enter config and quantizer into transformers' tables. Idempotent."""
    enter(METHOD, MoeboundConfig, CompressingQuantizer)


register()
