"""cuSZp's stream on a GPU: encode and decode tensors where they are.

    stream = encode_stream(weights, 0.003, mode="plain")             # uint8 tensor
    again = decode_stream(stream, weights.numel(), 0.003, mode="plain", dtype=torch.bfloat16)

The bytes are those of `moebound.codec.cuszp`, and of the published library. On the CPU the same
runs under triton's interpreter (TRITON_INTERPRET=1 before triton is imported), for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moebound.codec.cuszp import BLOCK, MODES, check_bound, check_mode, table_n_bytes
from moebound.errors import BackendUnavailable, CodecError, CorruptionError

if TYPE_CHECKING:
    import torch

TILE_BLOCKS = 32
"""Blocks of a program."""

_SUMMED_TILES = 32
_WARPS = 4


def encode_stream(x: torch.Tensor, abs_bound: float, *, mode: str = "plain") -> torch.Tensor:
    """The stream of a contiguous float32 tensor, as a flat uint8 tensor on its device.

    abs_bound, mode: as `moebound.codec.cuszp.encode_stream` takes them. Waits once for the device,
    to learn how many bytes there will be. Raises CodecError.
    """
    import torch

    kernels = _kernels()
    bound, code = check_bound(abs_bound), MODES.index(check_mode(mode))
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise CodecError(f"cuszp: expected a contiguous float32 tensor, found {x.dtype}")
    n, n_table = x.numel(), table_n_bytes(x.numel())
    if n == 0:
        return torch.empty(0, dtype=torch.uint8, device=x.device)
    reciprocal = 0.5 / bound  # of two float32 numbers, rounded to one on the way to the kernel
    table = torch.empty(n_table, dtype=torch.uint8, device=x.device)
    n_tiles = n_table // TILE_BLOCKS
    sizes = torch.empty(n_tiles, dtype=torch.int64, device=x.device)
    kernels.measure_blocks[n_tiles,](
        x, table, sizes, n, n_table, reciprocal,
        MODE=code, BLOCKS=TILE_BLOCKS, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    ends = torch.cumsum(sizes, 0)
    stream = torch.empty(n_table + int(ends[-1]), dtype=torch.uint8, device=x.device)
    stream[:n_table] = table
    kernels.write_blocks[n_tiles,](
        x, stream, ends - sizes, n, n_table, reciprocal, MODE=code,
        ALIGNED=mode != "outlier", BLOCKS=TILE_BLOCKS, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return stream


@dataclass(frozen=True)
class Sums:
    """Where the payload of each tile of blocks begins; the stream's length agrees with its rates."""

    begins: torch.Tensor
    n_table: int


def read_rates(stream: torch.Tensor, n: int, *, mode: str = "plain") -> Sums:
    """Sum the table of a flat uint8 tensor, and compare the sum with the stream's length.

    Waits once for the device. Raises CorruptionError on a table that no encoder writes.
    """
    import torch

    kernels = _kernels()
    code = MODES.index(check_mode(mode))
    if stream.dtype != torch.uint8 or stream.ndim != 1 or not stream.is_contiguous():
        raise CodecError(f"cuszp: expected flat contiguous uint8, found {stream.dtype}")
    n_table = table_n_bytes(n)
    if stream.numel() < n_table or (n == 0 and stream.numel()):
        raise CorruptionError(
            f"cuszp: {stream.numel()} bytes for {n} values: the table of rates has {n_table}"
        )
    n_tiles = n_table // TILE_BLOCKS
    sizes = torch.empty(n_tiles, dtype=torch.int64, device=stream.device)
    if n == 0:
        return Sums(sizes, 0)
    wrong = torch.zeros(1, dtype=torch.int32, device=stream.device)
    kernels.sum_sizes[-(-n_tiles // _SUMMED_TILES),](
        stream, sizes, wrong, -(-n // BLOCK), n_table,
        MODE=code, BLOCKS=TILE_BLOCKS, TILES=_SUMMED_TILES, num_warps=_WARPS,
    )  # fmt: skip
    ends = torch.cumsum(sizes, 0)
    total, n_wrong = (int(v) for v in torch.cat([ends[-1:], wrong.to(torch.int64)]).tolist())
    if n_wrong:
        raise CorruptionError(f"cuszp: the table of rates has bytes that mode {mode} never writes")
    if n_table + total != stream.numel():
        raise CorruptionError(
            f"cuszp: {stream.numel()} bytes, where the rates say {n_table + total}"
        )
    return Sums(ends - sizes, n_table)


def decode_blocks(
    stream: torch.Tensor, sums: Sums, out: torch.Tensor, abs_bound: float, *, mode: str = "plain"
) -> None:
    """Decode into a contiguous tensor of float32, bfloat16 or float16, on the current stream.

    sums: of this stream, for out's number of values. Does not wait. Values are cast to the
    nearest, ties to even. Raises CodecError.
    """
    import torch

    kernels = _kernels()
    code, n = MODES.index(check_mode(mode)), out.numel()
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    if out.dtype not in names or not out.is_contiguous() or table_n_bytes(n) != sums.n_table:
        raise CodecError(
            f"cuszp: out: expected contiguous float32, bfloat16 or float16 and {sums.n_table} "
            f"rates, found {out.dtype} and {table_n_bytes(n)}"
        )
    if n == 0:
        return
    kernels.decode_blocks[sums.n_table // TILE_BLOCKS,](
        stream, sums.begins, out if out.dtype == torch.float32 else out.view(torch.uint16),
        n, sums.n_table, 2.0 * check_bound(abs_bound),
        MODE=code, DTYPE=names[out.dtype], ALIGNED=mode != "outlier" and stream.data_ptr() % 4 == 0,
        BLOCKS=TILE_BLOCKS, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def decode_stream(
    stream: torch.Tensor,
    n: int,
    abs_bound: float,
    *,
    mode: str = "plain",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The n values of a stream, flat, on its device; float32 if no dtype is given.

    Waits once for the device, to check the table before anything is read by it. Raises
    CorruptionError on bytes that no encoder makes, CodecError.
    """
    import torch

    sums = read_rates(stream, n, mode=mode)
    out = torch.empty(n, dtype=dtype or torch.float32, device=stream.device)
    decode_blocks(stream, sums, out, abs_bound, mode=mode)
    return out


def _kernels() -> Any:
    try:
        from moebound.codec.device import cuszp_kernels
    except ImportError as error:
        raise BackendUnavailable("decoding on a GPU needs triton: pip install triton") from error
    return cuszp_kernels
