"""What no caller and no bytes can bring about: more memory than was declared, arrays that are
written and not read, outputs over their own input, numbers that are none. Every codec alike."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebound import ErrorBound, codec_ids, decode, encode
from moebound.codec import (
    ArraySpec,
    Codec,
    Envelope,
    Payload,
    decode_array,
    decode_into,
    encode_certified,
    estimate_bytes,
    parse,
    register_codec,
)
from moebound.codec.api import UNASKED_BYTES, UNASKED_RATIO
from moebound.codec.bound import BoundCodec
from moebound.codec.cuszp import decode_stream, encode_stream
from moebound.codec.envelope import MAX_DIMS, build, shape_fault
from moebound.codec.fields import checksum
from moebound.codec.registry import CODECS
from moebound.errors import BoundError, CodecError, CorruptionError, FormatError
from moebound.types import NUMPY_DTYPES, Array, BoundMode
from peak_memory import peak_bytes

from .weights import DTYPES, bits, broken, gaussian

MB = 1 << 20
every_codec = pytest.mark.parametrize("codec", codec_ids())


def kind(value: object) -> str:
    return type(value).__name__


def forged(data: bytes, shape: tuple[int, ...]) -> bytes:
    """The same payload under another shape, sealed."""
    parsed = parse(data)
    return build(replace(parsed, spec=replace(parsed.spec, shape=shape)))


# Memory


@every_codec
def test_a_forged_shape_takes_no_memory(codec: str) -> None:
    """A few hundred bytes that say 1 GB and more."""
    small = encode(gaussian((16, 64), "F32"), 0.01, codec=codec)
    for shape in ((1 << 14, 1 << 14), (1 << 28,), (1 << 40,)):
        data = forged(small, shape)
        assert len(data) < 8192

        def refused(data: bytes = data) -> None:
            with pytest.raises(FormatError):
                decode(data)

        # SZ3 alone can make anything of a hundred bytes: there its own sizes tell, after the array
        # has been asked for, of which not a byte is touched.
        if codec != "sz3" or prod(shape) > 1 << 28:
            assert peak_bytes(refused) < 4 * MB, shape
        refused()


def test_a_zfp_payload_is_compared_with_its_blocks() -> None:
    """Each block of 4 or of 16 values is a bit at least."""
    for shape, block in (((4096, 4096), 16), ((1 << 20,), 4)):
        n_bytes = prod(shape) // block // 8
        zeros = encode(np.zeros(shape, np.float32), 0.1, codec="zfp")
        assert n_bytes <= len(parse(zeros).payload) <= n_bytes + 16
        short = replace(parse(zeros), payload=parse(zeros).payload[: n_bytes - 1])
        with pytest.raises(CorruptionError, match=f"expected {n_bytes} to |hold at most"):
            decode(build(short))


@every_codec
def test_decoding_takes_a_small_multiple_of_what_it_gives(codec: str) -> None:
    for array in (np.zeros((1024, 512), np.float32), gaussian((1024, 512), "BF16")):
        data = encode(array, 0.005, codec=codec)
        peak = peak_bytes(lambda data=data: decode(data))  # type: ignore[misc]
        assert peak < 6 * (array.nbytes + len(data)) + MB


@pytest.mark.parametrize("every", [1, 2, 3, 40, 4000])
def test_a_patch_takes_a_small_multiple_of_its_bytes(every: int) -> None:
    """Positions are 64 bits each, whatever they take in the envelope."""
    array = np.zeros(1 << 20, np.float16)
    array[::every] = np.nan
    data = encode(array, 0.1, codec="cuszp")
    assert len(parse(data).misses) == len(array[::every])
    assert peak_bytes(lambda: parse(data)) < 12 * len(data) + 4 * MB
    assert peak_bytes(lambda: encode(array, 0.1, codec="cuszp")) < 20 * array.nbytes + 4 * MB


def test_positions_are_not_unpacked_for_values_that_are_not_there() -> None:
    n = 1 << 22
    positions = np.arange(n, dtype=np.uint64)
    spec = ArraySpec((n,), "BF16", "BF16", 0.1)
    values = np.zeros(n, NUMPY_DTYPES["BF16"])
    whole = build(Envelope(spec, "raw", 1, memoryview(b""), positions, values))
    head = len(whole) - 4 - 1 - values.nbytes
    cut = whole[: head + 100]
    data = cut + checksum(cut).to_bytes(4, "little")
    with pytest.raises(CorruptionError, match=f"expected {values.nbytes} more bytes"):
        parse(data)

    def again() -> None:
        parse(data)

    assert peak_bytes(again) < 2 * MB


def test_a_constant_array_comes_back_however_small_its_bytes_are() -> None:
    """A ratio alone is no limit: this one is more than 100,000."""
    array = np.zeros((1 << 11, 1 << 12), np.float32)
    data = encode(array, 0.1, codec="sz3")
    assert array.nbytes > 1e5 * len(data)
    assert np.abs(decode(data) - array).max() <= 0.1


def test_an_array_larger_than_anybody_expects_is_asked_for_by_name() -> None:
    spec = ArraySpec((UNASKED_BYTES // 4 + 1,), "F32", "F32", 0.1)
    payload = parse(encode(np.zeros(64, np.float32), 0.1, codec="sz3")).payload
    parsed = Envelope(spec, "sz3", 1, payload, np.empty(0, np.uint64), np.empty(0, np.float32))
    with pytest.raises(FormatError, match=r"at most 1073741824 were expected; max_bytes= allows"):
        decode(build(parsed))
    # Asked for, the bytes are looked into: SZ3 says 64 values.
    with pytest.raises(CorruptionError, match="sz3"):
        decode(build(parsed), max_bytes=spec.n_bytes)
    # Bytes in proportion need no asking.
    many = memoryview(bytes(spec.n_bytes // UNASKED_RATIO + 1))
    with pytest.raises(CorruptionError, match="sz3"):
        decode_array(replace(parsed, payload=many))


def test_max_bytes_is_of_the_array() -> None:
    array = gaussian((8, 8), "F32")
    data = encode(array, 0.01)
    assert decode(data, max_bytes=256).shape == (8, 8)
    with pytest.raises(FormatError, match=r"shape \(8, 8\) of F32, 256 bytes: at most 255"):
        decode(data, max_bytes=255)
    # `out` says itself what is expected.
    assert decode(data, out=np.empty((8, 8), np.float32), max_bytes=0) is not None
    for wrong in (True, 2.0, -1, "1"):
        with pytest.raises(CodecError, match="max_bytes"):
            decode(data, max_bytes=wrong)  # type: ignore[arg-type]


class NoMemory(Codec):
    """There is none, at either end."""

    id = "no_memory"
    in_decode = False

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        if not self.in_decode:
            raise MemoryError
        return Payload(b"x")

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        raise MemoryError("Unable to allocate 7 GiB")


def test_a_memory_error_stays_one_and_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CODECS, "classes", dict(CODECS.classes))
    register_codec(NoMemory)
    x = np.zeros((3, 4), np.float32)
    for door in (encode, lambda *a, **k: encode_certified(a[0], ErrorBound(a[1]), **k)):
        with pytest.raises(MemoryError, match=r"^encoding shape \(3, 4\) of F32: out of memory$"):
            door(x, 0.1, codec="no_memory")
    data = replace(parse(encode(x, 0.1)), codec="no_memory")
    for read in (decode, lambda d: decode(d, out=np.empty((3, 4), np.float32))):
        with pytest.raises(MemoryError, match=r"^decoding shape \(3, 4\) of F32: .*\(Unable to"):
            read(build(data))


# What is written can be read


@every_codec
def test_what_encode_takes_decode_gives_back(codec: str) -> None:
    """Any shape up to one dimension too many, any order, any byte order, NumPy or torch."""

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=True,
    )
    @given(
        shape=st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), max_size=MAX_DIMS + 1).map(tuple),
        dtype=st.sampled_from(DTYPES),
        order=st.sampled_from(["C", "F", "backwards", "broadcast", "swapped", "torch", "torch.T"]),
        odd=st.sampled_from([None, np.nan, np.inf, -0.0, 1e-45, -6e-8, 3e38, 65504.0]),
        bound=st.sampled_from([1e-45, 1e-3, 0.5, 1e9, 1e300]),
    )
    def check(
        shape: tuple[int, ...], dtype: Any, order: str, odd: float | None, bound: float
    ) -> None:
        values = np.asarray(np.random.default_rng(prod(shape)).standard_normal(shape))
        if odd is not None and values.size:
            values.reshape(-1)[:: 1 + values.size // 3] = odd
        with np.errstate(over="ignore", under="ignore"):
            array = np.asarray(values.astype(NUMPY_DTYPES[dtype]))
        given_as: Any = array
        if order == "F":
            given_as = np.asfortranarray(array)
        elif order == "backwards" and shape:
            given_as = array[tuple(slice(None, None, -1) for _ in shape)]
        elif order == "broadcast" and shape:
            given_as = np.broadcast_to(array[:1], (2 * array[:1].shape[0], *shape[1:]))
            given_as = given_as if array[:1].shape[0] == 1 else array
        elif order == "swapped" and dtype != "BF16":
            given_as = array.astype(array.dtype.newbyteorder(">"))
        elif order.startswith("torch"):
            plain = array.view(np.int16) if dtype == "BF16" else array
            tensor = torch.from_numpy(plain.copy())
            tensor = tensor.view(torch.bfloat16) if dtype == "BF16" else tensor
            given_as = tensor.movedim(0, -1) if order == "torch.T" and shape else tensor
        if len(given_as.shape) > MAX_DIMS:
            with pytest.raises(CodecError, match=f"{MAX_DIMS + 1} dimensions: at most {MAX_DIMS}"):
                encode(given_as, bound, codec=codec)
            return
        found: Any = decode(encode(given_as, bound, codec=codec))
        assert type(found) is type(given_as)
        assert tuple(found.shape) == tuple(given_as.shape)
        if isinstance(found, torch.Tensor):
            assert found.dtype == given_as.dtype
            width = {2: torch.int16, 4: torch.int32}[found.element_size()]
            given_as, found = (
                t.contiguous().view(width).numpy().view(NUMPY_DTYPES[dtype])
                for t in (given_as, found)
            )
        straight = np.ascontiguousarray(given_as, NUMPY_DTYPES[dtype]).reshape(given_as.shape)
        assert found.dtype == straight.dtype
        assert not len(broken(straight, found, bound))
        if codec in ("lossless", "raw"):
            assert np.array_equal(bits(found), bits(straight))

    check()


@pytest.mark.parametrize(
    "shape", [(1,) * 9, (0,) * 9, (2, *(1,) * 12), ((1 << 40) + 1, 0), (0, 1 << 21, 1 << 20)]
)
def test_shapes_beyond_the_format_are_refused_before_anything_is_copied(
    shape: tuple[int, ...],
) -> None:
    for array in (np.empty(shape, np.float32), torch.empty(shape, dtype=torch.bfloat16)):
        with pytest.raises(CodecError, match=r"dimensions: at most 8|at most 2\^40"):
            encode(array, 0.1)
    with pytest.raises(CodecError, match=r"dimensions: at most 8|at most 2\^40"):
        encode_certified(np.empty(shape, np.float32), ErrorBound(0.1))
    large = np.broadcast_to(np.float32(1.0), (1 << 21, 1 << 20))
    with pytest.raises(CodecError, match=r"at most 2\^40"):
        encode(large, 0.1)


@pytest.mark.parametrize("shape", [(1,) * 8, (0,) * 8, (1 << 40, 0), (0, 1 << 40)])
def test_shapes_at_the_limit_come_back(shape: tuple[int, ...]) -> None:
    assert shape_fault(shape) is None
    assert decode(encode(np.zeros(shape, np.float16), 0.1)).shape == shape


@pytest.mark.parametrize(
    ("codec", "version", "misses"),
    [("Upper", 1, []), ("x" * 33, 1, []), ("", 1, []), ("raw", 256, []), ("raw", -1, [])]
    + [("raw", 1, positions) for positions in ([3, 2], [1, 1], [0, 6])],
)
def test_an_envelope_that_none_can_read_is_not_built(
    codec: str, version: int, misses: list[int]
) -> None:
    spec, values = ArraySpec((2, 3), "F16", "F16", 0.1), np.zeros(len(misses), np.float16)
    at = np.array(misses, np.uint64)
    with pytest.raises(CodecError, match=r"expected an id|ascending"):
        build(Envelope(spec, codec, version, memoryview(b""), at, values))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ma.masked_array(np.zeros(3, np.float32), [False, True, False]), "masked"),
        (torch.zeros(3).to_sparse(), "dense"),
        (torch.zeros(3, device="meta"), "meta"),
    ],
)
def test_arrays_that_are_not_all_there_are_refused(array: Any, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        encode(array, 0.1)


def test_negated_views_of_torch_are_what_they_show() -> None:
    flipped = torch._neg_view(torch.tensor([1.0, -2.0]))
    assert decode(encode(flipped, 0.1, codec="raw")).tolist() == [-1.0, 2.0]
    with pytest.raises(CodecError, match="contiguous tensor"):
        decode(encode(flipped, 0.1), out=flipped)


@pytest.mark.parametrize(
    "data",
    ["MOEB", None, 7, [77], memoryview(bytes(64))[::2], np.zeros(4, ml_dtypes.bfloat16)],
    ids=kind,
)
def test_things_that_are_no_bytes(data: Any) -> None:
    with pytest.raises(FormatError, match="expected contiguous bytes, found"):
        decode(data)


def test_bytes_of_any_holder() -> None:
    array = gaussian((4, 8), "F32")
    data = encode(array, 0.01, codec="raw")
    padded = np.frombuffer(data + bytes(-len(data) % 4), np.uint8)
    for holder in (bytearray(data), memoryview(data), padded[: len(data)]):
        assert np.array_equal(decode(holder), array)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="begin with"):
        decode(np.zeros(0, np.uint8))  # type: ignore[arg-type]


# Where it goes


@every_codec
@pytest.mark.parametrize("behind", [0.0, 0.5, 0.9])
def test_out_over_its_own_bytes_is_refused(codec: str, behind: float) -> None:
    array = gaussian((64, 96), "F32")
    data = encode(array, 0.01, codec=codec)
    memory = np.zeros(array.nbytes + 2 * len(data), np.uint8)
    at = array.nbytes - int((1 - behind) * array.nbytes / 2)
    memory[at : at + len(data)] = np.frombuffer(data, np.uint8)
    here, out = memory.data[at : at + len(data)], memory[: array.nbytes].view(np.float32)
    with pytest.raises(CodecError, match="overlaps"):
        decode(here, out=out.reshape(64, 96))
    with pytest.raises(CodecError, match="overlaps"):
        decode(here, out=torch.from_numpy(out.reshape(64, 96)))
    if at + len(data) - 4 - len(parse(here).payload) < array.nbytes:
        with pytest.raises(CodecError, match="overlaps"):
            decode_into(parse(here), out)
    assert memory[at : at + len(data)].tobytes() == data, "refused before it is written"


def test_out_beside_its_bytes_is_fine() -> None:
    array = gaussian((64, 96), "F32")
    data = encode(array, 0.01)
    n = -(-len(data) // 4) * 4
    memory = np.zeros(n + array.nbytes, np.uint8)
    memory[: len(data)] = np.frombuffer(data, np.uint8)
    out = memory[n:].view(np.float32).reshape(64, 96)
    decode(memory.data[: len(data)], out=out)
    assert np.array_equal(out, decode(data))


def _frozen() -> Array:
    out = np.zeros(12, np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    "out",
    [
        np.zeros(11, np.float32),
        np.zeros(13, np.float32),
        np.zeros((3, 4), np.float32),
        np.zeros(12, np.float16),
        np.zeros(12, ">f4"),
        np.zeros(24, np.float32)[::2],
        np.broadcast_to(np.float32(0), (12,)),
        _frozen(),
    ],
)
def test_decode_into_takes_nothing_but_what_fits(out: Array) -> None:
    with pytest.raises(CodecError, match="out: expected"):
        decode_into(parse(encode(np.ones((3, 4), np.float32), 0.1)), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_hears_that_out_has_changed(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 4, dtype=dtype)
    x = torch.ones(4, dtype=dtype, requires_grad=True)
    data = encode(torch.zeros(3, 4, dtype=dtype), 0.1)
    lost = (weight @ x).sum()
    decode(data, out=weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lost.backward()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        assert decode(data, out=torch.ones(3, 4, dtype=dtype)).sum() == 0


def test_a_masked_out_is_refused() -> None:
    with pytest.raises(CodecError, match="found MaskedArray"):
        decode(encode(np.ones(3, np.float32), 0.1), out=np.ma.zeros(3, np.float32))


# Numbers


@pytest.mark.parametrize("wrong", [True, False, np.True_, "0.1", None, 1j, [0.1]])
def test_a_bound_is_a_number(wrong: Any) -> None:
    x = np.ones(3, np.float32)
    for door in (
        lambda: encode(x, wrong),
        lambda: estimate_bytes(x, [wrong]),
        lambda: encode_stream(x, wrong),
        lambda: decode_stream(encode_stream(x, 0.1), 3, wrong),
    ):
        with pytest.raises(BoundError, match="expected a number, found"):
            door()


@pytest.mark.parametrize(
    "wrong",
    [
        0,
        -0.0,
        -1,
        np.nan,
        np.inf,
        -np.inf,
        10**400,
        -(10**400),
        10**5000,
        np.longdouble("1e-4900"),
        np.longdouble("1e4900"),
        np.float16(np.inf),
    ],
    ids=kind,
)
def test_a_bound_is_a_finite_float64_above_0(wrong: Any) -> None:
    if isinstance(wrong, np.longdouble) and not 0 < wrong < np.inf:
        pytest.skip("a longdouble of 64 bits")
    with pytest.raises(BoundError, match="expected a finite number above 0"):
        encode(np.ones(3, np.float32), wrong)


@pytest.mark.parametrize("value", [1, np.int8(1), np.float16(1), np.float32(1), np.longdouble(1)])
def test_every_kind_of_number_gives_the_same_bytes(value: Any) -> None:
    assert encode(gaussian((9, 9)), value) == encode(gaussian((9, 9)), 1.0)


@every_codec
@pytest.mark.parametrize("bound", [ErrorBound(1e9, "rate"), ErrorBound(1e300, "rate"), 1e308])
def test_a_bound_wider_than_every_weight_is_kept(codec: str, bound: float | ErrorBound) -> None:
    array = gaussian((40, 64))
    found = decode(encode(array, bound, codec=codec))
    assert found.shape == array.shape
    assert np.isfinite(found.astype(np.float64)).all()  # type: ignore[union-attr]


def test_a_relative_bound_beyond_float64_is_refused() -> None:
    large = np.full(8, 3e38, np.float32)
    modes: tuple[BoundMode, ...] = ("rate", "range", "rmse")
    for mode in modes:
        spread = large * np.array([1, -1] * 4, np.float32)
        with pytest.raises(BoundError, match="beyond float64"):
            encode(spread, ErrorBound(1e300, mode))


@pytest.mark.parametrize(
    "wrong", [True, 1.5, 4096.0, "4096", 0, -1, (1 << 18) + 1, 10**5000], ids=kind
)
def test_segment_weights_is_a_whole_number(wrong: Any) -> None:
    with pytest.raises(CodecError, match="segment_weights"):
        BoundCodec(segment_weights=wrong)
    assert BoundCodec(segment_weights=np.int32(64)).segment_weights == 64  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, -1, True, 1.0, "2", 1 << 40])
def test_threads_are_a_whole_number(wrong: Any) -> None:
    array = gaussian((70, 600))
    parsed = parse(encode(array, 0.01))
    with pytest.raises(CodecError, match="threads"):
        decode_array(parsed, threads=wrong)
    with pytest.raises(CodecError, match="threads"):
        encode_certified(array, ErrorBound(0.1), threads=wrong)


@pytest.mark.parametrize("wrong", ["²", "1e3", "-1", " 4", "9" * 5000, "0x4", "99999999"])
def test_the_number_of_threads_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv("MOEBOUND_THREADS", wrong)
    with pytest.raises(CodecError, match="MOEBOUND_THREADS"):
        encode(gaussian((4, 4)), 0.01)


def test_the_kernel_itself_takes_no_threads_for_one() -> None:
    parsed = parse(encode(gaussian((70, 600)), 0.01))
    out = np.empty(70 * 600, NUMPY_DTYPES["BF16"])
    BoundCodec().decompress(parsed.payload, parsed.spec, out, threads=0)
    assert np.array_equal(bits(out), bits(decode_array(parsed)))


@pytest.mark.parametrize("codec", [None, False, 0, BoundCodec, b"bound"])
def test_a_codec_is_an_id_or_a_codec(codec: Any) -> None:
    with pytest.raises(CodecError, match="expected an id or a Codec"):
        encode(np.ones(3, np.float32), 0.1, codec=codec)


@pytest.mark.parametrize("options", ["segment=²", "segment=" + "9" * 5000, "segment=-1", "segment"])
def test_options_that_are_no_number(options: str) -> None:
    with pytest.raises(CodecError, match="segment"):
        encode(np.ones(3, np.float32), 0.1, codec=f"bound:{options}")


@pytest.mark.parametrize("n", [True, 3.0, "3", None, 1 << 70])
def test_a_number_of_values_is_a_whole_number(n: Any) -> None:
    with pytest.raises(CodecError, match="cuszp: n"):
        decode_stream(encode_stream(np.ones(3, np.float32), 0.1), n, 0.1)


@pytest.mark.parametrize("dtype", [np.float16, "float16", torch.float16, np.dtype(">f2")])
def test_dtypes_by_any_of_their_names(dtype: Any) -> None:
    assert decode(encode(np.ones(3, np.float32), 0.1, dtype=dtype)).dtype == np.float16


@pytest.mark.parametrize("dtype", [float, False, 0, "(", "f4,f4", np.int16])
def test_other_dtypes(dtype: Any) -> None:
    with pytest.raises(CodecError, match="expected bfloat16, float16 or float32"):
        encode(np.ones(3, np.float32), 0.1, dtype=dtype)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("codec", ["bound", "lossless", "cuszp"])
def test_no_memory_in_a_thread_of_the_kernel_is_a_memory_error(codec: str) -> None:
    """A little more each time, in a process of its own, which neither ends nor computes others."""
    script = f"""
        import resource
        import numpy as np
        from moebound import decode, encode

        x = np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32)
        made, refused = [encode(x[:8], 1e-3, codec={codec!r})], 0  # everything is imported
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        for more in range(0, 48 << 20, 1 << 20):
            resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
            try:
                data = encode(x, 1e-3, codec={codec!r})
                decode(data)
            except MemoryError as error:
                refused += 1
                assert "out of memory" in str(error), error
            else:
                made.append(data)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert refused > 3, refused
        assert set(made[1:]) <= {{encode(x, 1e-3, codec={codec!r})}}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"MOEBOUND_THREADS": "4", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
