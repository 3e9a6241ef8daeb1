"""Linear layers in bfloat16, of one token or a few: by all threads, in moebound's order of sums.

A product with one row takes as long as reading its weights. torch's reads them with one thread, and
slower than memory gives them: of a token of an offloaded model whose experts are all in memory,
half of the time went there (docs/offload.md, "Where a token spends its time"). The native product
(native/product/) shares the rows of the matrix among threads, sums in float32 in one order, and
rounds once: so a row's result depends on no threads, no instruction set and no other row. It
differs from torch's by float rounding.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from moebound import _native
from moebound.errors import CacheError
from moebound.types import Array

ROWS = 8
"""Up to so many; torch's instructions for bfloat16 pay from more on."""

LEAST_WEIGHTS = 1 << 16
"""Smaller layers are left to torch: the call is what takes time."""

WORK_PER_THREAD = 1 << 20
"""Multiplications that are worth a thread: 0.1 ms where one takes a byte or two from memory."""

MANY_ROWS = 24
"""From so many rows of bfloat16 on, where the processor multiplies it, codes are written out as
weights once and torch's product taken: at 64 rows of a [1408, 2048] matrix 1.7 ms, not 3.2
(bench/codes.py)."""
HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and bool(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn._is_mkldnn_bf16_supported()
)

_NO_BIAS = np.empty(0, np.uint16)


def threads_for(multiplications: int) -> int:
    """How many of torch's threads are worth waking."""
    return max(1, min(torch.get_num_threads(), multiplications // WORK_PER_THREAD))


def many(rows: int, dtype: torch.dtype) -> bool:
    """Whether rows are so many that torch multiplies codes' weights faster."""
    return rows >= MANY_ROWS and dtype == torch.bfloat16 and HAS_BFLOAT16


def flat(tensor: torch.Tensor) -> Any:
    """As the kernel takes it: a flat array of the same memory, bfloat16 as uint16 bits."""
    found = tensor.reshape(-1)
    if found.dtype == torch.bfloat16:
        found = found.view(torch.uint16)
    return found.numpy()


class OwnProduct(Protocol):
    """A linear layer whose product is moebound's own."""

    def product(self, x: torch.Tensor) -> torch.Tensor: ...

    def decoded(self) -> torch.Tensor:
        """The weight, [out, in]."""
        ...


def own_product(
    layer: OwnProduct, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """`layer.product(x)`, that backward can go through. weight: None for one that has none to give
    a gradient to."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    ):
        return _Linear.apply(x, weight, bias, layer)  # type: ignore[no-any-return, no-untyped-call]
    return layer.product(x)


class NativeProduct:
    """Products of a module's own weight, [out, in] in bfloat16, and its bias where it has one."""

    def __init__(self, module: nn.Module) -> None:
        weight: Any = module.weight
        self._module: Any = module
        self.width: int = weight.shape[1]
        self._weights: tuple[int, Array] | None = None

    def takes(self, x: torch.Tensor) -> bool:
        """Whether rows [..., in] are computed here: up to ROWS of bfloat16."""
        return (
            not watched()
            and 0 < x.numel() <= ROWS * self.width
            and x.shape[-1] == self.width
            and x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and self.applies
        )

    @property
    def applies(self) -> bool:
        """Whether few rows are computed here: not once the model was cast or moved."""
        weight, bias = self._module.weight, getattr(self._module, "bias", None)
        return (
            weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and (bias is None or bias.dtype == torch.bfloat16)
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in], bfloat16 or float32. Returns [..., out] in x's dtype."""
        rows, columns = self._module.weight.shape
        out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
        bias = getattr(self._module, "bias", None)
        _native.linear(
            self._flat_weights(), _NO_BIAS if bias is None else flat(bias.detach()),
            flat(x.detach()), flat(out), columns, threads_for(x.numel() * rows),
        )  # fmt: skip
        return out

    def decoded(self) -> torch.Tensor:
        found: torch.Tensor = self._module.weight
        return found

    def _flat_weights(self) -> Array:
        """Made once, and again when the layer has other memory. What is kept holds that memory, so
        that no other can have its address."""
        weight = self._module.weight
        place = weight.data_ptr()
        if self._weights is None or self._weights[0] != place:
            self._weights = place, flat(weight.detach())
        return self._weights[1]


class NativeLinear(NativeProduct):
    """The `forward` of a linear layer: up to ROWS rows of bfloat16 by the native product, all else
    by what it was before."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self._before = module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.takes(x):
            return self._before(x)
        return own_product(self, x, self._module.weight, self._module.bias)


def watched() -> bool:
    """Whether torch records operations otherwise than for `backward`: it cannot see this one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def refuse_watchers(what: str) -> None:
    """Raises CacheError where torch would record a product that it cannot see."""
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        raise CacheError(
            f"{what}: torch.jit.trace and torch.func cannot see a product of codes; call the model "
            "itself, and backward() for gradients"
        )


class _Linear(torch.autograd.Function):
    """The product of a layer, recorded. Without a weight, that is decoded when backward comes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        layer: OwnProduct,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased, ctx.layer = bias is not None, layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ (ctx.layer.decoded() if weight is None else weight).to(grad)
            if needs_x
            else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if ctx.biased and needs_bias else None,
            None,
        )


def multiply_few_rows(model: nn.Module) -> int:
    """Have the linear layers of a model on the CPU compute few rows so; the number of layers.
    Layers whose forward pass is another's already, and those on other devices, stay as they are.
    Nothing is done where the kernel has no vector instructions."""
    if _native.isa() == "scalar":
        return 0
    found = 0
    for module in model.modules():
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        if module.weight.device.type == "cpu" and module.weight.numel() >= LEAST_WEIGHTS:
            module.forward = NativeLinear(module)  # type: ignore[method-assign, assignment]
            found += 1
    return found
