"""Quantizers of papers: bytes by formula, what each gains over rounding, and bytes as written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebound.errors import CorruptionError, MethodError, MoeboundError
from moebound.methods import (
    ExpertView,
    GroupView,
    MatrixSpec,
    Stored,
    compress,
    get_method,
    method_class,
)
from moebound.methods.blob import parse_matrix
from moebound.methods.feedback import damped, upper_factor
from moebound.methods.quantizing.moequant import steps
from moebound.methods.rtn import asymmetric
from moebound.types import NUMPY_DTYPES, Array, ExpertKey

KEY = ExpertKey(0, 0)
FIXTURE = Path(__file__).parent / "fixtures" / "payloads-1.json"
SETTINGS = ["gptq_re:int3:g7", "gptq_re:int4:g128:coded", "awq_re:int2:g5", "awq_re:int4:g8:coded",
            "moqe_re:int2", "moqe_re:int8:coded"]  # fmt: skip
"""Those of the fixture; test_qmoe.py has another."""


def moments(n: int, seed: int = 0) -> Array:
    """H of inputs that hang together, of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * n, n)) @ (rng.standard_normal((n, n)) * np.exp(rng.normal(size=n)))
    found: Array = x.T @ x
    return found


def weights_of(rows: int, cols: int, seed: int = 1) -> Array:
    found: Array = (0.02 * np.random.default_rng(seed).standard_normal((rows, cols))).astype("f4")
    return found


def group(weights: Array, h: Array, *, transposed: bool = False) -> GroupView:
    roles = frozenset({"up"}) if transposed else frozenset()
    view = ExpertView(KEY, {"up": weights}, None, roles)  # type: ignore[arg-type]
    return GroupView((view,), {"inputs": {KEY: h}, "hidden": {KEY: h}})


def made(setting: str, weights: Array, h: Array, *, transposed: bool = False) -> tuple[Array, int]:
    """Decoded weights, and bytes of the payload."""
    found = compress(get_method(setting), group(weights, h, transposed=transposed))
    matrix = found.experts[KEY]["up"]
    assert matrix.certificate.guarantee == "none"
    assert np.array_equal(Stored.of(matrix.data).decode(), matrix.decoded)
    return found.weights(KEY)["up"], len(parse_matrix(matrix.data).payload)


def cost(weights: Array, decoded: Array, h: Array) -> float:
    error = weights.astype(np.float64) - decoded.astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, h, error))


@given(
    rows=st.integers(1, 9), cols=st.integers(2, 30), bits=st.integers(2, 8),
    size=st.integers(2, 40), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_bytes_by_formula_are_bytes_on_disk(
    rows: int, cols: int, bits: int, size: int, seed: int
) -> None:
    w, h = weights_of(rows, cols, seed), moments(cols, seed)
    groups = rows * -(-cols // size)
    integers, head = -(-rows * cols * bits // 8), 3  # bits, flags, group
    own = 2 * groups + -(-groups * bits // 8)
    assert made(f"gptq_re:int{bits}:g{size}", w, h)[1] == integers + own + head
    assert made(f"awq_re:int{bits}:g{size}", w, h)[1] == integers + own + 2 * cols + head
    assert made(f"moqe_re:int{bits}", w, h)[1] == integers + 2 * rows + head
    assert made(f"moequant_re:int{bits}", w, h)[1] == integers + 2 * rows + head
    assert made(f"moequant_re:int{bits}:g{size}", w, h)[1] == integers + 2 * groups + head


@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_leaves_a_fifth_of_what_rounding_does(bits: int) -> None:
    """Inputs of an AR(1) process (0.9), channels of log-normal size: 0.22 of the error. AWQ, which
    hands no errors on, is between the two."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, 256))
    for j in range(1, 256):
        x[:, j] = 0.9 * x[:, j - 1] + np.sqrt(0.19) * x[:, j]
    x *= np.exp(rng.standard_normal(256))
    w, h = weights_of(128, 256), x.T @ x
    plain = cost(w, made(f"rtn:int{bits}:g128", w, h)[0], h)
    assert 0.17 < cost(w, made(f"gptq_re:int{bits}:g128", w, h)[0], h) / plain < 0.27
    assert 0.17 < cost(w, made(f"moequant_re:int{bits}:g128", w, h)[0], h) / plain < 0.27
    assert 0.27 < cost(w, made(f"awq_re:int{bits}:g128", w, h)[0], h) / plain < 0.7


@pytest.mark.parametrize("size", [16, 20, 128, 500])
def test_gptq_is_algorithm_1(size: int) -> None:
    """Against the textbook's loop: updated weights, and the grid of each group taken from them."""
    w, h = weights_of(6, 100), moments(100)
    upper = torch.linalg.inv(upper_factor(damped(torch.from_numpy(h), 0.01))).numpy()
    work, wanted = w.astype(np.float64), np.empty((6, 100))
    for j in range(100):
        if j % size == 0:
            part = work[:, j : j + size].astype(np.float32)
            _, step, zero = (found[:, 0] for found in asymmetric(part, 4))
        q = np.clip(np.rint(work[:, j] / step + zero), 0, 15)
        wanted[:, j] = (q - zero) * step
        work[:, j:] -= ((work[:, j] - wanted[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    found, _ = made(f"gptq_re:int4:g{size}", w, h)
    assert (np.abs(found - wanted) < 1e-6).mean() > 0.98  # float32 against float64: ties
    assert cost(w, found, h) == pytest.approx(cost(w, wanted, h), rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_moequant_clips_by_the_power_of_2_4(bits: int) -> None:
    """The steps of each row against every one of the 80, one by one; and feedback on them."""
    w, top = weights_of(5, 60), 2 ** (bits - 1) - 1
    w[0, 3] *= 5
    w[4] = 0
    found = steps(w, bits)
    for row, step in zip(w.astype(np.float64), found[:, 0].astype(np.float64), strict=True):
        tried = max(np.abs(row).max(), 1e-5) / top * (1 - np.arange(80) / 100)
        q = np.clip(np.rint(row / tried[:, None]), -top - 1, top) * tried[:, None]
        best = tried[(np.abs(q - row) ** 2.4).sum(axis=1).argmin()]
        assert step == pytest.approx(best, rel=2**-10, abs=2**-24)
    assert (bits > 3) or found[0, 0] < np.abs(w[0]).max() / top  # the outlier is clipped
    h = moments(60)
    codes = get_method(f"moequant_re:int{bits}").fitted(w, h)  # type: ignore[attr-defined]
    assert np.array_equal(codes.scale, found)  # of the weights as they were
    assert cost(w, made(f"moequant_re:int{bits}", w, h)[0], h) < cost(
        w, np.clip(np.rint(w / found), -top - 1, top) * found.astype("f4"), h
    )


@pytest.mark.parametrize("h", [np.zeros((24, 24)), np.ones(24)])
def test_moequant_without_moments_rounds_to_the_nearest(h: Array) -> None:
    w = weights_of(8, 24)
    step = steps(w, 4).astype(np.float32)
    wanted = np.clip(np.rint(w / step), -8, 7) * step
    assert np.array_equal(made("moequant_re:int4", w, h)[0], wanted)


@pytest.mark.parametrize("h", [np.zeros((24, 24)), np.ones(24)])
def test_gptq_without_moments_or_off_diagonals_rounds_to_the_nearest(h: Array) -> None:
    """Released code for experts zeroes an expert that saw no token."""
    w = weights_of(8, 24)
    assert np.array_equal(made("gptq_re:int4:g8", w, h)[0], made("rtn:int4:g8", w, h)[0])


def test_awq_without_tokens_rounds_to_the_nearest() -> None:
    w = weights_of(8, 24)
    found = made("awq_re:int4:g8", w, np.zeros((24, 24)))[0]
    assert np.array_equal(found, made("rtn:int4:g8", w, np.zeros(1))[0])


def test_awq_spares_the_channels_that_carry_much() -> None:
    w, h = weights_of(64, 64), np.diag(np.where(np.arange(64) % 16 == 3, 1e4, 1.0))
    error = np.square(w - made("awq_re:int3:g64", w, h)[0]).mean(axis=0)
    plain = np.square(w - made("rtn:int3:g64", w, h)[0]).mean(axis=0)
    assert error[3::16].mean() < 0.3 * plain[3::16].mean()


def test_moqe_by_hand() -> None:
    # The scale of 2 · 6 / 3 is 4; 6 is 1.5 steps, which would go to 2: the grid ends at 1.
    w = np.array([[-6, -1.9, 2.1, 6], [0, 0, 0, 0], [-3, 0.9, 1.1, 0]], np.float32)
    found, _ = made("moqe_re:int2", w, moments(4))
    assert found.tolist() == [[-8, 0, 4, 4], [0, 0, 0, 0], [-4, 0, 2, 0]]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_matrix_that_lies_the_other_way_has_the_same_weights(setting: str) -> None:
    w, h = weights_of(10, 18), moments(18)
    upright = made(setting, w, h)[0]
    turned = made(setting, np.ascontiguousarray(w.T), h, transposed=True)[0]
    assert np.array_equal(turned.T, upright)


@pytest.mark.parametrize("setting", [*SETTINGS, "moequant_re:int4", "moequant_re:int2:coded",
                                     "moequant_re:int3:g8:affinity:coded"])  # fmt: skip
def test_settings_are_what_was_asked(setting: str) -> None:
    assert get_method(setting).setting == setting


@pytest.mark.parametrize("setting", ["moqe_re", "moqe_re:int9", "moqe_re:int4:g64", "gptq_re",
                                     "awq_re:int1:g64", "gptq_re:int4:g1", "moequant_re",
                                     "moequant_re:int4:g1", "moequant_re:g64"])  # fmt: skip
def test_options_that_are_none(setting: str) -> None:
    with pytest.raises(MethodError, match="int2 to int8"):
        get_method(setting)


def test_what_they_cannot_take() -> None:
    w, h = weights_of(4, 8), moments(8)
    with pytest.raises(MethodError, match="statistics of 8; expected statistics of this model"):
        made("gptq_re:int4:g4", weights_of(4, 9), h)
    for value in (np.inf, np.nan, 3e38):
        w[1, 2] = value
        for setting in ("gptq_re:int4:g4", "awq_re:int4:g4", "moqe_re:int4", "moequant_re:int4"):
            with pytest.raises(MethodError, match=r"not finite|beyond float16"):
                made(setting, w, h)


def payload(flags: int, *, bits: int = 4, size: int = 4, body: bytes = b"") -> memoryview:
    return memoryview(bytes([bits, flags, size]) + body)


SCALES = np.ones(4, "<f2").tobytes()


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (payload(4, body=SCALES + bytes(9)), (2, 8)),  # a byte too many
        (payload(4, body=SCALES + bytes(7)), (2, 8)),
        (payload(4, body=np.full(4, np.nan, "<f2").tobytes() + bytes(8)), (2, 8)),
        (payload(12, body=SCALES + np.full(8, np.inf, "<f2").tobytes() + bytes(8)), (2, 8)),
        (payload(0, body=SCALES + bytes(8)), (2, 8)),  # zero points are missing
        (payload(16, body=SCALES + bytes(8)), (2, 8)),
        (payload(4, bits=9, body=SCALES + bytes(8)), (2, 8)),
        (payload(4, bits=1, body=SCALES + bytes(8)), (2, 8)),
        (payload(4, size=0, body=SCALES + bytes(8)), (2, 8)),
        (payload(4, size=9, body=SCALES + bytes(8)), (2, 8)),
        (payload(4, body=SCALES + bytes(8)), (16,)),
        (payload(5, body=SCALES + bytes(8)), (2, 8)),  # no envelope
        (payload(4), (1 << 20, 1 << 20)),  # before memory is taken
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["gptq_re", "awq_re", "moqe_re", "moequant_re"])
def test_bytes_that_none_of_them_wrote(
    method: str, data: memoryview, shape: tuple[int, ...]
) -> None:
    with pytest.raises(MoeboundError) as caught:
        method_class(method).decode(data, MatrixSpec(shape, "F32"), [])
    if not data[1] & 1:
        assert isinstance(caught.value, CorruptionError)


def test_by_the_table_of_the_format() -> None:
    """docs/format-method.md, section 22, with columns, zero points and [N, O]."""
    scale, zero = np.array([2, 0, 0.5, 1], "<f2"), bytes([0x10, 0x32])
    columns = np.array([1, 2, 4], "<f2")
    q = bytes([0x21, 0x43, 0x65])  # 1 2 3 / 4 5 6
    body = scale.tobytes() + zero + columns.tobytes() + q
    found = method_class("awq_re").decode(
        payload(10, size=2, body=body), MatrixSpec((3, 2), "F32"), []
    )
    assert found.T.tolist() == [[2, 8, 8], [1, 3, 12]]


@pytest.mark.parametrize("setting", SETTINGS)
def test_bytes_of_version_1_decode_to_the_same_bits(setting: str) -> None:
    check_frozen(FIXTURE, setting)


def check_frozen(fixture: Path, setting: str) -> None:
    stored = json.loads(fixture.read_text(encoding="utf-8"))[setting]
    found = Stored.of(bytes.fromhex(stored["data"])).decode()
    assert hashlib.sha256(found.tobytes()).hexdigest() == stored["sha256"]


def write_fixture(
    fixture: Path = FIXTURE, settings: Sequence[str] = SETTINGS, columns: int = 18
) -> None:
    """How one was made. None is ever written again."""
    found = {}
    for number, setting in enumerate(settings):
        w = weights_of(6, columns).astype(NUMPY_DTYPES["BF16"])
        flip = number % 2 == 1
        view = group(np.ascontiguousarray(w.T) if flip else w, moments(columns), transposed=flip)
        one = compress(get_method(setting), view).experts[KEY]["up"]
        digest = hashlib.sha256(one.decoded.tobytes()).hexdigest()
        found[setting] = {"data": one.data.hex(), "sha256": digest}
    fixture.parent.mkdir(exist_ok=True)
    fixture.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
