"""Hostile payloads of methods: what they say takes no memory before it is compared, and what is
written can be read again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moebound import encode
from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import CorruptionError, FormatError, MethodError
from moebound.methods import ExpertView, MatrixSpec, Payload, compress_expert, get_method
from moebound.methods.artifact import named
from moebound.methods.blob import MatrixBlob, RouterBlob, SharedBlob, Use, parse_matrix
from moebound.methods.hqq import Hqq
from moebound.methods.packing import _PIECE, pack, packed_bytes, unpack
from moebound.methods.reading import Stored
from moebound.methods.router_edit import RouterEdit
from moebound.methods.rtn import Rtn
from moebound.types import NUMPY_DTYPES, ExpertKey
from peak_memory import peak_bytes

MB = 1 << 20


def rtn_payload(group: int, rest: bytes, *, bits: int = 4, coded: bool = False) -> memoryview:
    head = bytearray([bits, int(coded)])
    put_varint(head, group)
    return memoryview(bytes(head) + rest)


def blob(payload: memoryview, shape: tuple[int, ...], method: str = "rtn") -> bytes:
    return MatrixBlob(method, 1, shape, "BF16", 0, (), payload).build()


@pytest.mark.parametrize("setting", ["rtn:int4:g1000000000000", "rtn:int3:g10000000:coded"])
def test_a_group_larger_than_the_matrix_takes_no_room(setting: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((6, 8)).astype(NUMPY_DTYPES["BF16"])
    found = [matrix]

    def there_and_back() -> None:
        view = ExpertView(ExpertKey(0, 0), {"gate": matrix})
        made = compress_expert(get_method(setting), view).experts[view.key]["gate"]
        found.append(Stored.of(made.data).decode())
        assert np.array_equal(found[-1], made.decoded)

    assert peak_bytes(there_and_back) < 4 * MB
    assert np.abs(found[-1].astype(np.float32) - matrix.astype(np.float32)).max() < 0.5


def test_the_same_weights_whether_the_group_is_the_matrix_or_larger() -> None:
    matrix = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    exact, larger = (Rtn(4, group).quantized(matrix) for group in (48, 1 << 40))
    spec = MatrixSpec((6, 8), "F32")
    decoded = [Rtn.decode(memoryview(data), spec, ()) for data in (exact, larger)]
    assert np.array_equal(decoded[0], decoded[1])


def test_a_forged_shape_takes_no_memory() -> None:
    small = encode(np.zeros((4, 8), np.float32), 0.25)
    for shape in ((1 << 14, 1 << 14), (1 << 20, 1 << 20)):
        for coded in (False, True):
            rest = bytes(3) + (small if coded else b"")
            for method in ("rtn", "hqq"):
                data = blob(rtn_payload(1 << 40, rest, coded=coded), shape, method)

                def refused(data: bytes = data) -> None:
                    with pytest.raises(FormatError):
                        Stored.of(data).decode()

                assert peak_bytes(refused) < MB


def test_a_matrix_beyond_what_is_expected() -> None:
    data = blob(rtn_payload(64, bytes(100)), (4, 8))
    with pytest.raises(FormatError, match=r"shape \(4, 8\) of BF16, 64 bytes: at most 63"):
        Stored.of(data).decode(max_bytes=63)
    with pytest.raises(CorruptionError, match="method 'rtn'"):
        Stored.of(data).decode(max_bytes=64)


@pytest.mark.parametrize("bits", range(2, 9))
def test_decoding_takes_a_small_multiple(bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((512, 1000)).astype(NUMPY_DTYPES["BF16"])
    for coded in ("", ":coded"):
        method = get_method(f"rtn:int{bits}:g64{coded}")
        view = ExpertView(ExpertKey(0, 0), {"gate": matrix})
        data = compress_expert(method, view).experts[view.key]["gate"].data
        assert peak_bytes(lambda data=data: Stored.of(data).decode()) < 6 * matrix.nbytes + MB  # type: ignore[misc]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, _PIECE - 1, _PIECE, _PIECE + 1, 2 * _PIECE + 13])
def test_integers_come_back_whatever_pieces_they_are_packed_in(bits: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(0, 1 << bits, count, np.uint8)
    packed = pack(codes, bits)
    assert len(packed) == packed_bytes(count, bits)
    number = int.from_bytes(packed[:800], "little")
    assert [number >> i * bits & (1 << bits) - 1 for i in range(min(count, 800))] == (
        codes[:800].tolist()
    )
    assert np.array_equal(unpack(memoryview(packed), count, bits), codes)


@pytest.mark.parametrize("method", [Rtn, Hqq])
@pytest.mark.parametrize(
    "options",
    [
        (True,),
        (0,),
        (9,),
        (4.0,),
        ("4",),
        (4, True),
        (4, 1),
        (4, (1 << 40) + 1),
        (4, 64.0),
        (4, 64, 0),
        (4, 64, 1),
        (4, 64, "coded"),
    ],
)
def test_options_that_no_payload_can_say(method: Any, options: tuple[Any, ...]) -> None:
    with pytest.raises(MethodError, match="expected"):
        method(*options)


@pytest.mark.parametrize(
    "setting", ["rtn:int4:g" + "9" * 5000, "rtn:int4:g²", "hqq:int4:g0", "rtn:int4:g9999999999999"]
)
def test_settings_that_no_payload_can_say(setting: str) -> None:
    with pytest.raises(MethodError, match="groups of 2 weights or more"):
        get_method(setting)


@pytest.mark.parametrize("shape", [(1,) * 9, ((1 << 40) + 1, 0), (1 << 21, 1 << 20)])
def test_a_shape_that_no_reader_takes_is_not_written(shape: tuple[int, ...]) -> None:
    with pytest.raises(MethodError, match=r"dimensions: at most 8|at most 2\^40"):
        blob(memoryview(b""), shape)


def test_shapes_at_the_limit_are_read() -> None:
    for shape in ((1,) * 8, (1 << 40, 0)):
        assert parse_matrix(blob(memoryview(b""), shape)).shape == shape


@pytest.mark.parametrize("value", [-1, 1 << 63, True])
def test_a_number_that_no_varint_holds_is_not_written(value: int) -> None:
    nothing = memoryview(b"")
    for made in (
        SharedBlob("rtn", 1, value, 0, 0, nothing),
        SharedBlob("rtn", 1, 0, value, 0, nothing),
        SharedBlob("rtn", 1, 0, 0, value, nothing),
        RouterBlob("rtn", 1, value, nothing),
        MatrixBlob("rtn", 1, (2, 2), "F32", value, (Use(0, 0),), nothing),
        MatrixBlob("rtn", 1, (2, 2), "F32", 0, (Use(value, 0),), nothing),
    ):
        with pytest.raises(MethodError, match="expected 0 or more, at most 63 bits"):
            made.build()


def test_a_memory_error_says_nothing_of_the_bytes() -> None:
    with (
        pytest.raises(MemoryError, match=r"^method 'x': out of memory: 7 GiB$"),
        named("method 'x'", CorruptionError),
    ):
        raise MemoryError("7 GiB")


def test_things_that_are_no_bytes() -> None:
    for thing in ("MOEM", memoryview(bytes(64))[::2]):
        with pytest.raises(FormatError, match="expected contiguous bytes"):
            parse_matrix(thing)  # type: ignore[arg-type]
    assert FieldReader(memoryview(b""), 0).left == 0
    assert Payload(b"").uses == ()


def test_a_scale_that_no_encoder_writes() -> None:
    scale = np.array([np.inf], "<f2").tobytes()
    data = blob(rtn_payload(64, scale + bytes(1) + bytes(16)), (4, 8))
    with pytest.raises(CorruptionError, match="a scale that is not finite"):
        Stored.of(data).decode()


@pytest.mark.parametrize(
    "changes",
    [
        b'"alias":{"1":3,"01":4}',
        b'"alias":{"1_0":3}',
        b'"alias":{" 1":3}',
        b'"constants":[2,2]',
        b'"constants":[2,1]',
        b'"alias":{"' + b"9" * 5000 + b'":3}',
        b'"layer":1e2',
    ],
)
def test_a_router_edit_says_each_expert_once(changes: bytes) -> None:
    fields = {b"layer": b'"layer":0', b"keep": b'"keep":null', b"alias": b'"alias":{}'}
    fields |= {b"constants": b'"constants":[]', changes.split(b'"')[1]: changes}
    line = b"{" + b",".join(fields.values()) + b"}\n"
    with pytest.raises(CorruptionError, match="router edit"):
        RouterEdit.from_bytes(line + bytes(8 if b"constants" in changes else 0))
    good = RouterEdit(0, None, {1: 3}, {2: np.ones(2, np.float32)})
    assert RouterEdit.from_bytes(good.to_bytes()).describe() == good.describe()
