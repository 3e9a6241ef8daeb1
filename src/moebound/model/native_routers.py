"""Routers of a token or a few: their product by the native kernel, so that a row is a row.

A router is a product and some work on each row of it: a softmax, the largest few. torch's product
has other bits for another number of rows, so texts that read one token each had to be routed one
after the other. It reads the weights with one thread, and families that route in float32 make them
float32 anew for each token.

Here the router's own code runs, of whatever family, and finds in place of torch's `linear` the
native product (`few_rows.py`), and in place of its weight something that only that can read
(`_Weight`). **It is tried out, or it is not used**: with drawn rows the outputs must be those of
before, to rounding, and each row must have the same bits in any number of rows, at any place. A
router whose code does anything else stays as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moebound import _native
from moebound.checkpoint.families import ROUTERS
from moebound.model.few_rows import ROWS, NativeProduct, own_product

_TRIES = 4
"""Drawings of ROWS rows each. Where torch's vectors end somewhere else for another number of rows,
some of the numbers there differ in their last bit."""

_NEAR = 0.05
"""Of the largest number: logits in bfloat16 are rounded to 0.004 of themselves, and may exchange
two experts that are hardly apart."""


class _Other:
    """A module of Python, or a module of torch, with some of its members exchanged."""

    def __init__(self, of: Any, **members: Any) -> None:
        vars(self).update(members, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


class _Weight:
    """A router's weight as its own code has it: `linear` takes it in whatever dtype rows have."""

    def __init__(self, router: nn.Module) -> None:
        self._router = router

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._router.weight.dtype  # type: ignore[assignment]
        return found

    def to(self, *_: Any, **__: Any) -> _Weight:
        return self

    type = to
    float = to


class NativeRouter(NativeProduct):
    """The `forward` of a router: up to ROWS rows of it by the native product, all else by what it
    was before. Raises AttributeError and TypeError where its code is not what is described above,
    at once or when it is called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._before = module.forward
        self._own = _with_linear(type(module).forward, self._linear)
        self._seen = _Other(module, weight=_Weight(module))

    def __call__(self, x: torch.Tensor, *args: Any, **given: Any) -> Any:
        if not self.takes(x):
            return self._before(x, *args, **given)
        return self._own(self._seen, x, *args, **given)

    def _linear(self, x: torch.Tensor, weight: _Weight, bias: Any = None) -> torch.Tensor:
        if not isinstance(weight, _Weight) or bias is not getattr(self._module, "bias", None):
            raise TypeError("a router that multiplies by other weights than its own")
        with torch._C.DisableTorchFunction():  # it is one operation to those who listen
            return own_product(self, x, self._module.weight, bias)

    def try_out(self, given: Mapping[str, Any]) -> bool:
        """Whether outputs are those of before, and each row's the same in any company, as is all
        that comes before them. given: what its block calls it with beside rows."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(_TRIES):
            x = torch.randn((ROWS, self.width), generator=generator).to(torch.bfloat16)
            outputs, whole = self._steps(x, given)
            if not _near(outputs, _tensors(self._before(x, **given))):
                return False
            for n in range(1, ROWS):
                for first in range(0, ROWS - n + 1, n):
                    part = slice(first, first + n)
                    found, steps = self._steps(x[part], given)
                    if len(steps) != len(whole):
                        return False
                    if not all(_same_rows(*pair, part) for pair in zip(steps, whole, strict=True)):
                        return False
                    if not all(
                        torch.equal(a, b[part]) for a, b in zip(found, outputs, strict=True)
                    ):
                        return False
        return True

    def _steps(
        self, x: torch.Tensor, given: Mapping[str, Any]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        """The outputs, and what every operation on the way to them gives: of all experts, where
        outputs are of the chosen ones alone."""
        with _Listening() as steps:
            found = _tensors(self(x, **given))
        return found, steps.found


class _Listening(TorchFunctionMode):
    """Keeps a copy of what each operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[torch.Tensor]()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        self.found += [some.clone() for some in _tensors(found) if isinstance(some, torch.Tensor)]
        return found


def route_few_rows(model: nn.Module) -> int:
    """Have the routers of a model on the CPU compute few rows so, as far as they can be; their
    number. Nothing is done where the kernel has no vector instructions."""
    if _native.isa() == "scalar":
        return 0
    found, good = 0, dict[tuple[Any, ...], bool]()
    with torch.no_grad():
        for module, block in _routers(model):
            kind = type(module), module.weight.shape, module.weight.dtype
            try:
                router = NativeRouter(module)
                if kind not in good:
                    good[kind] = router.applies and router.try_out(_given(module, block))
            except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
                good[kind] = False  # its code does something else
            if good[kind]:
                module.forward = router
                found += 1
    return found


def _routers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each with the block that it is part of."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        block, _, own_name = name.rpartition(".")
        if (
            own_name in ROUTERS
            and not isinstance(module, nn.Linear)
            and "forward" not in vars(module)
            and isinstance(weight, torch.Tensor)
            and weight.dim() == 2
            and not weight.is_meta
        ):
            yield module, model.get_submodule(block)


def _given(router: nn.Module, block: nn.Module) -> dict[str, Any]:
    """What a router takes beside rows, as biases that are its block's."""
    names = list(inspect.signature(type(router).forward).parameters)[2:]
    return {name: getattr(block, name) for name in names if hasattr(block, name)}


def _with_linear(forward: Any, linear: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """The same function with another `torch.nn.functional.linear`."""
    functional = _Other(torch.nn.functional, linear=linear)
    others = {torch.nn.functional: functional, torch.nn: _Other(torch.nn, functional=functional)}
    seen = {
        name: others.get(value, value) if isinstance(value, ModuleType) else value
        for name, value in forward.__globals__.items()
    }
    found = FunctionType(
        forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__
    )
    found.__kwdefaults__ = forward.__kwdefaults__
    return found


def _tensors(output: Any) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _same_rows(some: torch.Tensor, whole: torch.Tensor, part: slice) -> bool:
    """Whether these are the same rows of a step; of one that has no row for each, its shape."""
    if some.dim() == 0 or whole.dim() == 0 or whole.shape[0] != ROWS:
        return some.dim() == whole.dim()
    return torch.equal(some, whole[part])


def _near(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    """Whether these are the same up to rounding, and which of a row's experts stands where."""
    for a, b in zip(some, others, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.is_floating_point():
            (a, _), (b, _) = a.float().sort(-1), b.float().sort(-1)
            if not torch.allclose(a, b, rtol=0, atol=_NEAR * float(b.abs().max())):
                return False
    return True
