"""What would need all experts of a model that has none of them: done right, or refused in words.

Experts are no parameters of an offloaded model, nor are weights of linear layers that are codes
(`CodeLinear`, which refuses by itself what one layer is asked for). They are counted from their
shapes, cast when one is computed, and a state dict decodes all of them, if there is memory for
that. Saving, copying, pickling and loading weights of experts would pass over them in silence: they
raise CacheError, before anything has been written or changed. So does every module that has experts
somewhere in it: the model, its base model and its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import nn

from moebound.errors import CacheError
from moebound.model.code_linear import CodeLinear, bytes_in_codes
from moebound.model.live import LiveExperts
from moebound.offload.budget import available_memory
from moebound.offload.loader import Loader
from moebound.offload.offloaded import Choice

INSTEAD = (
    "the experts of a model from moebound.load stay compressed in the store; for an ordinary "
    "checkpoint run `moebound decompress STORE OUT`; to keep or share the model copy the store's "
    "folder; the weights that are no experts are dict(model.named_parameters())"
)

_WHOLE_ONLY = ("save_pretrained", "push_to_hub")
"""Methods of transformers' models that write all weights."""


def guard_whole(model: Any, live: LiveExperts, loader: Loader, choice: Choice) -> None:
    """Make the operations that need all experts right, or an error, on the model and all parts of
    it that have experts."""
    experts = {owner.stack.name: owner.module for owner in live.stacks}
    for name, module in model.named_modules():
        inside = {
            path.removeprefix(name).lstrip("."): owner
            for path, owner in experts.items()
            if path == name or not name or path.startswith(f"{name}.")
        }
        if not inside:
            continue
        vars(module).update(
            __deepcopy__=_refuse_copy,
            __reduce_ex__=_refuse_pickle,
            _replicate_for_data_parallel=_refuse_replicas,
            _apply=_cast(module, inside),
        )
        module.register_state_dict_pre_hook(_check_memory(inside))
        if name in experts:
            module.register_state_dict_post_hook(_add_experts)
        module.register_load_state_dict_pre_hook(_refuse_experts(inside))
        if hasattr(module, "save_pretrained"):  # a model of transformers
            for method in _WHOLE_ONLY:
                if method not in vars(module):  # router edits have words of their own
                    setattr(module, method, _refuse(method))
            module.set_experts_implementation = _refuse_implementation
            module.num_parameters = _counted(module, inside)
            module.get_memory_footprint = _measured(module, loader, choice)


def _refuse(what: str) -> Callable[..., Never]:
    def refuse(*_: Any, **__: Any) -> Never:
        raise CacheError(f"{what}: {INSTEAD}")

    return refuse


def _refuse_copy(*_: Any) -> Never:
    raise CacheError(
        "deepcopy: an offloaded model's experts and threads cannot be copied; call moebound.load "
        "again for another model, or from_pretrained(STORE) for one with all experts in memory"
    )


def _refuse_replicas(*_: Any) -> Never:
    raise CacheError(
        "DataParallel: an offloaded model's experts are on one device, and serve one batch at a "
        "time; call moebound.load in a process for each device"
    )


def _refuse_pickle(*_: Any) -> Never:
    raise CacheError(f"pickle: {INSTEAD}; in another process, call moebound.load there")


def _refuse_implementation(*_: Any, **__: Any) -> Never:
    raise CacheError(
        "set_experts_implementation: the experts of a model from moebound.load are computed by "
        "'moebound' alone, no other has their weights; from_pretrained(STORE) gives a model with "
        "all experts in memory"
    )


def _check_memory(inside: dict[str, nn.Module]) -> Callable[..., None]:
    """A hook that refuses a state dict for which there is no memory."""

    def check(module: nn.Module, *_: Any) -> None:
        layers: list[Any] = [owner.moebound for owner in inside.values()]
        itemsize, device = layers[0].dtype.itemsize, layers[0].device
        need = itemsize * (sum(map(_n_weights, inside.values())) + _n_in_codes(module))
        free = available_memory(device)
        if need > free:
            raise CacheError(
                f"state_dict: what is compressed would take {need} bytes decoded, and {free} are "
                f"free: {INSTEAD}"
            )

    return check


@torch.no_grad()
def _add_experts(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, weights in module.moebound.whole(module).items():
        state[prefix + name] = weights


def _refuse_experts(inside: dict[str, nn.Module]) -> Callable[..., None]:
    """A hook that refuses a state dict with weights of experts, which there is no place for."""

    def refuse(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name, module in inside.items():
            begin = f"{prefix}{name}."
            own = {key for key, _ in module.named_parameters()}
            own |= {key for key, _ in module.named_buffers()}
            for key in state:
                if key.startswith(begin) and key.removeprefix(begin) not in own:
                    raise CacheError(
                        f"load_state_dict: {key!r} is of an expert, and a model from moebound.load "
                        "reads those from its store: compress a checkpoint that has them, and load "
                        "that; a state dict without experts can be loaded"
                    )

    return refuse


def _cast(module: nn.Module, inside: dict[str, nn.Module]) -> Callable[..., Any]:
    """`module._apply`, which `to`, `half`, `float`, `cuda` and the like end in: experts follow to
    another dtype when they are computed, and nowhere else."""
    apply: Callable[..., Any] = module._apply

    def cast(change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        layers: list[Any] = [owner.moebound for owner in inside.values()]
        for layer in layers:
            before = torch.empty(0, dtype=layer.dtype, device=layer.device)
            after = change(before)
            if after.device != before.device:
                raise CacheError(
                    f"to({str(after.device)!r}): the experts of a model from moebound.load stay on "
                    f"{str(before.device)!r}; load it again with device={after.device.type!r}"
                )
            if recurse or module in inside.values():
                layer.dtype = after.dtype
        return apply(change, recurse)

    return cast


def _counted(module: Any, inside: dict[str, nn.Module]) -> Callable[..., int]:
    count = module.num_parameters

    def num_parameters(only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        # No gradient goes into experts.
        if only_trainable:
            return int(count(only_trainable, exclude_embeddings))
        compressed = sum(map(_n_weights, inside.values())) + _n_in_codes(module)
        return int(count(only_trainable, exclude_embeddings)) + compressed

    return num_parameters


def _n_weights(experts: nn.Module) -> int:
    """Of all experts of a module, from the shapes that were left on `meta`."""
    stand_ins = (part for each in experts.modules() for part in vars(each).values())
    return sum(
        part.numel() for part in stand_ins if isinstance(part, torch.Tensor) and part.is_meta
    )


def _n_in_codes(module: nn.Module) -> int:
    """Weights of linear layers that are codes."""
    return sum(some.n_weights for some in module.modules() if isinstance(some, CodeLinear))


def _measured(module: Any, loader: Loader, choice: Choice) -> Callable[..., int]:
    measure = module.get_memory_footprint

    def get_memory_footprint(return_buffers: bool = True) -> int:
        """With the experts that are in memory, decoded and compressed, and codes."""
        held = bytes_in_codes(module) + loader.pool_bytes + choice.held_bytes
        return int(measure(return_buffers)) + held

    return get_memory_footprint
