"""Encode on a device, to the bytes that `moebound.encode` gives.

The device counts and codes, the host decides, with the code that decides on the CPU too
(native/bound/encode_model.h): patterns are counted -> alphabet; magnitudes are summed -> classes;
symbols are counted -> tables; segments are coded. Each arrow is one short wait for numbers.

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
from moebound.types import NUMPY_DTYPES, DType, as_float

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
    abs_bound = as_float(abs_bound)
    if dtype == "F32" or not 0 < size <= MAX_WEIGHTS or not 0 < abs_bound < float("inf"):
        return encode(array, abs_bound, codec=codec)
    spec = ArraySpec(tuple(array.shape), dtype, dtype, abs_bound)
    flat = array.detach().contiguous().view(-1).view(torch.int16)
    payload, values = Encoder(flat, spec, codec.segment_weights, together).run()
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


class Encoder:
    """One array on its way, from top to bottom.

    flat: [n] int16 patterns. symbols, lows, missed: [n] uint8, on the device, once look_up has run.
    """

    def __init__(
        self, flat: torch.Tensor, spec: ArraySpec, segment_weights: int, together: int = 1
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
        self.symbols, self.lows, self.missed = (
            torch.empty_like(flat, dtype=torch.uint8) for _ in range(3)
        )

    def run(self) -> tuple[Payload, Numbers]:
        """The payload, and the patterns of the misses."""
        self.choose()
        (misses,) = self.missed.nonzero(as_tuple=True)
        values = self.flat[misses].cpu().numpy()
        data = self.assemble(*self.code())
        return Payload(data, misses.cpu().numpy().astype(np.uint64)), values

    def choose(self) -> None:
        """Everything that the header says, and every weight's symbol."""
        rows = self._rows_of(self.flat, self.model.alphabet_rows())
        counts = torch.bincount(rows.to(torch.int32) & 0xFFFF, minlength=_PATTERNS)
        self.look_up(self.model.choose_alphabet(counts.cpu().numpy().astype(np.uint32)))
        self._choose_classes()
        layout = self.model.layout()
        self.row_classes, self.column_classes = (
            torch.from_numpy(layout[name]).to(self.flat.device)
            for name in ("row_classes", "column_classes")
        )
        self._choose_tables(layout)
        self.layout = self.model.layout()
        self.n_segments = -(-self.n // (self.layout["rows_per_segment"] * self.columns))
        frequencies = self.layout["frequencies"].reshape(self.layout["n_tables"], -1)
        frequencies = frequencies.astype(np.uint32)
        before = np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies
        entries = np.where(frequencies > 0, (frequencies - 1) | before << 12, 0)
        self.entries = torch.from_numpy(entries.astype(np.uint32)).to(self.flat.device)

    def look_up(self, codes: Numbers) -> None:
        """Every weight's symbol and low bits."""
        self.kernels.look_up_codes[-(-self.n // _BLOCK),](
            self.flat.view(torch.uint16),
            torch.from_numpy(codes).to(self.flat.device),
            self.symbols,
            self.lows,
            self.missed,
            self.n,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )

    def code(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Words of each segment (at the end of its weights' places), how many, and its states."""
        device, layout = self.flat.device, self.layout
        words = torch.empty(self.n, dtype=torch.uint16, device=device)
        n_words = torch.empty(self.n_segments, dtype=torch.int32, device=device)
        states = torch.empty(self.n_segments, 32, dtype=torch.uint32, device=device)
        self.kernels.encode_segments[-(-self.n_segments // self.together),](
            self.symbols,
            self.entries,
            self.row_classes,
            self.column_classes,
            words,
            n_words,
            states,
            self.n,
            self.columns,
            layout["rows_per_segment"],
            self.n_segments,
            layout["n_symbols"],
            layout["n_tables"],
            layout["class_base"],
            TABLE_LOG=layout["table_log"],
            LANES=1 << layout["lanes_log"],
            CLASSES=layout["n_tables"] > 1,
            BALLOT=device.type == "cuda" and self.together == 1,
            SEGMENTS=self.together,
            num_warps=self.together,
            enable_fp_fusion=False,
        )
        return words, n_words, states

    def assemble(self, words: torch.Tensor, n_words: torch.Tensor, states: torch.Tensor) -> bytes:
        """The payload."""
        device, layout = self.flat.device, self.layout
        lanes, low_bits = 1 << layout["lanes_log"], layout["low_bits"]
        counts = n_words.cpu().numpy()
        per_row, rows_per_segment = -(-self.columns // 32), layout["rows_per_segment"]
        n_groups = np.full(self.n_segments, rows_per_segment * per_row, np.int64)
        in_last = self.n - (self.n_segments - 1) * rows_per_segment * self.columns
        n_groups[-1] = in_last // self.columns * per_row + -(-(in_last % self.columns) // 32)
        halves = 2 * lanes + counts + counts % 2 + 2 * low_bits * n_groups
        offsets = np.concatenate([[0], np.cumsum(halves)])
        out = torch.empty(int(offsets[-1]), dtype=torch.uint16, device=device)
        self.kernels.assemble_segments[self.n_segments,](
            states,
            words,
            n_words,
            self.lows,
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
            enable_fp_fusion=False,
        )
        return bytes(self.model.header(counts.astype(np.uint32))) + out.cpu().numpy().tobytes()

    def _choose_classes(self) -> None:
        n_whole = self.n // self.columns
        magnitudes = (self.symbols.to(torch.int32) + self.model.layout()["symbol_low"]).abs()
        whole = magnitudes[: n_whole * self.columns].view(n_whole, self.columns)
        rest = magnitudes[n_whole * self.columns :]
        rows, columns = whole.sum(1), whole.sum(0)
        if len(rest):
            rows = torch.cat([rows, rest.sum()[None]])
            columns[: len(rest)] += rest
        sampled = self.model.class_rows()
        on_host = np.empty(self.n, np.uint8)  # of which only these rows are touched
        found = self._rows_of(self.symbols, sampled).cpu().numpy()
        at = 0
        for row in sampled.tolist():
            begin, end = row * self.columns, min(self.n, (row + 1) * self.columns)
            on_host[begin:end] = found[at : at + end - begin]
            at += end - begin
        self.model.choose_classes(
            rows.cpu().numpy().astype(np.uint64),
            columns.cpu().numpy().astype(np.uint64),
            on_host,
            self.n,
        )

    def _choose_tables(self, layout: dict[str, Any]) -> None:
        n_symbols, n_tables = layout["n_symbols"], layout["n_tables"]
        places = self.symbols.to(torch.int32)
        if n_tables > 1:
            table = self.row_classes.to(torch.int32)[:, None] + self.column_classes.to(torch.int32)
            table = (table - layout["class_base"]).clamp_(0, n_tables - 1)
            places += table.view(-1)[: self.n] * n_symbols
        counts = torch.bincount(places, minlength=n_tables * n_symbols)
        self.model.choose_tables(counts.cpu().numpy().astype(np.uint32))

    def _rows_of(self, flat: torch.Tensor, rows: Numbers) -> torch.Tensor:
        """These rows of a flat array, behind one another; the last one may be shorter."""
        n_whole = self.n // self.columns
        chosen = torch.from_numpy(rows.astype(np.int64)).to(flat.device)
        whole = flat[: n_whole * self.columns].view(n_whole, self.columns)
        found = whole[chosen[chosen < n_whole]].view(-1)
        if len(rows) and rows[-1] == n_whole:
            found = torch.cat([found, flat[n_whole * self.columns :]])
        return found
