"""A decode on its way: what is copied and allocated for it, its kernels, and what they found.

Three kernels: tables are expanded from frequencies, segments are decoded, patches laid over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moebound.codec.arrays import to_torch
from moebound.codec.device import metadata
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


class PreparedDecode:
    """A plan with its tensors, ready to run; it may run again. Made by `DecodePlan.prepare`.

    Everything it allocates belongs to the stream that was current then; run it on the same one.
    """

    def __init__(
        self,
        plan: DecodePlan,
        compressed: torch.Tensor,
        outs: Sequence[torch.Tensor],
        *,
        together: int = 1,
        ahead: bool = True,
    ) -> None:
        import torch

        self.plan, self.compressed, self.outs = plan, compressed, tuple(outs)
        self.together, self.ahead = together, ahead
        self._ballot = compressed.device.type == "cuda" and together == 1
        device, numbers = compressed.device, plan.metadata
        self._kernels = kernels(device).decode_kernel if len(numbers.owners) else None
        self._sections = _sections_on(device, plan)
        addresses = torch.tensor([out.data_ptr() for out in outs], dtype=torch.int64)
        if device.type == "cuda":
            addresses = addresses.pin_memory().to(device, non_blocking=True)
        self._addresses = addresses
        self._tables = torch.empty(numbers.n_slots, dtype=torch.uint32, device=device)
        self._status = torch.empty(len(numbers.owners), dtype=torch.int32, device=device)

    def run(self) -> Launched:
        """Enqueue everything on the current stream."""
        import torch

        for stream, out in zip(self.plan.streams, self.outs, strict=True):
            if stream.decoded is not None:
                out.view(-1).copy_(to_torch(stream.decoded))
        self.expand()
        self.decode()
        self.patch()
        if self.compressed.device.type != "cuda":
            return Launched(self.plan, self._status, None)
        status = self._status.to("cpu", non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Launched(self.plan, status, event)

    def expand(self) -> None:
        """Expand the tables."""
        if self._kernels is not None:
            self._kernels.expand_tables[self.plan.metadata.n_tables, _MOST_SLOTS // _SLOTS](
                self._sections["tables"],
                self._sections["cumulative"],
                self._tables,
                BLOCK=_SLOTS,
                num_warps=4,
            )

    def decode(self) -> None:
        """Decode all segments; the tables must be there."""
        for part in self.plan.metadata.parts:
            assert self._kernels is not None
            first, last = part.segments
            self._kernels.decode_segments[-(-(last - first) // self.together),](
                self.compressed,
                self._sections["segments"],
                self._sections["arrays"],
                self._addresses,
                self._sections["classes"],
                self._tables,
                self._sections["values16" if part.item == 2 else "values32"],
                self._status,
                first,
                last,
                ITEM=part.item,
                LOW_BITS=part.low_bits,
                CLASSES=part.classes,
                EXACT=part.exact,
                ALIGNED=self.plan.aligned,
                BALLOT=self._ballot,
                AHEAD=self._ballot and self.ahead,
                SEGMENTS=self.together,
                num_warps=self.together,
            )

    def patch(self) -> None:
        """Lay the patches over what was decoded."""
        for part in self.plan.metadata.parts:
            first, last = part.patches
            if last > first:
                assert self._kernels is not None
                self._kernels.lay_patches[-(-(last - first) // _PATCHES),](
                    self._sections["positions"],
                    self._sections["owners"],
                    self._sections["patches"],
                    self._addresses,
                    first,
                    last,
                    ITEM=part.item,
                    BLOCK=_PATCHES,
                    num_warps=4,
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


def _sections_on(device: torch.device, plan: DecodePlan) -> dict[str, torch.Tensor]:
    """The metadata on the device, copied there once, from pinned memory."""
    import torch

    if device not in plan.on_device:
        block = torch.from_numpy(plan.metadata.block)
        if device.type == "cuda":
            block = block.pin_memory().to(device, non_blocking=True)
        plan.on_device[device] = block
    block = plan.on_device[device]
    return {
        name: block[begin:end].view(getattr(torch, metadata.DTYPES[name]))
        for name, (begin, end) in plan.metadata.sections.items()
    }
