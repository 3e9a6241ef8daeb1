"""Apply a method's router edits to a loaded model: what `methods/router_edit.py` says, for real.

keep       The router's own forward runs, with the logits of all other experts at -inf before it
           chooses; so whatever it does afterwards (softmax, groups, normalising) is as if they were
           not there. Where it chooses by a bias (`e_score_correction_bias`), that is -inf, too; and
           where it masks whole groups of experts, theirs stay -inf behind the mask.
alias      The expert gets the weights (and biases) of the one that computes in its place: a store
           has no bytes for it. Offloading maps the numbers.
constants  what the router's weights make of the vectors is added to the layer's output. The
           experts themselves have weights of 0.

That no expert is chosen that should not be is tried out when the model is loaded. A model whose
routing is edited cannot be saved as an ordinary checkpoint, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moebound.checkpoint import top_k_of
from moebound.errors import StoreError, UnsupportedArchitectureError
from moebound.methods import RouterEdit
from moebound.model.calls import arguments
from moebound.model.live import ExpertsModule, live_experts
from moebound.model.routers import find_routers, router_of
from moebound.model.taps import gets_decisions

_TRIED = 64
"""Random inputs that a router is tried with."""


def apply_router_edits(model: Any, edits: Mapping[int, RouterEdit]) -> None:
    """edits: by decoder layer, none of them empty. Raises UnsupportedArchitectureError for a layer
    or expert that the model has not, and for a model whose routing cannot be edited so."""
    if not edits:
        return
    live = live_experts(model)
    for layer, edit in edits.items():
        entries = [entry for entry in live.stacks if entry.layer == layer]
        where = f"router edit of layer {layer}"
        if len(entries) != 1:
            raise UnsupportedArchitectureError(
                f"{where}: expected one experts module there, found {len(entries)}"
            )
        entry, n_experts = entries[0], entries[0].stack.n_experts
        named = {*(edit.keep or ()), *edit.alias, *edit.alias.values(), *edit.constants}
        if named and max(named) >= n_experts:
            raise UnsupportedArchitectureError(
                f"{where}: names expert {max(named)}, the model has {n_experts} of them"
            )
        if edit.alias:
            _copy_targets(entry, edit)
        if edit.keep is not None:
            _keep(model, entry, set(range(n_experts)) - set(edit.keep), where)
        if edit.constants:
            _add_constants(entry, edit, where)
    if any(edit.keep is not None or edit.constants for edit in edits.values()):
        model.save_pretrained = _refuse


@torch.no_grad()
def _copy_targets(entry: ExpertsModule, edit: RouterEdit) -> None:
    stack = entry.stack
    for name, parameter in entry.module.named_parameters():
        # Of experts that are loaded when they are needed, biases alone are here.
        if name.endswith("_bias") and len(parameter) == stack.n_experts:
            for expert, target in edit.alias.items():
                parameter[expert] = parameter[target]
    for role in stack.places:
        if stack.on_meta(role):
            continue
        for expert, target in edit.alias.items():
            stack.view(role, expert).copy_(stack.view(role, target))


def _refuse(*_: Any, **__: Any) -> None:
    raise StoreError(
        "save_pretrained: the routing of this model is edited (experts are never chosen, or put "
        "out constants), which no ordinary checkpoint can say; copy the store instead"
    )


@contextmanager
def left_out(router: nn.Module, numbers: Sequence[int], n_experts: int) -> Iterator[None]:
    """Inside, the router chooses none of these experts, as with `keep`."""
    inner, undo = _leave_out(router, list(numbers), n_experts)
    try:
        yield
    finally:
        router.forward = inner
        undo()


def _leave_out(
    router: nn.Module, numbers: list[int], n_experts: int
) -> tuple[Callable[..., Any], Callable[[], None]]:
    """From now on. Returns the router's own forward, and what gives its correction back."""
    bias = getattr(router, "e_score_correction_bias", None)
    before = bias.clone() if isinstance(bias, torch.Tensor) else None
    inner: Callable[..., Any] = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Without(numbers, n_experts):
            return inner(*args, **kwargs)

    def undo() -> None:
        if isinstance(bias, torch.Tensor) and before is not None:
            with torch.no_grad():
                bias.copy_(before)

    router.forward = forward
    if isinstance(bias, torch.Tensor):
        with torch.no_grad():
            bias[numbers] = -torch.inf
    return inner, undo


def _keep(model: Any, entry: ExpertsModule, dropped: set[int], where: str) -> None:
    router = router_of(model, entry.stack.name)
    if router is None:
        raise UnsupportedArchitectureError(f"{where}: no router beside {entry.stack.name}")
    _leave_out(router, sorted(dropped), entry.stack.n_experts)
    weight = next((p for p in router.parameters() if p.dim() == 2), None)
    if weight is None or weight.device.type == "meta":
        return  # offloaded: it cannot be tried here
    x = torch.randn(_TRIED, weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        top_k = top_k_of(model.config.to_dict())
        choose = find_routers(model, {entry.layer: entry.stack.name}, top_k)[entry.layer]
        chosen = set(choose(x).flatten().tolist())
    if not chosen or chosen & dropped:
        raise UnsupportedArchitectureError(
            f"{where}: {type(router).__name__} still chooses experts that it should not "
            f"({sorted(chosen & dropped)[:5] or 'it cannot be called on its own'})"
        )


class _Without(TorchFunctionMode):
    """Inside, every linear map onto one number an expert gives -inf for some, and no mask of groups
    makes that a number again."""

    def __init__(self, dropped: list[int], n_experts: int) -> None:
        super().__init__()
        self._dropped, self._n_experts = dropped, n_experts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        masks = func in _MASKS and out.is_floating_point() and out.dim() > 0
        if (func in _LINEAR or masks) and out.shape[-1] == self._n_experts:
            mask = torch.zeros(self._n_experts, dtype=torch.bool, device=out.device)
            mask[self._dropped] = True
            return out.masked_fill(mask, -torch.inf)
        return out


_LINEAR = {nn.functional.linear, torch.matmul, torch.mm, torch.Tensor.matmul}
_MASKS = {torch.masked_fill, torch.Tensor.masked_fill}


def _add_constants(entry: ExpertsModule, edit: RouterEdit, where: str) -> None:
    module, n_experts = entry.module, entry.stack.n_experts
    if not gets_decisions(module) or getattr(module, "has_bias", False):
        raise UnsupportedArchitectureError(
            f"{where}: constants need experts without biases that are called with (hidden_states, "
            f"top_k_index, top_k_weights), which {entry.stack.name} has not"
        )
    width = len(next(iter(edit.constants.values())))
    table = torch.zeros(n_experts, width)
    for expert, vector in edit.constants.items():
        table[expert] = torch.from_numpy(vector.copy())
    by_device: dict[torch.device, torch.Tensor] = {}

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        _, index, weights, *_ = arguments(args, kwargs)
        if output.device not in by_device:
            by_device[output.device] = table.to(output.device)
        vectors = by_device[output.device][index.reshape(-1, index.shape[-1])]
        added = (vectors * weights.reshape(vectors.shape[:-1]).unsqueeze(-1)).sum(-2)
        whole: torch.Tensor = output + added.reshape(output.shape).to(output.dtype)
        return whole

    module.register_forward_hook(hook, with_kwargs=True)
