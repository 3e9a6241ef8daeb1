"""Encode on a device, to the bytes that `moebound.encode` gives.

The device counts and codes, the host decides, with the code that decides on the CPU too
(native/encode_model.h): patterns are counted -> alphabet; magnitudes are summed -> classes; symbols
are counted -> tables; segments are coded. Each arrow is one short wait for numbers.

For bfloat16 and float16, decoded to the same dtype. Everything else, and bounds so tight that an
exact copy may be smaller, is encoded on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moebound import _native
from moebound.codec import envelope
from moebound.codec.api import encode
from moebound.codec.arrays import dtype_name
from moebound.codec.base import ArraySpec, Payload
from moebound.codec.bound import DTYPE_CODES, MAX_SEGMENT_WEIGHTS, BoundCodec, may_be_exact
from moebound.codec.device.stream import Numbers
from moebound.codec.device.triton_kernels import kernels
from moebound.codec.envelope import Envelope
from moebound.codec.lossless import MAX_WEIGHTS
from moebound.codec.shape import columns_of
from moebound.types import NUMPY_DTYPES, DType

_LARGEST_FINITE: dict[DType, int] = {"BF16": 0x7F7F, "F16": 0x7BFF}
_PATTERNS = 1 << 16
_BLOCK, _GROUPS = 1024, 64


def encode_on(
    array: torch.Tensor,
    abs_bound: float,
    *,
    segment_weights: int = MAX_SEGMENT_WEIGHTS,
    together: int = 1,
) -> bytes:
    """Encode a tensor where it is, with codec `bound`.

    array: on a CUDA device, of any shape. abs_bound: ε, above 0. segment_weights: as of
    `BoundCodec`. together: segments of a program; for the interpreter.

    The bytes are those of `moebound.encode` with a `BoundCodec` of these segment_weights.
    Raises as that, and BackendUnavailable if the device cannot run the kernels.
    """
    codec = BoundCodec(segment_weights=segment_weights)
    dtype = dtype_name(array.dtype)
    size = array.numel()
    if dtype == "F32" or not 0 < size <= MAX_WEIGHTS or not 0 < abs_bound < float("inf"):
        return encode(array, abs_bound, codec=codec)
    spec = ArraySpec(tuple(array.shape), dtype, dtype, float(abs_bound))
    flat = array.detach().contiguous().view(-1).view(torch.int16)
    payload, values = _Encoder(flat, spec, segment_weights, together).run()
    if may_be_exact(payload, spec):
        return encode(array, abs_bound, codec=codec)
    return envelope.build(
        Envelope(
            spec,
            codec.id,
            codec.version,
            memoryview(payload.data),
            payload.misses,
            values.view(NUMPY_DTYPES[dtype]),
            from_torch=True,
        )
    )


class _Encoder:
    """One array on its way. flat: [n] int16 patterns."""

    def __init__(
        self, flat: torch.Tensor, spec: ArraySpec, segment_weights: int, together: int
    ) -> None:
        self.flat, self.n, self.together = flat, flat.numel(), together
        self.columns = columns_of(spec.shape)
        self.kernels = kernels(flat.device).encode_kernel
        magnitudes = flat & 0x7FFF
        finite = magnitudes.where(magnitudes <= _LARGEST_FINITE[spec.dtype], 0)
        self.model = _native.EncodeModel(
            DTYPE_CODES[spec.dtype],
            DTYPE_CODES[spec.dtype],
            spec.abs_bound,
            self.n,
            self.columns,
            int(finite.max()),
            segment_weights,
        )

    def run(self) -> tuple[Payload, Numbers]:
        """The payload, and the patterns of the misses."""
        symbols, lows, missed = self._symbols()
        (misses,) = missed.nonzero(as_tuple=True)
        self._choose_classes(symbols)
        layout = self.model.layout()
        row_classes, column_classes = (
            torch.from_numpy(layout[name]).to(self.flat.device)
            for name in ("row_classes", "column_classes")
        )
        self._choose_tables(symbols, layout, row_classes, column_classes)
        data = self._segments(symbols, lows, row_classes, column_classes)
        values = self.flat[misses].cpu().numpy()
        return Payload(data, misses.cpu().numpy().astype(np.uint64)), values

    def _symbols(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = self._rows_of(self.flat, self.model.alphabet_rows())
        counts = torch.bincount(rows.to(torch.int32) & 0xFFFF, minlength=_PATTERNS)
        codes = self.model.choose_alphabet(counts.cpu().numpy().astype(np.uint32))
        symbols, lows, missed = (torch.empty_like(self.flat, dtype=torch.uint8) for _ in range(3))
        self.kernels.look_up_codes[-(-self.n // _BLOCK),](
            self.flat.view(torch.uint16),
            torch.from_numpy(codes).to(self.flat.device),
            symbols,
            lows,
            missed,
            self.n,
            BLOCK=_BLOCK,
            num_warps=4,
        )
        return symbols, lows, missed

    def _choose_classes(self, symbols: torch.Tensor) -> None:
        layout = self.model.layout()
        n_whole = self.n // self.columns
        magnitudes = (symbols.to(torch.int32) + layout["symbol_low"]).abs()
        whole = magnitudes[: n_whole * self.columns].view(n_whole, self.columns)
        rest = magnitudes[n_whole * self.columns :]
        rows, columns = whole.sum(1), whole.sum(0)
        if len(rest):
            rows = torch.cat([rows, rest.sum()[None]])
            columns[: len(rest)] += rest
        sampled = self.model.class_rows()
        on_host = np.empty(self.n, np.uint8)  # of which only these rows are touched
        found = self._rows_of(symbols, sampled).cpu().numpy()
        at = 0
        for row in sampled.tolist():
            end = min(self.n, (row + 1) * self.columns)
            length = end - row * self.columns
            on_host[row * self.columns : end] = found[at : at + length]
            at += length
        self.model.choose_classes(
            rows.cpu().numpy().astype(np.uint64),
            columns.cpu().numpy().astype(np.uint64),
            on_host,
            self.n,
        )

    def _choose_tables(
        self,
        symbols: torch.Tensor,
        layout: dict[str, Any],
        row_classes: torch.Tensor,
        column_classes: torch.Tensor,
    ) -> None:
        n_symbols, n_tables = layout["n_symbols"], layout["n_tables"]
        places = symbols.to(torch.int32)
        if n_tables > 1:
            table = row_classes.to(torch.int32)[:, None] + column_classes.to(torch.int32)
            table = (table - layout["class_base"]).clamp_(0, n_tables - 1)
            places += table.view(-1)[: self.n] * n_symbols
        counts = torch.bincount(places, minlength=n_tables * n_symbols)
        self.model.choose_tables(counts.cpu().numpy().astype(np.uint32))

    def _segments(
        self,
        symbols: torch.Tensor,
        lows: torch.Tensor,
        row_classes: torch.Tensor,
        column_classes: torch.Tensor,
    ) -> bytes:
        device = self.flat.device
        layout = self.model.layout()
        lanes, low_bits = 1 << layout["lanes_log"], layout["low_bits"]
        rows_per_segment = layout["rows_per_segment"]
        n_rows = -(-self.n // self.columns)
        n_segments = -(-n_rows // rows_per_segment)
        frequencies = layout["frequencies"].reshape(layout["n_tables"], -1).astype(np.uint32)
        before = np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies
        entries = np.where(frequencies > 0, (frequencies - 1) | before << 12, 0).astype(np.uint32)
        words = torch.empty(self.n, dtype=torch.uint16, device=device)
        n_words = torch.empty(n_segments, dtype=torch.int32, device=device)
        states = torch.empty(n_segments, 32, dtype=torch.uint32, device=device)
        self.kernels.encode_segments[-(-n_segments // self.together),](
            symbols,
            torch.from_numpy(entries).to(device),
            row_classes,
            column_classes,
            words,
            n_words,
            states,
            self.n,
            self.columns,
            rows_per_segment,
            n_segments,
            layout["n_symbols"],
            layout["n_tables"],
            layout["class_base"],
            TABLE_LOG=layout["table_log"],
            LANES=lanes,
            CLASSES=layout["n_tables"] > 1,
            BALLOT=device.type == "cuda" and self.together == 1,
            SEGMENTS=self.together,
            num_warps=self.together if device.type == "cuda" else 1,
        )
        counts = n_words.cpu().numpy()
        n_groups = np.full(n_segments, rows_per_segment * -(-self.columns // 32), np.int64)
        in_last = self.n - (n_segments - 1) * rows_per_segment * self.columns
        n_groups[-1] = in_last // self.columns * -(-self.columns // 32)
        n_groups[-1] += -(-(in_last % self.columns) // 32)
        halves = 2 * lanes + counts + counts % 2 + 2 * low_bits * n_groups
        offsets = np.concatenate([[0], np.cumsum(halves)])
        out = torch.empty(int(offsets[-1]), dtype=torch.uint16, device=device)
        self.kernels.assemble_segments[n_segments,](
            states,
            words,
            n_words,
            lows,
            torch.from_numpy(offsets[:-1]).to(device),
            out,
            self.n,
            self.columns,
            rows_per_segment,
            LANES=lanes,
            LOW_BITS=low_bits,
            BLOCK=_BLOCK,
            GROUPS=_GROUPS,
            num_warps=4,
        )
        header = self.model.header(counts.astype(np.uint32))
        return bytes(header) + out.cpu().numpy().tobytes()

    def _rows_of(self, flat: torch.Tensor, rows: Numbers) -> torch.Tensor:
        """These rows of a flat array, behind one another; the last one may be shorter."""
        n_whole = self.n // self.columns
        chosen = torch.from_numpy(rows.astype(np.int64)).to(flat.device)
        whole = flat[: n_whole * self.columns].view(n_whole, self.columns)
        found = whole[chosen[chosen < n_whole]].view(-1)
        if len(rows) and rows[-1] == n_whole:
            found = torch.cat([found, flat[n_whole * self.columns :]])
        return found
