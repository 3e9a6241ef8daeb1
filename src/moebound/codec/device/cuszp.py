"""cuSZp's stream on a GPU: encode and decode tensors where they are.

    stream = encode_stream(weights, 0.003, mode="plain")             # uint8 tensor
    again = decode_stream(stream, weights.numel(), 0.003, mode="plain", dtype=torch.bfloat16)

The bytes are those of `moebound.codec.cuszp`, and of the published library. On the CPU the same
runs under triton's interpreter (TRITON_INTERPRET=1 before triton is imported), for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moebound.codec.arrays import dtype_name
from moebound.codec.cuszp import (
    BLOCK,
    CHUNK,
    MODES,
    check_bound,
    check_count,
    check_mode,
    table_n_bytes,
)
from moebound.codec.device.triton_kernels import cuszp_kernels
from moebound.errors import CodecError, CorruptionError

if TYPE_CHECKING:
    import torch

CHUNK_BLOCKS = CHUNK // BLOCK

SHAPE = (4, 8)
"""Blocks that a program does at a time, one a warp, and how many times: powers of two, at most 32
times, and their product divides a chunk."""

INTERPRETED_SHAPE = (CHUNK_BLOCKS, 1)
"""Under the interpreter: there a program costs the same for one block as for all."""

_PLACING_WARPS = 4


@dataclass(frozen=True)
class Placed:
    """Where the payloads of a stream are, by `place`.

    begins: [chunks] int64, bytes from the stream's first. inside: [blocks] int32, bytes from the
    chunk's. planes: [chunks] int32, the highest rate. n_bytes: of the whole stream.
    """

    begins: torch.Tensor
    inside: torch.Tensor
    planes: torch.Tensor
    n_bytes: int


def encode_stream(x: torch.Tensor, abs_bound: float, *, mode: str = "plain") -> torch.Tensor:
    """The stream of a contiguous float32 tensor, as a flat uint8 tensor on its device.

    abs_bound, mode: as `moebound.codec.cuszp.encode_stream` takes them. Waits once for the device,
    to learn how many bytes there will be. Raises BoundError, CodecError,
    BackendUnavailable.
    """
    import torch

    check_bound(abs_bound)
    check_mode(mode)
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise CodecError(f"cuszp: expected a contiguous float32 tensor, found {x.dtype}")
    table = measure(x, abs_bound, mode)
    placed = place(table, x.numel(), mode)
    stream = torch.empty(placed.n_bytes, dtype=torch.uint8, device=x.device)
    stream[: len(table)] = table
    write(x, stream, placed, abs_bound, mode)
    return stream


def decode_stream(
    stream: torch.Tensor,
    n: int,
    abs_bound: float,
    *,
    mode: str = "plain",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The n values of a flat uint8 tensor, flat, on its device.

    dtype: float32, bfloat16 or float16, to which values are rounded, ties to even; float32 if None.
    Waits once for the device: the sum of all rates is compared with the length of the stream before
    anything is read by it. Raises CorruptionError on bytes that no encoder makes, BoundError,
    CodecError, BackendUnavailable.
    """
    import torch

    check_bound(abs_bound)
    check_mode(mode)
    if stream.dtype != torch.uint8 or stream.ndim != 1 or not stream.is_contiguous():
        raise CodecError(f"cuszp: expected flat contiguous uint8, found {stream.dtype}")
    dtype = dtype or torch.float32
    dtype_name(dtype)
    if check_count(n) < 0 or len(stream) < (n_table := table_n_bytes(n)):
        raise CorruptionError(f"cuszp: {len(stream)} bytes cannot hold {n} values")
    placed = place(stream[:n_table], n, mode)
    if placed.n_bytes != len(stream):
        raise CorruptionError(f"cuszp: {len(stream)} bytes, where the rates say {placed.n_bytes}")
    out = torch.empty(n, dtype=dtype, device=stream.device)
    read(stream, placed, out, abs_bound, mode)
    return out


def measure(x: torch.Tensor, abs_bound: float, mode: str) -> torch.Tensor:
    """The table of rates of a stream. Does not wait for the device."""
    import torch

    n = x.numel()
    table = torch.zeros(table_n_bytes(n), dtype=torch.uint8, device=x.device)
    if n:
        _launch(
            "measure_blocks", n, x, table, n, _n_blocks(n), 0.5 / check_bound(abs_bound), MODE=mode
        )
    return table


def place(table: torch.Tensor, n: int, mode: str) -> Placed:
    """Where the payloads are that a table of rates stands for. Waits for the device.

    Raises CorruptionError on a table that no encoder writes.
    """
    import torch

    n_chunks = len(table) // CHUNK_BLOCKS
    inside = torch.empty(len(table), dtype=torch.int32, device=table.device)
    sizes = torch.empty(n_chunks, dtype=torch.int64, device=table.device)
    planes = torch.empty(n_chunks, dtype=torch.int32, device=table.device)
    if n_chunks == 0:
        return Placed(sizes, inside, planes, 0)
    wrong = torch.zeros(1, dtype=torch.int32, device=table.device)
    cuszp_kernels(table.device).place_blocks[n_chunks,](
        table, inside, sizes, planes, wrong, _n_blocks(n),
        MODE=MODES.index(mode), num_warps=_PLACING_WARPS,
    )  # fmt: skip
    ends = torch.cumsum(sizes, 0) + len(table)
    n_bytes, n_wrong = torch.cat([ends[-1:], wrong.to(torch.int64)]).tolist()
    if n_wrong:
        raise CorruptionError(
            f"cuszp: the rates of {n_wrong} chunks of {n_chunks} have bytes that no block of mode "
            f"{mode} has"
        )
    return Placed(ends - sizes, inside, planes, n_bytes)


def write(
    x: torch.Tensor, stream: torch.Tensor, placed: Placed, abs_bound: float, mode: str
) -> None:
    """Write the payloads of a stream whose table is there. Does not wait for the device."""
    n = x.numel()
    if n:
        _launch(
            "write_blocks", n, x, stream, placed.begins, placed.inside, placed.planes, n,
            _n_blocks(n), 0.5 / check_bound(abs_bound), MODE=mode, ALIGNED=_aligned(stream, mode),
        )  # fmt: skip


def read(
    stream: torch.Tensor, placed: Placed, out: torch.Tensor, abs_bound: float, mode: str
) -> None:
    """Decode a stream of placed.n_bytes into a contiguous tensor. Does not wait for the device.

    out: float32, bfloat16 or float16. Raises CodecError.
    """
    import torch

    n, dtype = out.numel(), dtype_name(out.dtype)
    if not out.is_contiguous():
        raise CodecError("cuszp: expected a contiguous tensor to decode into")
    begins = stream.data_ptr(), out.data_ptr()
    if n and max(begins) < min(begins[0] + stream.nbytes, begins[1] + out.nbytes):
        raise CodecError("cuszp: the stream and the tensor to decode into overlap")
    if table_n_bytes(n) != len(placed.inside) or len(stream) != placed.n_bytes:
        raise CodecError(
            f"cuszp: {n} values and {len(stream)} bytes: expected a stream of {placed.n_bytes} "
            f"bytes and {len(placed.inside)} blocks"
        )
    if n:
        patterns = out if out.dtype == torch.float32 else out.view(torch.uint16)
        _launch(
            "decode_blocks", n, stream, placed.begins, placed.inside, placed.planes, patterns, n,
            _n_blocks(n), 2.0 * check_bound(abs_bound), MODE=mode, DTYPE=dtype,
            ALIGNED=_aligned(stream, mode),
        )  # fmt: skip


def _launch(kernel: str, n: int, *args: Any, MODE: str, **options: Any) -> None:
    """One of the kernels that go over all blocks of n values."""
    kernels = cuszp_kernels(args[0].device)
    warps, rounds = INTERPRETED_SHAPE if kernels.INTERPRETED else SHAPE
    getattr(kernels, kernel)[-(-_n_blocks(n) // (warps * rounds)),](
        *args,
        MODE=MODES.index(MODE),
        BLOCKS=warps,
        ROUNDS=rounds,
        num_warps=1 if kernels.INTERPRETED else warps,
        enable_fp_fusion=False,
        **options,
    )


def _n_blocks(n: int) -> int:
    return -(-n // BLOCK)


def _aligned(stream: torch.Tensor, mode: str) -> bool:
    """Whether every payload begins at a multiple of 4."""
    return mode != "outlier" and stream.data_ptr() % 4 == 0
