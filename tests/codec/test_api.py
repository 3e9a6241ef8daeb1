"""`encode` and `decode`: bounds of every mode, dtype=, out=, tensors, threads, certificates."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
import torch

from moebound import ErrorBound, decode, encode
from moebound.codec import Certificate, encode_certified, parse, registry, stats, thread_count
from moebound.codec.api import decode_into
from moebound.codec.base import ArraySpec, Payload
from moebound.codec.raw import RawCodec
from moebound.errors import BoundError, BoundViolatedError, CodecError, CorruptionError, FormatError
from moebound.types import Array

from .weights import broken, gaussian


class Liar(RawCodec):
    """Says that it keeps the bound, and does not."""

    id: ClassVar[str] = "liar"
    keeps_bound: ClassVar[bool] = True
    lossy: ClassVar[bool] = True

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        return super().compress(x + x.dtype.type(2 * spec.abs_bound), spec)


class Threads(RawCodec):
    """Writes down how many threads it was given."""

    id: ClassVar[str] = "threads"
    seen: ClassVar[list[int]] = []

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        self.seen.append(threads)
        return super().compress(x, spec)

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        self.seen.append(threads)
        super().decompress(data, spec, out)


@pytest.fixture(autouse=True)
def _known_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Liar, Threads):
        monkeypatch.setitem(registry.CODECS.classes, cls.id, cls)


def _error(array: Array, data: bytes) -> Array:
    decoded = np.asarray(decode(data)).astype(np.float64)
    found: Array = np.abs(array.astype(np.float64) - decoded)
    return found


class TestBoundModes:
    array = gaussian((64, 96), "F32", scale=0.02) + np.float32(0.01)
    x = array.astype(np.float64)

    @pytest.mark.parametrize(
        ("bound", "limit"),
        [
            (0.003, 0.003),
            (ErrorBound(0.003), 0.003),
            (ErrorBound(0.2, "rate"), 0.2 * np.abs(x).mean()),
            (ErrorBound(0.2, "rate", "expert"), 0.2 * np.abs(x).mean()),
            (ErrorBound(0.01, "range"), 0.01 * (x.max() - x.min())),
        ],
    )
    def test_pointwise(self, bound: float | ErrorBound, limit: float) -> None:
        data = encode(self.array, bound, codec="sz3")
        assert parse(data).spec.abs_bound == pytest.approx(limit, rel=1e-12)
        worst = _error(self.array, data).max()
        assert 0.95 * limit < worst <= limit * (1 + 1e-12)

    @pytest.mark.parametrize("value", [0.3, 0.05, 0.001])
    def test_rmse_is_an_average_promise(self, value: float) -> None:
        data = encode(self.array, ErrorBound(value, "rmse"), codec="sz3")
        errors = _error(self.array, data)
        rms, rmse = np.sqrt((self.x**2).mean()), np.sqrt((errors**2).mean())
        assert 0.9 * value * rms < rmse <= value * rms
        assert errors.max() > value * rms

    def test_rmse_where_the_first_try_misses(self) -> None:
        """Two-point errors have RMSE = ε, not ε/√3: the encoder must lower ε."""
        array = np.tile(np.array([0.5, 1.5], np.float32), 500)
        bound = ErrorBound(0.46, "rmse")
        rms = np.sqrt((array.astype(np.float64) ** 2).mean())
        assert bound.absolute(stats(array)) > 0.5
        data = encode(array, bound, codec="sz3")
        assert np.sqrt((_error(array, data) ** 2).mean()) <= 0.46 * rms

    @pytest.mark.parametrize("mode", ["rate", "range", "rmse"])
    def test_relative_to_nothing_is_an_exact_copy(self, mode: Any) -> None:
        for array in (np.zeros((4, 5), np.float16), np.full(3, np.nan, np.float32)):
            data = encode(array, ErrorBound(0.1, mode), codec="sz3")
            assert parse(data).spec.abs_bound == 0.0
            assert np.array_equal(np.asarray(decode(data)), array, equal_nan=True)

    def test_a_relative_bound_beyond_float64_is_refused(self) -> None:
        with pytest.raises(BoundError, match="inf"):
            encode(np.full(3, 1e30, np.float32), ErrorBound(1e300, "rate"), codec="raw")

    @pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf, True, "0.1", None])
    def test_no_bound(self, bound: Any) -> None:
        with pytest.raises(BoundError):
            encode(self.array, bound, codec="raw")


class TestDtypes:
    def test_decoded_dtype_asked_for(self) -> None:
        array = gaussian((40, 50), "F32")
        for dtype in ("bfloat16", torch.bfloat16, np.dtype(ml_dtypes.bfloat16)):
            data = encode(array, 0.0003, codec="sz3", dtype=dtype)
            decoded = np.asarray(decode(data))
            assert decoded.dtype == ml_dtypes.bfloat16
            assert _error(array, data).max() <= 0.0003
            assert len(parse(data).misses), "rounding to bf16 breaks some of 2000 weights"

    def test_bound_too_fine_for_the_dtype(self) -> None:
        with pytest.raises(BoundError, match="another dtype"):
            encode(gaussian((40, 50), "F32"), 1e-7, codec="sz3", dtype="bfloat16")

    @pytest.mark.parametrize("array", [np.ones(3), np.ones(3, np.int32), [1.0, 2.0], None])
    def test_arrays_that_are_refused(self, array: Any) -> None:
        with pytest.raises(CodecError):
            encode(array, 0.1, codec="raw")

    def test_decoded_dtype_that_is_refused(self) -> None:
        with pytest.raises(CodecError, match="float64"):
            encode(np.ones(3, np.float32), 0.1, codec="raw", dtype=np.dtype(np.float64))


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 3, 2)])
    def test_torch_in_torch_out(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
        decoded = decode(encode(tensor, 0.01, codec="sz3"))
        assert isinstance(decoded, torch.Tensor)
        assert (decoded.dtype, decoded.shape) == (dtype, tensor.shape)
        assert torch.all((decoded.double() - tensor.double()).abs() <= 0.01)

    def test_strided_parameter(self) -> None:
        parameter = torch.nn.Parameter(torch.randn(6, 4).T)
        decoded = decode(encode(parameter, 0.01, codec="sz3"))
        assert isinstance(decoded, torch.Tensor)
        assert torch.all((decoded - parameter).abs() <= 0.01)

    def test_numpy_and_torch_differ_in_the_flag_alone(self) -> None:
        array = gaussian((8, 9), "F32")
        of_numpy, of_torch = (
            encode(a, 0.01, codec="sz3") for a in (array, torch.from_numpy(array))
        )
        assert [i for i in range(len(of_numpy) - 4) if of_numpy[i] != of_torch[i]] == [5]


class TestOut:
    array = gaussian((8, 9))
    data = encode(array, 0.01, codec="sz3")

    def test_array(self) -> None:
        out = np.zeros_like(self.array)
        assert decode(self.data, out=out) is out
        assert not len(broken(self.array, out, 0.01))

    def test_tensor_for_an_array(self) -> None:
        out = torch.zeros(8, 9, dtype=torch.bfloat16)
        assert decode(self.data, out=out) is out
        assert out.float().numpy().tolist() == np.asarray(decode(self.data)).tolist()

    @pytest.mark.parametrize("out", [np.zeros((9, 8), ml_dtypes.bfloat16), torch.zeros(8, 9)])
    def test_that_does_not_fit(self, out: Any) -> None:
        with pytest.raises(CodecError, match="out: expected"):
            decode(self.data, out=out)


class TestThreads:
    def test_environment_caps_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOEBOUND_THREADS", "3")
        Threads.seen.clear()
        decode(encode(np.ones(4, np.float32), 0.1, codec="threads"))
        assert set(Threads.seen) == {3}

    def test_default_is_the_cpus_of_this_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MOEBOUND_THREADS", raising=False)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 4, 5}, raising=False)
        assert thread_count() == 3

    @pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
    def test_nonsense(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("MOEBOUND_THREADS", value)
        with pytest.raises(ValueError, match=f"MOEBOUND_THREADS='{value}'"):
            thread_count()

    def test_argument_wins(self) -> None:
        parsed = parse(encode(np.ones(4, np.float32), 0.1, codec="threads"))
        Threads.seen.clear()
        decode_into(parsed, np.empty(4, np.float32), threads=7)
        assert Threads.seen == [7]


class TestCertified:
    array = gaussian((40, 50))

    def test_says_what_was_measured(self) -> None:
        encoded = encode_certified(self.array, ErrorBound(0.3, "rate"), codec="sz3")
        found, errors = encoded.certificate, _error(self.array, encoded.data)
        assert encoded.data == encode(self.array, ErrorBound(0.3, "rate"), codec="sz3")
        assert found.kept
        assert found.max_abs_error == errors.max() <= found.abs_bound
        assert found.rmse == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-12)
        assert (found.codec, found.codec_version, found.shape) == ("sz3", 1, (40, 50))
        assert (found.dtype, found.source_dtype) == ("BF16", "BF16")
        assert found.patched == len(parse(encoded.data).misses)
        assert found.n_bytes == len(encoded.data)
        assert found.bits_per_weight == 8 * len(encoded.data) / 2000
        assert found.sha256_original == hashlib.sha256(self.array.tobytes()).hexdigest()
        assert found.sha256_encoded == hashlib.sha256(encoded.data).hexdigest()

    def test_json_there_and_back(self) -> None:
        found = encode_certified(self.array, ErrorBound(0.3, "rate"), codec="sz3").certificate
        assert Certificate.from_json(json.loads(json.dumps(found.to_json()))) == found

    def test_relative_to_the_whole_expert(self) -> None:
        other = gaussian((30, 50), scale=0.2)
        whole = stats(self.array) + stats(other)
        encoded = encode_certified(
            self.array, ErrorBound(0.1, "rate", "expert"), codec="sz3", reference=whole
        )
        values = np.concatenate([self.array.reshape(-1), other.reshape(-1)]).astype(np.float64)
        expected = 0.1 * np.abs(values).mean()
        assert encoded.certificate.abs_bound == pytest.approx(expected, rel=1e-12)

    def test_an_average_promise_is_kept_on_average(self) -> None:
        found = encode_certified(self.array, ErrorBound(0.2, "rmse"), codec="sz3").certificate
        rms = stats(self.array).rms
        assert found.rmse <= 0.2 * rms < found.max_abs_error
        assert found.kept

    def test_a_codec_that_lies_is_caught(self) -> None:
        with pytest.raises(BoundViolatedError, match=r"'liar' broke its bound: 2000 of 2000"):
            encode_certified(self.array, ErrorBound(0.5), codec="liar")

    def test_empty(self) -> None:
        found = encode_certified(np.empty((0, 4), np.float32), ErrorBound(0.1), codec="sz3")
        assert found.certificate.bits_per_weight == 0.0
        assert found.certificate.kept


class TestOtherBytes:
    def test_later_codec_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Threads, "version", 9)
        data = encode(np.ones(4, np.float32), 0.1, codec="threads")
        monkeypatch.setattr(Threads, "version", 2)
        with pytest.raises(FormatError, match="version 9: this moebound reads up to version 2"):
            decode(data)

    def test_codec_of_another_package(self) -> None:
        class Elsewhere(RawCodec):
            id: ClassVar[str] = "elsewhere"

        data = encode(np.ones(4, np.float32), 0.1, codec=Elsewhere())
        with pytest.raises(CodecError, match="'elsewhere': unknown"):
            decode(data)

    def test_bytes_for_an_empty_array(self) -> None:
        parsed = parse(encode(np.empty((0,), np.float32), 0.1, codec="raw"))
        forged = type(parsed)(parsed.spec, "raw", 1, memoryview(b"x"), parsed.misses, parsed.values)
        with pytest.raises(CorruptionError, match="1 bytes for an empty array"):
            decode_into(forged, np.empty(0, np.float32))
