"""A decode on its way: what is copied and allocated for it, its kernels, and what they found.

Three kernels: tables are expanded from frequencies, segments are decoded, patches laid over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moebound.codec.arrays import to_torch
from moebound.codec.device.triton_kernels import kernels
from moebound.errors import CorruptionError

if TYPE_CHECKING:
    import torch

    from moebound.codec.device.plan import DecodePlan

_MOST_SLOTS = 1 << 12
_SLOTS, _PATCHES = 1024, 256
"""Of a program."""

_TROUBLES = (
    (1, "a first state below 2^16"),
    (2, "words end early"),
    (4, "words are left over"),
    (8, "a lane does not end as it began"),
)


@dataclass(frozen=True)
class Schedule:
    """How kernels do it; every choice gives the same bits.

    together: segments of a program. On a GPU one is quickest; the interpreter wants many.
    wide: 4 bytes a slot of a table and one look-up, or 1 byte and a second one; None: wide where
        all tables together have MOST_WIDE bytes at most, so that the nearest cache holds them.
    """

    together: int = 1
    wide: bool | None = None


MOST_WIDE = 1 << 16

DEFAULT_SCHEDULE = Schedule()


class PreparedDecode:
    """A plan with its tensors, ready to run; it may run again. Made by `DecodePlan.prepare`.

    Metadata travels on the stream that was current then. Where compressed bytes are copied on a
    stream of their own, prepare there and run on another that waits for them: else the metadata
    would queue up behind the next bytes.
    """

    def __init__(
        self,
        plan: DecodePlan,
        compressed: torch.Tensor,
        outs: Sequence[torch.Tensor],
        schedule: Schedule,
    ) -> None:
        import torch

        self.plan, self.compressed, self.outs, self.schedule = plan, compressed, outs, schedule
        device, numbers = compressed.device, plan.metadata
        self._on_gpu = device.type == "cuda"
        n_segments = len(numbers.owners)
        self._kernels = kernels(device).decode_kernel if n_segments else None
        # One copy, from pinned memory: the metadata with the addresses filled in.
        block = torch.empty(len(numbers.block), dtype=torch.uint8, pin_memory=self._on_gpu)
        filled = block.numpy()
        filled[:] = numbers.block
        begin, end = numbers.sections["addresses"]
        filled[begin:end].view(np.int64)[:] = [out.data_ptr() for out in outs]
        self._block = block.to(device, non_blocking=True)
        self._at = {name: begin for name, (begin, _) in numbers.sections.items()}
        few = 4 * numbers.n_slots <= MOST_WIDE
        self._wide = few if schedule.wide is None else schedule.wide
        slot = torch.uint32 if self._wide else torch.uint8
        self._slots = torch.empty(numbers.n_slots, dtype=slot, device=device)
        self._status = torch.empty(n_segments, dtype=torch.int32, device=device)
        self._found = (
            torch.empty(n_segments, dtype=torch.int32, pin_memory=True)
            if self._on_gpu
            else self._status
        )
        self._stream = torch.cuda.current_stream(device) if self._on_gpu else None

    def run(self) -> Launched:
        """Enqueue everything on the current stream.

        If that is another one than it was prepared on, the caller makes it wait for that one.
        """
        import torch

        if self._on_gpu and torch.cuda.current_stream(self.compressed.device) != self._stream:
            for tensor in (self._block, self._slots, self._status):
                tensor.record_stream(torch.cuda.current_stream(self.compressed.device))
        for stream, out in zip(self.plan.streams, self.outs, strict=True):
            if stream.decoded is not None:
                out.view(-1).copy_(to_torch(stream.decoded))
        if self._kernels is not None:
            self.expand()
            self.decode()
            self.patch()
        if not self._on_gpu:
            return Launched(self.plan, self._status, None)
        self._found.copy_(self._status, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Launched(self.plan, self._found, event)

    def expand(self) -> None:
        """Expand the tables."""
        assert self._kernels is not None
        self._kernels.expand_tables[self.plan.metadata.n_tables, _MOST_SLOTS // _SLOTS](
            self._block,
            self._at["tables"],
            self._at["symbols"],
            self._slots,
            WIDE=self._wide,
            BLOCK=_SLOTS,
            num_warps=4,
            enable_fp_fusion=False,
        )

    def decode(self) -> None:
        """Decode all segments; the tables must be there."""
        assert self._kernels is not None
        at, schedule = self._at, self.schedule
        for part in self.plan.metadata.parts:
            first, last = part.segments
            self._kernels.decode_segments[-(-(last - first) // schedule.together),](
                self.compressed,
                self._block,
                at["segments"],
                at["arrays"],
                at["addresses"],
                at["classes"],
                at["symbols"],
                at["values16" if part.item == 2 else "values32"],
                self._slots,
                self._status,
                first,
                last - first,
                ITEM=part.item,
                LOW_BITS=part.low_bits,
                CLASSES=part.classes,
                EXACT=part.exact,
                ALIGNED=self.plan.aligned,
                WIDE=self._wide,
                BALLOT=self._on_gpu and schedule.together == 1,
                SEGMENTS=schedule.together,
                num_warps=schedule.together,
                enable_fp_fusion=False,
            )

    def patch(self) -> None:
        """Lay the patches over what was decoded."""
        assert self._kernels is not None
        for part in self.plan.metadata.parts:
            first, last = part.patches
            if last > first:
                self._kernels.lay_patches[-(-(last - first) // _PATCHES),](
                    self._block,
                    self._at["positions"],
                    self._at["owners"],
                    self._at["patches"],
                    self._at["addresses"],
                    first,
                    last,
                    ITEM=part.item,
                    BLOCK=_PATCHES,
                    num_warps=4,
                    enable_fp_fusion=False,
                )


@dataclass(frozen=True)
class Launched:
    """A decode that is on its way."""

    plan: DecodePlan
    _status: torch.Tensor
    _event: torch.cuda.Event | None

    @property
    def done(self) -> bool:
        """Whether the device has finished."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Wait, and raise CorruptionError if a segment was damaged. It names the first one."""
        if self._event is not None:
            self._event.synchronize()
        wrong = self._status.numpy()
        damaged = np.flatnonzero(wrong)
        if not len(damaged):
            return
        owners = self.plan.metadata.owners
        first = int(damaged[0])
        i = int(owners[first])
        segment = first - int(np.flatnonzero(owners == i)[0])
        stream = self.plan.streams[i]
        what = ", ".join(text for bit, text in _TROUBLES if wrong[first] & bit)
        raise CorruptionError(
            f"array {i} of {len(self.plan.streams)} (codec {stream.codec!r}, shape "
            f"{stream.spec.shape}): segment {segment} of {np.count_nonzero(owners == i)} is "
            f"damaged: {what}; {len(damaged)} damaged segments in all"
        )
