"""A decode on its way: what is copied and allocated for it, its kernels, and what they found.

Metadata and jobs are on the device, whoever has brought them there.

Three kernels: tables are expanded from frequencies, segments are decoded, patches laid over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moebound.codec.checks import whole
from moebound.codec.device.jobs import Jobs
from moebound.codec.device.metadata import SEGMENTS, Metadata
from moebound.codec.device.triton_kernels import kernels, launch
from moebound.errors import CodecError, CorruptionError

if TYPE_CHECKING:
    import torch

_SLOTS, _PATCHES = 1024, 256
"""Of a program."""

_MOST_SLOTS = 1 << 12
"""Of a table."""

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

    def __post_init__(self) -> None:
        if whole(self.together, "together", 1, 32).bit_count() != 1:
            raise CodecError(f"together {self.together}: expected a power of 2")

    def is_wide(self, n_slots: int) -> bool:
        """The form of so many slots."""
        few = slot_bytes(True) * n_slots <= MOST_WIDE
        return few if self.wide is None else self.wide


MOST_WIDE = 1 << 16

MOST_PLACES = 1 << 26
"""Of status words, 4 bytes each: every array has as many as the one of most segments, so that few
bytes in many arrays would take room by their square."""

DEFAULT_SCHEDULE = Schedule()


@dataclass(frozen=True)
class OnDevice:
    """block: the metadata's, on the device."""

    metadata: Metadata
    block: torch.Tensor


def slot_bytes(wide: bool) -> int:
    """Of a table's slot."""
    return 4 if wide else 1


@dataclass(frozen=True)
class Tables:
    """slots: expanded tables on the device. wide: their form."""

    slots: torch.Tensor
    wide: bool

    @classmethod
    def empty(cls, n_slots: int, wide: bool, device: torch.device) -> Tables:
        """Room for so many slots."""
        import torch

        dtype = torch.uint32 if wide else torch.uint8
        return cls(torch.empty(n_slots, dtype=dtype, device=device), wide)


def expand(known: OnDevice, jobs: Jobs, jobs_there: torch.Tensor, tables: Tables) -> None:
    """Expand the tables of these jobs, each to its first slot, on the current stream."""
    at, device = known.metadata.sections, known.block.device
    block = _SLOTS if device.type == "cuda" else _MOST_SLOTS  # the interpreter wants few programs
    blocks = _MOST_SLOTS // block
    launch(
        kernels(device).decode_kernel.expand_tables,
        (jobs.tables * blocks, len(jobs)),
        (known.block, jobs_there, tables.slots),
        (at["arrays"], at["symbols"]),
        {"WIDE": tables.wide, "BLOCK": block, "BLOCKS": blocks},
        num_warps=4,
    )


class PreparedDecode:
    """Jobs with their tensors, ready to run; it may run again. Made by `DecodeBatch.prepare`.

    jobs_there: `jobs.numbers` on the device, with the addresses of the destinations: whoever made
    them has checked that these are memory to be written. tables: those of all jobs, where they are
    expanded already; None to expand them anew.

    What was copied for it travels on the stream that was current then. Where compressed bytes are
    copied on a stream of their own, prepare there and run on another that waits for them: else the
    metadata would queue up behind the next bytes.
    """

    def __init__(
        self,
        known: OnDevice,
        jobs: Jobs,
        jobs_there: torch.Tensor,
        compressed: torch.Tensor,
        schedule: Schedule,
        tables: Tables | None = None,
    ) -> None:
        import torch

        n_places = len(jobs) * jobs.segments
        if n_places > MOST_PLACES or len(known.metadata.block) >= 1 << 31:
            raise CodecError(
                f"{len(jobs)} arrays of up to {jobs.segments} segments, "
                f"{len(known.metadata.block)} bytes of metadata: too many for one launch; split it"
            )
        self.known, self.jobs, self.compressed, self.schedule = known, jobs, compressed, schedule
        self._jobs_there = jobs_there
        device = compressed.device
        self._on_gpu = device.type == "cuda"
        self._kernels = kernels(device).decode_kernel if len(jobs) else None
        self._expanded = tables is not None
        self._tables = tables or Tables.empty(jobs.n_slots, schedule.is_wide(jobs.n_slots), device)
        self._status = torch.empty(n_places, dtype=torch.int32, device=device)
        self._found = (
            torch.empty(n_places, dtype=torch.int32, pin_memory=True)
            if self._on_gpu
            else self._status
        )
        self._stream = torch.cuda.current_stream(device) if self._on_gpu else None

    def run(self) -> Launched:
        """Enqueue everything on the current stream.

        If that is another one than it was prepared on, the caller makes it wait for that one.
        """
        import torch

        if self._on_gpu:
            current = torch.cuda.current_stream(self.compressed.device)
            if current != self._stream:
                for tensor in (
                    self.known.block,
                    self._jobs_there,
                    self._tables.slots,
                    self._status,
                ):
                    tensor.record_stream(current)
        if self._kernels is not None:
            if not self._expanded:
                self.expand()
            self.decode()
            self.patch()
        if not self._on_gpu:
            return Launched(self.known.metadata, self.jobs, self._status, None)
        self._found.copy_(self._status, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Launched(self.known.metadata, self.jobs, self._found, event)

    def expand(self) -> None:
        """Expand the tables."""
        expand(self.known, self.jobs, self._jobs_there, self._tables)

    def decode(self) -> None:
        """Decode all segments; the tables must be there."""
        assert self._kernels is not None
        at, together, n_places = (
            self.known.metadata.sections,
            self.schedule.together,
            self.jobs.segments,
        )
        for group in self.jobs.groups:
            launch(
                self._kernels.decode_segments,
                (-(-n_places // together), group.n),
                (
                    self.compressed,
                    self.known.block,
                    self._jobs_there,
                    self._tables.slots,
                    self._status,
                ),
                (
                    at["arrays"],
                    at["begins"],
                    at["words"],
                    at["classes"],
                    at["symbols"],
                    at["values16" if group.item == 2 else "values32"],
                    at["steps"],
                    group.first,
                    n_places,
                ),
                {
                    "ITEM": group.item,
                    "LOW_BITS": group.low_bits,
                    "CLASSES": group.classes,
                    "EXACT": group.exact,
                    "SCALED": group.scaled,
                    "FACTORS": group.factors,
                    "HALVES": group.halves,
                    "ALIGNED": self.jobs.aligned,
                    "WIDE": self._tables.wide,
                    "BALLOT": self._on_gpu and together == 1,
                    "SEGMENTS": together,
                },
                num_warps=together,
            )

    def patch(self) -> None:
        """Lay the patches over what was decoded."""
        assert self._kernels is not None
        at = self.known.metadata.sections
        for group in self.jobs.groups:
            if group.patches:
                launch(
                    self._kernels.lay_patches,
                    (-(-group.patches // _PATCHES), group.n),
                    (self.known.block, self._jobs_there),
                    (at["arrays"], at["positions"], at["patches"], group.first),
                    {"ITEM": group.item, "BLOCK": _PATCHES},
                    num_warps=4,
                )


@dataclass(frozen=True)
class Launched:
    """A decode that is on its way."""

    metadata: Metadata
    jobs: Jobs
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
        if not wrong.any():
            return
        damaged = np.flatnonzero(wrong)
        job, segment = divmod(int(damaged[0]), self.jobs.segments)
        array = int(self.jobs.arrays[job])
        what = ", ".join(text for bit, text in _TROUBLES if wrong[damaged[0]] & bit)
        raise CorruptionError(
            f"array {array} of {len(self.metadata.names)} ({self.metadata.names[array]}): segment "
            f"{segment} of {self.metadata.facts[array, SEGMENTS]} is damaged: {what}; "
            f"{len(damaged)} damaged segments in all"
        )
