"""What `compress` promises of every method, whoever wrote it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.codec import measure
from moebound.codec.fields import checksum, put_varint
from moebound.errors import BoundViolatedError, FormatError, MethodError
from moebound.methods import (
    Encoding,
    ExpertView,
    GroupView,
    MatrixSpec,
    Method,
    Payload,
    RouterEdit,
    SharedPayload,
    Stored,
    compress,
    compress_expert,
    get_method,
)
from moebound.methods.blob import MAGIC, parse_matrix
from moebound.methods.reading import OpenPart
from moebound.types import Array, ErrorBound, ExpertKey

from .made import MeanAndRest, Plain

KEY = ExpertKey(3, 0)
DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]


def weights(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    drawn = 0.05 * np.random.default_rng(seed).standard_normal(shape)
    return np.ascontiguousarray(drawn.astype(dtype))


def expert(number: int = 0, **options: Any) -> ExpertView:
    gate, up, down = (weights(*s, seed=3 * number + i, **options)
                      for i, s in enumerate([(6, 8), (6, 8), (8, 6)]))  # fmt: skip
    return ExpertView(ExpertKey(3, number), {"gate": gate, "up": up, "down": down})


def layer(n: int = 3) -> GroupView:
    return GroupView(tuple(expert(number) for number in range(n)))


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES), bits=st.integers(2, 8), group=st.integers(2, 64),
    coded=st.booleans(),
)  # fmt: skip
def test_bytes_decode_to_what_was_measured(
    rows: int, columns: int, seed: int, dtype: Any, bits: int, group: int, coded: bool
) -> None:
    matrix = weights(rows, columns, seed=seed, dtype=dtype)
    method = get_method(f"rtn:int{bits}:g{group}" + (":coded" if coded else ""))
    artifact = compress_expert(method, ExpertView(KEY, {"up": matrix}))
    made = artifact.experts[KEY]["up"]
    again = Stored.of(made.data).decode()
    assert again.dtype == matrix.dtype
    assert again.tobytes() == made.decoded.tobytes()
    found = measure(matrix, again, np.inf)
    certificate = made.certificate
    assert (certificate.max_abs_error, certificate.rmse) == (found.max_abs_error, found.rmse)
    assert (certificate.guarantee, certificate.bound) == ("none", None)
    assert certificate.method == method.setting
    assert artifact.n_bytes == len(made.data) == certificate.n_bytes
    out = np.empty_like(matrix)
    Stored.of(made.data).decode_into(out)
    assert out.tobytes() == again.tobytes()


@pytest.mark.parametrize("mode", ["abs", "rate", "range", "rmse"])
def test_a_codec_is_a_method(mode: Any) -> None:
    bound = ErrorBound(0.01 if mode == "abs" else 0.1, mode)
    view = expert()
    artifact = compress_expert(
        get_method("bound"),
        ExpertView(view.key, view.matrices, dict.fromkeys(view.matrices, bound)),
    )
    assert artifact.guarantee == ("rmse" if mode == "rmse" else "max_abs")
    assert get_method("bound").setting == "bounded:bound"
    for role, made in artifact.experts[view.key].items():
        assert made.certificate.bound == bound
        assert Stored.of(made.data).decode().tobytes() == made.decoded.tobytes(), role


def test_shared_parts_are_counted_and_belong_to_their_matrices() -> None:
    artifact = compress(get_method("mean_rest"), layer(), number=7)
    own = sum(len(matrix.data) for matrix in artifact)
    assert artifact.n_bytes == own + sum(map(len, artifact.shared))
    parts = {(7, i): OpenPart.of(blob, 7, i) for i, blob in enumerate(artifact.shared)}
    for key, matrices in artifact.experts.items():
        for role, made in matrices.items():
            stored = Stored.of(made.data)
            assert stored.needs == ((7, made.uses[0]),)
            again = stored.decode(lambda group, number: parts[group, number])
            assert again.tobytes() == artifact.weights(key)[role].tobytes()
    some = Stored.of(artifact.experts[ExpertKey(3, 0)]["up"].data)
    with pytest.raises(FormatError, match=r"moebound\.shared\.7\.1 is missing"):
        some.decode()
    # Another layer's part of the same shape and number is not taken for it.
    other = compress(get_method("mean_rest"), GroupView((expert(5), expert(6))), number=7)
    with pytest.raises(FormatError, match=r"moebound\.shared\.7\.1 is another"):
        some.decode(lambda group, number: OpenPart.of(other.shared[number], group, number))
    with pytest.raises(FormatError, match="is part 0 of group 7"):
        OpenPart.of(artifact.shared[0], 7, 1)


class Raises(Plain):
    id = "raises"

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        raise KeyError("inside")


class OtherShape(Plain):
    id = "other_shape"

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        return np.zeros((1, 2), np.float32)


class Forgets(Plain):
    id = "forgets"

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        found = super().encode(group)
        return Encoding({key: {"up": m["up"]} for key, m in found.matrices.items()})


class Unannounced(Plain):
    id = "unannounced"

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        return Encoding(super().encode(group).matrices, shared=[SharedPayload(b"x", 1)])


class SecretEdit(Plain):
    id = "secret_edit"

    def edit(self, group: GroupView) -> RouterEdit | None:
        return RouterEdit(group.layer, keep=(0,))


class NotLossless(Plain):
    id = "not_lossless"

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        return super().decode(payload, spec, shared) + np.float32(1e-3)


class NoPayload(Plain):
    id = "no_payload"

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        found: Any = {e.key: dict.fromkeys(e.matrices, b"bytes") for e in group.experts}
        return Encoding(found)


class FarPart(Plain):
    id = "far_part"

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        return Encoding(
            {e.key: dict.fromkeys(e.matrices, Payload(b"", (4,))) for e in group.experts}
        )


BAD: list[tuple[type[Method], str]] = [
    (Raises, "'raises': KeyError: 'inside'"),
    (OtherShape, r"'other_shape': layer 3 expert 0, gate: decodes to \(1, 2\), expected"),
    (Forgets, r"'forgets': layer 3 expert 0: encoded are \['up'\], expected"),
    (Unannounced, "'unannounced': 1 shared parts, announced were 0"),
    (SecretEdit, "'secret_edit': a router edit from a method that says it makes none"),
    (NotLossless, "'not_lossless': layer 3 expert 0, gate: says it is lossless"),
    (NoPayload, "'no_payload': layer 3 expert 0, gate: bytes, expected a Payload"),
    (FarPart, "'far_part': layer 3 expert 0, gate: uses shared part 4 of 0"),
]


@pytest.mark.parametrize(("cls", "message"), BAD)
def test_a_method_that_fails_names_itself(cls: type[Method], message: str) -> None:
    with pytest.raises((MethodError, BoundViolatedError), match=f"method {message}"):
        compress(cls(), layer(1))


def test_what_does_not_go_together() -> None:
    view = expert()
    bound = dict.fromkeys(view.matrices, ErrorBound(0.1))
    with pytest.raises(MethodError, match="'rtn:int4:g64' knows no bound"):
        compress_expert(get_method("rtn:int4:g64"), ExpertView(KEY, view.matrices, bound))
    with pytest.raises(MethodError, match="'bounded:bound' needs a bound"):
        compress_expert(get_method("bound"), view)
    with pytest.raises(MethodError, match="looks at a layer at a time"):
        compress_expert(get_method("mean_rest"), view)
    with pytest.raises(
        MethodError, match=r"'nosuch': unknown\. Known here: .*bounded, .*, rtn.*sz3"
    ):
        get_method("nosuch")

    class Asks(Plain):
        id = "asks"
        statistics = frozenset({"hessian"})

    with pytest.raises(MethodError, match="needs statistics that were not gathered: hessian"):
        compress(Asks(), layer(1))


# Hostile bytes


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", checksum(body))


@pytest.mark.parametrize("setting", ["rtn:int3:g5", "rtn:int4:g64:coded"])
def test_every_flipped_byte_is_noticed(setting: str) -> None:
    data = compress_expert(get_method(setting), ExpertView(KEY, {"up": weights(4, 7)}))
    blob = bytearray(data.experts[KEY]["up"].data)
    for at in range(len(blob)):
        blob[at] ^= 0x41
        with pytest.raises(FormatError):
            Stored.of(blob)
        blob[at] ^= 0x41


@given(st.data())
@settings(max_examples=200)
def test_damaged_payloads_with_a_good_checksum_never_crash(data: st.DataObject) -> None:
    setting = data.draw(st.sampled_from(["rtn:int3:g5", "rtn:int8:g4", "rtn:int4:g8:coded"]))
    made = compress_expert(get_method(setting), ExpertView(KEY, {"up": weights(4, 7)}))
    blob = bytearray(made.experts[KEY]["up"].data[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(5, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    try:
        again = Stored.of(sealed(bytes(blob[: len(blob) - cut]))).decode()
    except (FormatError, MethodError):
        return
    assert again.size <= 4 * 7 * 300


def test_a_forged_shape_asks_for_no_memory() -> None:
    head = bytearray(MAGIC) + bytes([1, 0, 3]) + b"rtn" + bytes([1, 2, 2])
    for value in (1 << 20, 1 << 19, 0, 4):
        put_varint(head, value)
    forged = sealed(bytes(head) + b"\4\0\2x")
    with pytest.raises(FormatError, match="4 bytes of method 'rtn' stand for at most"):
        Stored.of(forged).decode()


def test_newer_and_unknown_methods_are_named() -> None:
    made = compress_expert(Plain(), ExpertView(KEY, {"up": weights(2, 2)}))
    blob = made.experts[KEY]["up"].data
    assert parse_matrix(blob).method == "plain"
    newer = bytearray(blob[:-4])
    newer[7 + len("plain")] = 9
    with pytest.raises(FormatError, match="method 'plain' version 9: here it is at version 1"):
        Stored.of(sealed(bytes(newer))).decode()
    stranger = Stored.of(sealed(blob[:-4].replace(b"plain", b"other")))
    with pytest.raises(MethodError, match="'other': unknown"):
        stranger.decode()


def test_router_edits_that_contradict_themselves() -> None:
    vector = np.ones(4, np.float32)
    for bad, message in (
        ({"keep": (0, 0)}, "expected different experts"),
        ({"keep": (0,), "alias": {1: 0}}, "expert 1 is never chosen"),
        ({"alias": {1: 0}, "constants": {1: vector}}, "an alias and a constant"),
        ({"alias": {1: 2, 2: 0}}, "is none that computes"),
        ({"constants": {1: vector, 2: vector[:2]}}, "different lengths"),
    ):
        with pytest.raises(MethodError, match=message):
            RouterEdit(0, **bad)


@given(
    keep=st.none() | st.sets(st.integers(4, 9), min_size=1),
    constants=st.dictionaries(st.integers(4, 9), st.integers(-9, 9), max_size=3),
    width=st.integers(1, 5),
)
def test_router_edits_come_back(
    keep: set[int] | None, constants: dict[int, int], width: int
) -> None:
    vectors = {
        expert: np.full(width, value, np.float32)
        for expert, value in constants.items()
        if keep is None or expert in keep
    }
    edit = RouterEdit(2, None if keep is None else tuple(sorted(keep)), {}, vectors)
    again = RouterEdit.from_bytes(edit.to_bytes())
    assert again.describe() == edit.describe()
    assert all((again.constants[e] == v).all() for e, v in vectors.items())
    for cut in (1, len(edit.to_bytes()) // 2):
        with pytest.raises(FormatError):
            RouterEdit.from_bytes(edit.to_bytes()[:-cut])


def test_mean_and_rest_is_close() -> None:
    artifact = compress(MeanAndRest(), layer())
    assert 0 < artifact.max_abs_error < 1e-4
    assert 0 < artifact.rmse < artifact.max_abs_error


def test_an_expert_may_put_out_a_constant() -> None:
    artifact = compress(get_method("constant"), layer(4))
    found = {key.expert: artifact.constant(key) for key in artifact.experts}
    assert [expert for expert, vector in found.items() if vector is not None] == [1, 3]
    assert found[1] is not None
    assert found[1].shape == (8,)
    assert artifact.router_blob is not None
    plain = compress(Plain(), layer(1))
    assert plain.constant(KEY) is None
    assert artifact.n_bytes == sum(len(m.data) for m in artifact) + len(artifact.router_blob)
