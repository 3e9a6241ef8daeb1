"""Linear layers that compute from codes of their weight, a byte or four bits, and have no weight.

`CodeLinear` takes the place of a linear layer before its weight is loaded (`skeleton.py`), and gets
the codes behind (`offload/linears.py`). Its products are those of slots of codes: in float32, in
one order, the same for any number of threads and any other rows. Many rows of bfloat16 are torch's
product of weights that are written out, a part of the matrix at a time.

Like an expert that stays compressed, the weight is no parameter: it has no gradient, a state dict
decodes it, and what would need it otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import nn
from torch.nn.functional import linear

from moebound.codec.arrays import torch_dtype
from moebound.codec.codes import CodeMatrix
from moebound.errors import CacheError
from moebound.model import few_rows
from moebound.model.few_rows import flat, own_product, refuse_watchers, threads_for

BLOCK_WEIGHTS = 1 << 22
"""So many are written out at a time: 8 MB. Of fewer, torch's products are too small."""

_INSTEAD = (
    "a linear layer of a model from moebound.load(linears='codes') has codes in place of its "
    "weight; .decoded() computes it, and linears='values' loads layers that have one"
)


class NoValues:
    """In place of a weight: its dtype, its device and its shape. Raises CacheError for all else."""

    def __init__(self, layer: CodeLinear) -> None:
        self._source = layer.source
        self.dtype, self.device = layer.dtype, torch.device("cpu")
        self.shape = torch.Size([layer.out_features, layer.in_features])
        self.ndim, self.is_meta, self.requires_grad = 2, False, False

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __getattr__(self, name: str) -> Never:
        if name.startswith("__"):  # what Python looks for by itself
            raise AttributeError(name)
        raise CacheError(f"{self._source}: .{name}: {_INSTEAD}")

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Never:
        given = [*args, *(kwargs or {}).values()]
        source = next((some._source for some in given if isinstance(some, cls)), "a weight")
        raise CacheError(f"{source}: {getattr(function, '__name__', function)}: {_INSTEAD}")


class CodeLinear(nn.Linear):
    """In place of `of`, whose weight is left behind; a bias is kept. source: the tensor that holds
    the weight. dtype: of the weight, as `of` would have it. matrix: set once the codes are there.
    """

    def __init__(self, of: nn.Linear, source: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.register_parameter("bias", of.bias)
        self.source, self.dtype = source, of.weight.dtype
        self.matrix: CodeMatrix | None = None
        self._is_hf_initialized = True  # there is no weight that transformers could draw
        self.train(of.training)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """What is known without values; models ask for the dtype of a layer by it."""
        return NoValues(self)

    @property
    def n_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def n_bytes(self) -> int:
        """Memory in place of the weight."""
        return 0 if self.matrix is None else self.matrix.codes.nbytes + self.matrix.aside_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_watchers(self.source)
        return own_product(self, x, None, self.bias)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out] in x's dtype; nothing is recorded for `backward`."""
        rows, columns = self.out_features, self.in_features
        if x.shape[-1] != columns:
            raise ValueError(f"{self.source}: rows of {x.shape[-1]} values, expected {columns}")
        inputs = x.detach().reshape(-1, columns).contiguous()
        if few_rows.many(len(inputs), x.dtype):
            parts = [linear(inputs, weights) for weights in self._blocks(x.dtype)]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        else:
            out = torch.empty((len(inputs), rows), dtype=x.dtype)
            threads = threads_for(len(inputs) * rows * columns)
            self._codes().product(flat(inputs), flat(out), stride=rows, threads=threads)
        if self.bias is not None:
            out += self.bias.detach()
        return out.view(*x.shape[:-1], rows)

    def decoded(self) -> torch.Tensor:
        """The weight, [out, in]: to the bit that of the decompressed checkpoint, in `dtype`."""
        return torch.cat(list(self._blocks(self.dtype)))

    def _blocks(self, dtype: torch.dtype) -> Any:
        """The weight, some rows at a time."""
        matrix, step = self._codes(), max(1, BLOCK_WEIGHTS // self.in_features)
        for first in range(0, self.out_features, step):
            end = min(first + step, self.out_features)
            threads = threads_for((end - first) * self.in_features)
            some = torch.from_numpy(matrix.weights(first, end, threads=threads))
            yield some.view(torch_dtype(matrix.dtype)).to(dtype)

    def _codes(self) -> CodeMatrix:
        if self.matrix is None:
            raise CacheError(f"{self.source}: its codes have not been read")
        return self.matrix

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What `to`, `half`, `cuda` and the like end in: codes compute in whatever dtype rows have,
        and stay where they are."""
        after = fn(torch.empty(0, dtype=self.dtype))
        if after.device.type != "cpu":
            raise CacheError(
                f"to({str(after.device)!r}): {self.source} stays on the CPU: {_INSTEAD}"
            )
        self.dtype = after.dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.matrix is not None:
            destination[f"{prefix}weight"] = self.decoded()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            raise CacheError(f"load_state_dict: {prefix}weight: {_INSTEAD}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, _: Any) -> Never:
        raise CacheError(f"deepcopy: {self.source}: {_INSTEAD}")

    def __reduce_ex__(self, _: Any) -> Never:
        raise CacheError(f"pickle: {self.source}: {_INSTEAD}")


def bytes_in_codes(model: nn.Module) -> int:
    """Memory of all codes of linear layers, which a token reads too."""
    return sum(some.n_bytes for some in model.modules() if isinstance(some, CodeLinear))


def tied_weights(model: Any) -> set[str]:
    """Names of a transformers model's parameters that are one with another."""
    return {name for pair in model.all_tied_weights_keys.items() for name in pair}
