"""How many weights a model has, and how many are its routed experts', by its config alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from moebound.checkpoint import top_k_of
from moebound.errors import CheckpointError, UnsupportedArchitectureError
from moebound.model.attention import latent_attention
from moebound.model.code_linear import tied_weights
from moebound.model.few_rows import LEAST_WEIGHTS
from moebound.model.pretrained import Runs, Source, empty_model, read_config, what_runs
from moebound.model.stacks import find_stack
from moebound.offload.timing import read_weights
from moebound.wordmath.builtin import resolve


@cache
def _known() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(
        (Path(__file__).parent / "known.json").read_text(encoding="utf-8")
    )
    return found


KNOWN: tuple[str, ...] = tuple(_known())
"""Models whose configs come with moebound."""


@dataclass(frozen=True)
class Shape:
    """Of a model, nothing of which is in memory.

    n_weights: all of the language model, prediction heads not counted. n_expert_weights: of routed
    experts. layers: with routed experts. n_experts, top_k: in each of these. expert: the shapes of
    an expert's matrices, [out, in]. n_read: weights that are no routed expert's and that each token
    reads, which is all but embeddings. codes: whether the model computes with experts as they are
    stored, as slots of codes need it. plain_bytes: of a weight, uncompressed. n_linear: of n_read,
    those of linear layers that may be codes.
    """

    name: str
    model_type: str
    n_weights: int
    n_expert_weights: int
    layers: int
    n_experts: int
    top_k: int
    expert: tuple[tuple[int, int], ...]
    n_read: int
    runs: Runs
    codes: bool = True
    plain_bytes: int = 2
    n_linear: int = 0

    @property
    def expert_size(self) -> int:
        """Weights of one expert."""
        return self.n_expert_weights // (self.layers * self.n_experts)

    @property
    def n_other_weights(self) -> int:
        return self.n_weights - self.n_expert_weights

    def to_json(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "n_weights": self.n_weights,
            "n_expert_weights": self.n_expert_weights,
            "layers": self.layers,
            "experts_per_layer": self.n_experts,
            "experts_per_token": self.top_k,
            "other_weights_read": self.n_read,
            "linear_weights": self.n_linear,
            "expert_shapes": [list(shape) for shape in self.expert],
            "runs": self.runs.how,
            "why_not": self.runs.why or None,
            "codes": self.codes,
        }


def shape_of(src: Source) -> Shape:
    """src: one of KNOWN (in any case), a folder, a config.json, a built-in model, or a hub id, of
    which only the config is fetched.

    Raises CheckpointError if there is no config, UnsupportedArchitectureError for a model without
    routed experts, and one that the installed transformers does not know.
    """
    name = str(src)
    known = next((n for n in KNOWN if n.lower() == name.lower()), None)
    if known is not None:
        return _shape(known, _config(_known()[known]["config"]))
    path = Path(resolve(name))
    if path.name == "config.json" and path.is_file():
        path = path.parent
    try:
        config = read_config(path if path.is_dir() else src)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).rstrip('.')}. Known by name are {', '.join(KNOWN)}"
        ) from error
    return _shape(name, config)


def _config(fields: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**fields)


def _shape(name: str, config: Any) -> Shape:
    document = config.to_dict()
    model = empty_model(config, name)
    stacks = [s for s in (find_stack(n, m) for n, m in model.named_modules()) if s is not None]
    if not stacks:
        raise UnsupportedArchitectureError(
            f"{name}: model_type {document.get('model_type')!r} is dense by this config: no layer "
            "has routed experts"
        )
    first = stacks[0]
    parameters = {id(p): p for p in model.parameters()}  # tied ones once
    experts = 0
    for stack in stacks:
        names = {place.parameter for place in stack.places.values()}
        experts += sum(stack.module.get_parameter(parameter).numel() for parameter in names)
    return Shape(
        name=name,
        model_type=str(document.get("model_type")),
        n_weights=sum(parameter.numel() for parameter in parameters.values()),
        n_expert_weights=experts,
        layers=len(stacks),
        n_experts=first.n_experts,
        top_k=top_k_of(document),
        expert=tuple(first.shape(role) for role in first.places),
        n_read=read_weights(model) - experts,
        runs=what_runs(document),
        codes=_has_codes(first.module),
        n_linear=_linear_weights(model, [stack.name for stack in stacks]),
    )


def _linear_weights(model: Any, experts: list[str]) -> int:
    """Of the layers that `moebound.load` can hold as codes."""
    tied, read = tied_weights(model), [module.kv_b_proj for module in latent_attention(model)]
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module not in read
        and module.weight.numel() >= LEAST_WEIGHTS
        and f"{name}.weight" not in tied
        and not any(name.startswith(f"{of}.") for of in experts)
    )


def _has_codes(module: Any) -> bool:
    """An experts module whose gate and up stand one behind the other, rows first."""
    return (
        getattr(module, "is_transposed", None) is False
        and getattr(module, "is_concatenated", True) is True
    )
