"""Calibrated rounding: a bound on every weight, outputs nearer than plain rounding's, its bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebound import store
from moebound.calibrate import Text, collect
from moebound.cli.main import main
from moebound.codec import parse
from moebound.codec.device import read_stream
from moebound.errors import CorruptionError, FormatError, MethodError, MoeboundError
from moebound.evaluate.loading import Loaded, Source
from moebound.methods import ExpertView, GroupView, MatrixSpec, Stored, compress, get_method
from moebound.methods.blob import MatrixBlob
from moebound.methods.calibrated import Calibrated
from moebound.methods.feedback import damped, round_with_feedback, upper_factor
from moebound.types import NUMPY_DTYPES, Array, DType, ErrorBound, ExpertKey
from stepped_bounds import bounds_by_step
from tiny_models import MakeTiny, model_class

KEY = ExpertKey(0, 0)
FIXTURE = Path(__file__).parent / "fixtures" / "calibrated-v1.npz"
"""Blobs as version 1 of the method's payload was written, and what they decode to."""
BF16 = np.dtype(ml_dtypes.bfloat16)


def moments(n: int, seed: int = 0, *, rank: int | None = None) -> Array:
    """H of inputs that hang together, of very different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((rank or n, n)) * np.exp(rng.standard_normal(n))
    x = rng.standard_normal((4 * n, rank or n)) @ mix
    found: Array = x.T @ x
    return found


def group(weights: Array, h: Array, bound: ErrorBound, *, transposed: bool = False) -> GroupView:
    roles = frozenset({"up"}) if transposed else frozenset()
    view = ExpertView(KEY, {"up": weights}, {"up": bound}, roles)  # type: ignore[arg-type]
    return GroupView((view,), {"inputs": {KEY: h}, "hidden": {KEY: h}})


def weights_of(rows: int, cols: int, dtype: DType = "BF16", seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    return (0.02 * rng.standard_normal((rows, cols))).astype(NUMPY_DTYPES[dtype])


def cost(weights: Array, decoded: Array, h: Array) -> float:
    error = weights.astype(np.float64) - decoded.astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, h, error))


@given(
    rows=st.integers(1, 40), cols=st.integers(1, 150), seed=st.integers(0, 10**6),
    rate=st.floats(0.01, 3), kappa=st.sampled_from(["", ":k1", ":k1.5", ":k4"]),
    dtype=st.sampled_from(["BF16", "F16", "F32"]), transposed=st.booleans(),
)  # fmt: skip
def test_no_weight_leaves_its_bound(
    rows: int, cols: int, seed: int, rate: float, kappa: str, dtype: DType, transposed: bool
) -> None:
    weights = weights_of(rows, cols, dtype, seed)
    stored = np.ascontiguousarray(weights.T) if transposed else weights
    seen = group(stored, moments(cols, seed), ErrorBound(rate, "rate"), transposed=transposed)
    artifact = compress(get_method("calibrated" + kappa), seen)
    certificate = artifact.experts[KEY]["up"].certificate
    assert certificate.guarantee == "max_abs"
    bound = rate * np.abs(weights.astype(np.float64)).mean()
    assert certificate.abs_bound == pytest.approx(bound)
    error = np.abs(stored.astype(np.float64) - artifact.weights(KEY)["up"].astype(np.float64))
    assert error.max() <= certificate.abs_bound
    assert error.max() == certificate.max_abs_error


def test_every_column_has_a_bound_of_its_own() -> None:
    weights, h = weights_of(64, 48), moments(48)
    artifact = compress(Calibrated(), group(weights, h, ErrorBound(0.5, "rate")))
    error = np.abs(weights.astype(np.float64) - artifact.weights(KEY)["up"].astype(np.float64))
    widest = artifact.experts[KEY]["up"].certificate.abs_bound
    assert widest is not None
    important = h.diagonal() > np.quantile(h.diagonal(), 0.8)
    assert error[:, important].max() < widest / 3
    assert error.max() > widest / 3


def test_outputs_are_nearer_at_fewer_bytes() -> None:
    """Against codec `bound`, at a bound that costs as many bytes."""
    weights, h = weights_of(256, 128), moments(128)
    ours = compress(Calibrated(), group(weights, h, ErrorBound(2.0, "rate")))
    for rate in np.geomspace(0.05, 2, 30):
        plain = compress(
            get_method("bounded"), GroupView((ExpertView(KEY, {"up": weights},
                                                         {"up": ErrorBound(rate, "rate")}),))
        )  # fmt: skip
        if plain.n_bytes <= 1.1 * ours.n_bytes:
            break
    assert ours.n_bytes < plain.n_bytes
    gained = cost(weights, ours.weights(KEY)["up"], h) / cost(weights, plain.weights(KEY)["up"], h)
    assert gained < 0.4


def test_feedback_is_babai_when_it_is_free() -> None:
    """Without a clamp, column by column against the textbook's loop."""
    w, h = torch.from_numpy(weights_of(5, 70, "F32")), damped(torch.from_numpy(moments(70)))
    steps = torch.full((70,), 0.01)
    upper = torch.linalg.inv(upper_factor(h))  # H⁻¹ = Uᵀ U, as GPTQ has it
    found = round_with_feedback(w, steps, upper_factor(h), 1000.0)
    work, wanted = w.double().clone(), torch.empty(5, 70, dtype=torch.float64)
    for j in range(70):
        wanted[:, j] = (work[:, j] / 0.01).round()
        error = (work[:, j] - wanted[:, j] * 0.01) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
    assert (found.double() == wanted).double().mean() > 0.99  # float32 against float64: ties


def test_at_kappa_1_it_is_rounding_to_nearest() -> None:
    w, h = torch.from_numpy(weights_of(5, 70, "F32")), damped(torch.from_numpy(moments(70)))
    steps = torch.full((70,), 0.01)
    found = round_with_feedback(w, steps, upper_factor(h), 1.0)
    assert torch.equal(found, (w / steps).round())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bytes_on_any_number_of_threads(threads: int) -> None:
    seen = group(weights_of(96, 128), moments(128), ErrorBound(0.7, "rate"))
    wanted = compress(Calibrated(), seen).experts[KEY]["up"].data
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert compress(Calibrated(), seen).experts[KEY]["up"].data == wanted
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "h", [np.zeros((8, 8)), moments(8, rank=1), np.diag([1.0, 0, 0, 0, 0, 0, 0, 1e-30]),
          np.ones(8), np.zeros(8)],
    ids=["no tokens", "singular", "dead channels", "a diagonal", "a diagonal of no tokens"],
)  # fmt: skip
def test_poor_statistics_still_keep_the_bound(h: Array) -> None:
    weights = weights_of(16, 8)
    found = compress(Calibrated(), group(weights, h, ErrorBound(0.4, "rate")))
    certificate = found.experts[KEY]["up"].certificate
    assert certificate.kept
    assert certificate.bits_per_weight < 16


def test_what_is_not_finite_comes_back() -> None:
    weights = weights_of(8, 16).astype(np.float32)
    weights[1, 2], weights[3, 4], weights[5, 6] = np.nan, np.inf, -np.inf
    weights = weights.astype(BF16)
    found = compress(Calibrated(), group(weights, moments(16), ErrorBound(0.4, "rate")))
    decoded = found.weights(KEY)["up"]
    bad = ~np.isfinite(weights.astype(np.float32))
    assert (decoded.view(np.uint16)[bad] == weights.view(np.uint16)[bad]).all()
    assert np.isfinite(decoded.astype(np.float32)[~bad]).all()
    assert found.experts[KEY]["up"].certificate.patched >= 3


@pytest.mark.parametrize("options", ["k0.5", "k", "int4", "k1000", "2"])
def test_options_that_are_none(options: str) -> None:
    with pytest.raises(MethodError, match="half steps that a weight may move, 1 to 16"):
        get_method(f"calibrated:{options}")


def test_what_it_cannot_take() -> None:
    weights = weights_of(8, 16)
    with pytest.raises(MethodError, match="statistics of 24; expected statistics of this model"):
        compress(Calibrated(), group(weights, moments(24), ErrorBound(0.4, "rate")))
    with pytest.raises(MethodError, match="an average promise"):
        compress(Calibrated(), group(weights, moments(16), ErrorBound(0.4, "rmse")))
    with pytest.raises(MethodError, match="take method bounded:lossless"):
        compress(Calibrated(), group(weights, moments(16), ErrorBound(1e-9, "abs")))
    view = ExpertView(KEY, {"up": weights}, {"up": ErrorBound(0.4, "rate")})
    with pytest.raises(MethodError, match="statistics that were not gathered: hidden, inputs"):
        compress(Calibrated(), GroupView((view,)))


def test_a_payload_by_the_table() -> None:
    """Written from docs/format-method.md, byte by byte; what it decodes to is known by hand."""
    from moebound import encode

    codes = np.array([[1, -2, 0, 3], [0, 1, 2, -1], [5, 0, 0, 1]], np.float32)
    head = b"\0" + np.array([2.0, 0.5], "<f4").tobytes() + b"\x03"
    # Levels 0, 4, 2, 1 of 3 bits: 0b001_010_100_000.
    levels = (0 | 4 << 3 | 2 << 6 | 1 << 9).to_bytes(2, "little")
    payload = head + levels + b"\0" + encode(codes, 0.49)
    found = Calibrated.decode(memoryview(payload), MatrixSpec((3, 4), "F32"), [])
    steps = np.array([0.5, 1.0, 0.5 * 2**0.5, 0.5 * 2**0.25]).astype(np.float32)
    assert found.tolist() == (codes * steps).tolist()
    turned = b"\x01" + payload[1 : -len(encode(codes, 0.49))]
    turned += encode(np.ascontiguousarray(codes.T), 0.49)
    found = Calibrated.decode(memoryview(turned), MatrixSpec((4, 3), "F32"), [])
    assert found.tolist() == (codes.T * steps[:, None]).tolist()


@pytest.mark.parametrize("name", ["bf16", "f16_rows", "f32_odd"])
def test_blobs_of_version_1_decode_for_ever(name: str) -> None:
    with np.load(FIXTURE) as stored:
        data, wanted = stored[f"{name}.data"].tobytes(), stored[f"{name}.decoded"]
    blob = Stored.of(data)
    assert isinstance(blob.found, MatrixBlob)
    assert (blob.found.method, blob.found.method_version) == ("calibrated", 1)
    decoded = blob.decode()
    np.testing.assert_array_equal(decoded.view(wanted.dtype), wanted)
    patched = Calibrated.verbatim(blob.found.payload, blob.spec)
    assert patched == np.count_nonzero(~np.isfinite(decoded.astype(np.float32)))


@given(
    name=st.sampled_from(["bf16", "f16_rows", "f32_odd"]), at=st.integers(0, 10**6),
    value=st.integers(0, 255), cut=st.booleans(),
)  # fmt: skip
def test_damaged_payloads_are_refused_or_decode(name: str, at: int, value: int, cut: bool) -> None:
    with np.load(FIXTURE) as stored:
        blob = Stored.of(stored[f"{name}.data"].tobytes())
    assert isinstance(blob.found, MatrixBlob)
    data = bytearray(blob.found.payload)
    if cut:
        del data[at % len(data) :]
    else:
        data[at % len(data)] = value
    try:
        found = Calibrated.decode(memoryview(bytes(data)), blob.spec, [])
    except (CorruptionError, FormatError):
        return
    assert found.shape == blob.spec.shape


def test_what_is_written_is_an_envelope_of_bound() -> None:
    """Version 2: read by all that read codec `bound`, and by column as by the whole."""
    weights, h = weights_of(64, 48), moments(48)
    made = compress(Calibrated(), group(weights, h, ErrorBound(0.5, "rate"))).experts[KEY]["up"]
    parsed = parse(made.data)
    assert (parsed.codec, parsed.codec_version) == ("bound", 2)
    assert (made.certificate.codec, made.certificate.codec_version) == ("bound", 2)
    assert parsed.spec.abs_bound == made.certificate.abs_bound
    bounds = bounds_by_step(parsed)
    assert bounds is not None
    assert bounds.shape == (1, 48)
    assert bounds.max() <= parsed.spec.abs_bound < bounds.max() * (1 + 1e-6)
    error = np.abs(weights.astype(np.float64) - made.decoded.astype(np.float64))
    assert (error <= bounds).all()
    assert read_stream(made.data).coded is not None  # what decodes on a GPU


def test_a_small_matrix_pays_little_for_steps_and_tables() -> None:
    """64 x 32 weights, as of builtin:wordmath: what there is beside the entropy of a Gaussian in
    whole steps, per weight."""
    weights, h = weights_of(64, 32), moments(32)
    made = compress(Calibrated(), group(weights, h, ErrorBound(1.0, "rate"))).experts[KEY]["up"]
    sizes = bounds_by_step(parse(made.data))
    assert sizes is not None
    codes = np.rint(made.decoded.astype(np.float64) / sizes)  # at kappa 2 a bound is a step
    deviation = 0.02 / sizes[0]
    edges = (np.arange(-400, 402) - 0.5)[:, None] / deviation / 2**0.5
    p = np.diff([[math.erf(x) for x in row] for row in edges], axis=0) / 2
    entropy = -np.log2(p, where=p > 0, out=np.zeros_like(p)) * p
    assert np.abs(codes).max() < 400
    envelope = 34 * 8 / weights.size
    assert 8 * len(made.data) / weights.size < entropy.sum(axis=0).mean() + envelope + 0.2


@pytest.fixture(scope="module")
def calibrated_store(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    source = tiny("qwen3_moe")
    config: Any = __import__("transformers").AutoConfig.from_pretrained(source)
    model = model_class(config).from_pretrained(source, dtype=torch.float32).train(False)
    at = tmp_path_factory.mktemp("calibrated")
    text = Text("rows", tuple(tuple(range(2 + i, 40 + i)) for i in range(9)))
    collect(Loaded(model, None, Source("tiny", "checkpoint", "float32", "")), text, at / "stats")
    store.compress(source, at / "store", bound=ErrorBound(0.5, "rate", "expert"),
                   method="calibrated", calibration=at / "stats")  # fmt: skip
    return source, at / "stats", at / "store"


def test_a_store_keeps_and_verifies_its_promise(calibrated_store: tuple[Path, ...]) -> None:
    source, _, made = calibrated_store
    assert store.verify(made).ok
    report = store.verify(made, against=source)
    assert report.ok, report.problems
    assert report.guarantee == "max_abs"
    assert report.worst is not None
    assert 0.3 < report.worst <= 1


def test_offloaded_as_from_pretrained(calibrated_store: tuple[Path, ...]) -> None:
    import moebound

    *_, made = calibrated_store
    ids = torch.arange(3, 30)[None]
    whole = moebound.integrations.transformers  # registers the format
    assert whole
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.no_grad(), moebound.load(made, dtype="float32", ram_budget="50%") as offloaded:
        found = offloaded.model(input_ids=ids).logits
        torch.testing.assert_close(found, reference(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_without_or_with_others_statistics(
    calibrated_store: tuple[Path, ...], tiny: MakeTiny, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, stats, _ = calibrated_store
    asked = ["--method", "calibrated", "--rate", "0.5"]
    assert main(["compress", str(source), str(tmp_path / "a"), *asked]) == 2
    assert "make them with `moebound calibrate`" in capsys.readouterr().err
    other = tiny("mixtral")
    with pytest.raises(MoeboundError, match="has other weights"):
        store.compress(other, tmp_path / "b", bound=ErrorBound(0.5, "rate"), method="calibrated",
                       calibration=stats)  # fmt: skip
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
