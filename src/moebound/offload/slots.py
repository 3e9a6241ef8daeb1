"""Memory for decoded experts, in the layout that the model's experts modules compute with.

A `Slot` holds one expert, parameter by parameter, each shaped as one slice of the module's own:
`gate_up_proj` [2I, H], `down_proj` [H, I] (or transposed, as the family has it). A `CodeSlot` holds
codes instead, a byte or four bits a weight, and computes from those. A `SlotPool` hands slots out
and takes them back, so that after a while no memory is asked for any more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from moebound.checkpoint import Role, read_into
from moebound.codec.arrays import to_numpy, to_torch, torch_dtype, will_be_written
from moebound.codec.codes import Bits, CodeMatrix, Product, code_bytes, products
from moebound.errors import CorruptionError
from moebound.methods import FindPart
from moebound.model.few_rows import flat, many, own_product, threads_for
from moebound.offload.entries import DiskEntry, DiskMatrix
from moebound.offload.meter import Load
from moebound.types import Array


@dataclass(frozen=True)
class SlotKind:
    """How experts of some modules lie in memory.

    shapes: of one expert, by parameter, first the projection(s) into the expert, then `down_proj`.
    gated: gate and up share `gate_up_proj`. transposed, interleaved: as the module has it.
    aside_bytes: of slots of codes, the most that stands beside the codes; None for
    slots of values. bits: of a code.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype
    gated: bool
    transposed: bool
    interleaved: bool
    aside_bytes: int | None = None
    bits: Bits = 8

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> SlotKind:
        """Of an experts module, whose parameters may be on `meta`."""
        gated = bool(module.has_gate)
        names = ("gate_up_proj" if gated else "up_proj", "down_proj")
        return cls(
            tuple((name, tuple(getattr(module, name).shape[1:])) for name in names),
            dtype,
            gated,
            bool(module.is_transposed),
            gated and not module.is_concatenated,
        )

    @property
    def n_weights(self) -> int:
        """Of one expert."""
        return sum(torch.Size(shape).numel() for _, shape in self.shapes)

    @property
    def n_bytes(self) -> int:
        """The same."""
        if self.aside_bytes is not None:
            codes = sum(code_bytes((s[0], s[1]), self.bits) for _, s in self.shapes)
            return codes + self.aside_bytes
        return self.n_weights * self.dtype.itemsize

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of a parameter, in weights."""
        return dict(self.shapes)[name]

    def room(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Memory for one expert, by parameter."""
        if self.aside_bytes is None:
            made, dtype = dict(self.shapes), self.dtype
        else:
            made = {name: (s[0], code_bytes((1, s[1]), self.bits)) for name, s in self.shapes}
            dtype = torch.uint8
        return {
            name: torch.empty(shape, dtype=dtype, device=device) for name, shape in made.items()
        }

    def empty(self, device: torch.device) -> Slot:
        """A slot of this kind, of no pool."""
        if self.aside_bytes is None:
            return Slot(self, self.room(device))
        return CodeSlot(self, self.room(device))


@dataclass(eq=False)
class Slot:
    """Room for one expert. weights: by parameter. load: what loading it took.

    used: on a GPU, when the last computation with them will have ended.
    """

    kind: SlotKind
    weights: dict[str, torch.Tensor]
    load: Load | None = None
    used: torch.cuda.Event | None = None
    _arrays: dict[tuple[object, ...], Array | None] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def first(self) -> torch.Tensor:
        """`gate_up_proj`, or `up_proj` of experts without gate."""
        return self.weights[self.kind.shapes[0][0]]

    @property
    def down(self) -> torch.Tensor:
        return self.weights["down_proj"]

    def copy(self) -> Slot:
        """The same weights in memory of their own, which no pool knows."""
        return Slot(self.kind, {name: weights.clone() for name, weights in self.weights.items()})

    def zero(self) -> None:
        """Weights of 0, to measure with."""
        for weights in self.weights.values():
            weights.zero_()

    def begin(self) -> None:
        """Another expert will be put here."""
        will_be_written(self.weights.values())

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x times a parameter's transpose, as a linear layer: [T, in] to [T, out]."""
        weights = self.weights[name]
        return linear(x, weights.t() if self.kind.transposed else weights)

    def decoded(self) -> dict[str, torch.Tensor]:
        """The weights, by parameter."""
        return self.weights

    def after_use(self) -> None:
        """What overwrites the weights will wait for what has been computed until now."""
        if self.down.device.type == "cuda":
            self.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.used.record()

    def whole(self, part: DiskMatrix) -> torch.Tensor | None:
        """The memory that this part's weights fill exactly as they are on disk, if there is any."""
        target = self.place(part)
        return target if target is not None and target.dtype == torch_dtype(part.dtype) else None

    def array(self, part: DiskMatrix) -> Array | None:
        """`whole(part)` on a CPU as an array, looked for once. Who writes there calls `begin`."""
        layout = part.layout
        alike = part.role, part.shape, part.dtype, layout.transposed, layout.interleaved
        if alike not in self._arrays:
            self._arrays[alike] = self._array(part)
        return self._arrays[alike]

    def _array(self, part: DiskMatrix) -> Array | None:
        target = self.whole(part)
        return None if target is None else to_numpy(target)

    def place(self, part: DiskMatrix) -> torch.Tensor | None:
        """The same, whatever the dtype."""
        kind, target = self.kind, None
        transposed = _transposed(part, self)
        if part.role in ("gate", "up") and kind.gated:
            if not (transposed or kind.transposed or kind.interleaved):
                half = self.first.shape[0] // 2
                target = self.first[:half] if part.role == "gate" else self.first[half:]
        elif transposed == kind.transposed and (
            part.role != "gate_up" or part.layout.interleaved == kind.interleaved
        ):
            target = self.down if part.role == "down" else self.first
        if target is None:
            return None
        fits = target.is_contiguous() and target.shape == self._room_of(part)
        return target if fits else None

    def _room_of(self, part: DiskMatrix) -> tuple[int, int]:
        """Rows, and what one takes in this memory."""
        return part.shape

    def put(self, part: DiskMatrix, weights: torch.Tensor, *, non_blocking: bool = False) -> None:
        """Copy the weights of a part, as on disk, to where they belong. Casts.

        Raises CorruptionError for a shape that this expert does not have.
        """
        matrix = weights.mT if _transposed(part, self) else weights
        roles: tuple[tuple[Role, torch.Tensor], ...]
        if part.role != "gate_up":
            roles = ((part.role, matrix),)
        elif part.layout.interleaved:
            roles = (("gate", matrix[0::2]), ("up", matrix[1::2]))
        else:
            half = matrix.shape[0] // 2
            roles = (("gate", matrix[:half]), ("up", matrix[half:]))
        for role, values in roles:
            target = self._view(role)
            if target.shape != values.shape:
                raise CorruptionError(
                    f"tensor {part.name!r}: {role} projection of shape {list(values.shape)}, the "
                    f"model expects {list(target.shape)}"
                )
            target.copy_(values, non_blocking=non_blocking)

    def _view(self, role: Role) -> torch.Tensor:
        """One projection as [out, in]."""
        kind = self.kind
        matrix = self.down if role == "down" else self.first
        matrix = matrix.mT if kind.transposed else matrix
        if role == "down" or not kind.gated:
            return matrix
        if kind.interleaved:
            return matrix[0::2] if role == "gate" else matrix[1::2]
        half = matrix.shape[0] // 2
        return matrix[:half] if role == "gate" else matrix[half:]


@dataclass(eq=False)
class CodeSlot(Slot):
    """weights: the codes, uint8, by parameter: [out, in], or, of four bits each, [out, ⌈in / 2⌉].
    parts: what they stand for, by parameter and first row of the matrices that it is made of."""

    parts: dict[tuple[str, int], CodeMatrix] = field(default_factory=dict)

    def begin(self) -> None:
        self.parts.clear()  # autograd keeps no codes, and is told nothing

    def _array(self, part: DiskMatrix) -> Array | None:
        target = self.place(part)
        return None if target is None else flat(target)

    def _room_of(self, part: DiskMatrix) -> tuple[int, int]:
        return part.shape[0], code_bytes((1, part.shape[1]), self.kind.bits)

    def zero(self) -> None:
        super().zero()
        none, bits = np.empty(0, np.float32), self.kind.bits
        for name, (rows, columns) in self.kind.shapes:
            table = np.zeros(64 if bits == 8 else 16, np.float32)
            self.parts[name, 0] = CodeMatrix(
                flat(self.weights[name]), (rows, columns), "BF16", table, none, False, 0,
                np.empty(0, np.uint32), none, bits=bits,
            )  # fmt: skip

    def copy(self) -> CodeSlot:
        codes = {name: some.clone() for name, some in self.weights.items()}
        return CodeSlot(
            self.kind,
            codes,
            parts={
                (name, first): part.copy(flat(codes[name][first : first + part.shape[0]]))
                for (name, first), part in self.parts.items()
            },
        )

    def fill_codes(self, part: DiskMatrix, data: memoryview, *, threads: int) -> None:
        """Decode a part's bytes. Raises FormatError or CorruptionError, naming file and tensor,
        also for more beside the codes than there is room for."""
        codes = self.array(part)
        assert codes is not None  # as `code_kinds` found
        assert part.stored is not None
        name = "down_proj" if part.role == "down" else self.kind.shapes[0][0]
        first = self.first.shape[0] // 2 if part.role == "up" and self.kind.gated else 0
        bits, room = self.kind.bits, self.kind.aside_bytes or 0
        found = part.stored.decode_codes(data, codes, bits=bits, threads=threads)
        self.parts[name, first] = found
        if sum(some.aside_bytes for some in self.parts.values()) > room:
            raise CorruptionError(
                f"{part.stored.tensor.file}: tensor {part.name!r}: {len(found.patched)} weights "
                "stand beside its codes, more than its head allows"
            )

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x times a parameter's transpose: [T, in] to [T, out], in x's dtype."""
        return own_product(_Parameter(self, name), x, None, None)

    def decoded(self) -> dict[str, torch.Tensor]:
        return {name: self._values(name) for name, _ in self.kind.shapes}

    def _product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.kind.shape_of(name)
        x = x.detach().contiguous()
        if many(len(x), x.dtype):
            return linear(x, self._values(name))
        out = torch.empty((len(x), rows), dtype=x.dtype)
        products(
            [Product(part, 0, len(x), first, rows) for first, part in self.parts_of(name)],
            flat(x),
            flat(out),
            threads=threads_for(len(x) * rows * columns),
        )
        return out

    def _values(self, name: str) -> torch.Tensor:
        values = torch.empty(self.kind.shape_of(name), dtype=self.kind.dtype)
        for first, part in self.parts_of(name):
            some = torch.from_numpy(part.weights())
            if part.dtype == "BF16":
                some = some.view(torch.bfloat16)
            values[first : first + len(some)] = some
        return values

    def parts_of(self, name: str) -> list[tuple[int, CodeMatrix]]:
        """The matrices that a parameter is made of, by first row."""
        return [(first, part) for (of, first), part in self.parts.items() if of == name]

    def gate_up_down(self) -> tuple[CodeMatrix, CodeMatrix | None, CodeMatrix]:
        """Of an expert with a gate; up is None where its rows stand behind gate's in one matrix."""
        first, (rows, _) = self.kind.shapes[0]
        up = self.parts.get((first, rows // 2))
        return self.parts[first, 0], up, self.parts["down_proj", 0]


class _Parameter(NamedTuple):
    """A parameter of a slot of codes, as a linear layer: backward goes through it to the
    activations, not to the weights."""

    slot: CodeSlot
    name: str

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.slot._product(self.name, x)

    def decoded(self) -> torch.Tensor:
        return self.slot._values(self.name)


def _transposed(part: DiskMatrix, slot: Slot) -> bool:
    """Whether the part is [in, out] on disk. Where its family has both, the shape tells."""
    if part.layout.transposed is not None:
        return part.layout.transposed
    hidden = slot.down.shape[1 if slot.kind.transposed else 0]
    return part.shape[0 if part.role != "down" else 1] == hidden


def plain_weights(part: DiskMatrix, data: memoryview) -> torch.Tensor:
    """The weights of a part that is not compressed; shares the bytes' memory."""
    return torch.frombuffer(data, dtype=torch_dtype(part.dtype)).view(part.shape)


def fill(
    slot: Slot, part: DiskMatrix, data: memoryview, *, threads: int, shared: FindPart | None = None
) -> None:
    """Decode a part's bytes (or copy its weights) into the slot.

    shared: where parts that several experts share come from; None for the store itself.
    Raises FormatError or CorruptionError, naming file and tensor, for bytes that are damaged or
    hold another shape or dtype than certified.
    """
    if isinstance(slot, CodeSlot):
        slot.fill_codes(part, data, threads=threads)
        return
    if part.stored is None:
        slot.put(part, plain_weights(part, data))
        return
    target = slot.array(part)
    if target is not None:
        part.stored.decode_into(data, target, parts=shared, threads=threads)
    else:
        slot.put(part, to_torch(part.stored.decode(data, parts=shared, threads=threads)))


def read_into_slot(slot: Slot, entry: DiskEntry, *, drop_cache: bool) -> None:
    """Read an expert that is not compressed, without a copy where disk and slot have it alike.

    Raises as `DiskEntry.read` and `Slot.put`.
    """
    for span, part in zip(entry.spans, entry.matrices, strict=True):
        target = slot.whole(part)
        weights = (
            torch.empty(part.shape, dtype=torch_dtype(part.dtype)) if target is None else target
        )
        read_into(span, weights.view(torch.uint8).numpy().data, drop_cache=drop_cache)
        if weights is not target:
            slot.put(part, weights)


class SlotPool:
    """Slots of at most budget_bytes together; made when they are first needed.

    kinds: how the experts of each kind look. device: where the memory is.
    """

    def __init__(self, budget_bytes: int, device: torch.device, kinds: Iterable[SlotKind]) -> None:
        self.budget_bytes = budget_bytes
        self.device = device
        self._free: dict[SlotKind, list[Slot]] = {kind: [] for kind in kinds}
        self.made_bytes = 0
        self.lent_bytes = 0
        self._lock = threading.Lock()

    def take(self, kind: SlotKind) -> Slot:
        """A slot of this kind. The cache has made room for it before, so there always is one."""
        with self._lock:
            if self._free[kind]:
                return self._free[kind].pop()
            self._shrink(kind.n_bytes)
            self.made_bytes += kind.n_bytes
        # Whoever asks may be in inference mode; what is made there could not be overwritten later.
        with torch.inference_mode(False):
            return kind.empty(self.device)

    def give(self, slot: Slot) -> None:
        """Take one back."""
        with self._lock:
            self._free[slot.kind].append(slot)

    def lend(self, n_bytes: int) -> None:
        """So much of the budget is taken by what is no slot; below 0, given back."""
        with self._lock:
            self._shrink(n_bytes)
            self.lent_bytes += n_bytes

    def _shrink(self, n_bytes: int) -> None:
        """What is free makes room: of other kinds, and where memory was lent."""
        for free in self._free.values():
            while free and self.made_bytes + self.lent_bytes + n_bytes > self.budget_bytes:
                self.made_bytes -= free.pop().kind.n_bytes
