"""A base and what it leaves: a bound on every weight, the inequality of when it pays, its bytes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound import encode
from moebound.errors import CorruptionError, FormatError, MethodError
from moebound.methods import Artifact, GroupView, MatrixSpec, compress, get_method
from moebound.methods.bases.exact import write_product
from moebound.methods.bases.residual import Residual
from moebound.methods.blob import parse_matrix
from moebound.types import NUMPY_DTYPES, Array, DType, ErrorBound, ExpertKey

from .made import ROLES, layer, n_weights

BASES = [
    "svd:b2:f8", "d2_moe_fixed:r2:base4:f8", "rfid_re:b3:eta0:f8", "mobe_fixed:r4:s2:f8",
    "resmoe_fixed:k0.1:base4:f8", "milo_fixed:r1:int2", "modegpt_re:k0.4:q4", "soco_lite:b3:f8",
    "rtn:int2:g32",
]  # fmt: skip


def made(setting: str, group: GroupView) -> Artifact:
    return compress(get_method(setting), group)


def worst(group: GroupView, artifact: Artifact, key: ExpertKey, role: str) -> float:
    original = next(e for e in group.experts if e.key == key).matrices[role]  # type: ignore[index]
    decoded = artifact.weights(key)[role]  # type: ignore[index]
    return float(np.abs(original.astype(np.float64) - decoded.astype(np.float64)).max())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("coder", ["", "calibrated:", "calibrated:k1.5:"])
def test_no_weight_leaves_its_bound(base: str, coder: str) -> None:
    group = layer(4, bound=ErrorBound(0.4, "rate", "expert"))
    artifact = made(f"residual:{coder}{base}", group)
    assert artifact.guarantee == "max_abs"
    for expert in group.experts:
        mean = np.mean(np.concatenate([np.abs(m.astype(np.float64)).ravel()
                                       for m in expert.matrices.values()]))  # fmt: skip
        for role in ROLES:
            certificate = artifact.experts[expert.key][role].certificate
            assert certificate.abs_bound == pytest.approx(0.4 * mean)
            found = worst(group, artifact, expert.key, role)
            assert certificate.abs_bound is not None
            assert found == certificate.max_abs_error <= certificate.abs_bound
            assert found > 0.7 * certificate.abs_bound or coder


@given(rate=st.floats(0.001, 4), dtype=st.sampled_from(["BF16", "F16", "F32"]),
       seed=st.integers(0, 99), mode=st.sampled_from(["rate", "range", "abs"]))  # fmt: skip
@settings(max_examples=25)
def test_at_any_bound(rate: float, dtype: DType, seed: int, mode: str) -> None:
    value = rate * {"rate": 1.0, "range": 0.1, "abs": 0.02}[mode]
    group = layer(2, 9, 14, dtype=dtype, seed=seed, bound=ErrorBound(value, mode))  # type: ignore[arg-type]
    artifact = made("residual:svd:r1:f8", group)
    assert artifact.guarantee == "max_abs"
    for expert in group.experts:
        for role in ROLES:
            certificate = artifact.experts[expert.key][role].certificate
            assert certificate.kept
            assert worst(group, artifact, expert.key, role) == certificate.max_abs_error


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 1.0])
def test_the_cast_costs_little(rate: float) -> None:
    """In bfloat16, what is verbatim and the narrower bound together are a fraction of a bit."""
    group = layer(4, 64, 64, common=0, bound=ErrorBound(rate, "rate"))
    ours, plain = made("residual:svd:r0", group), made("bounded:bound", group)
    bits = 8 * (ours.n_bytes - plain.n_bytes) / n_weights(group)
    # Heads are 0.1 bit of matrices so small.
    assert bits < {0.05: 1.2, 0.1: 0.5, 0.3: 0.25, 1.0: 0.2}[rate]
    assert sum(m.certificate.patched for m in ours) < 0.07 * n_weights(group)


def saved(setting: str, group: GroupView) -> float:
    """Bits a weight below codec `bound` at the same bound."""
    return (
        8 * (made("bounded:bound", group).n_bytes - made(setting, group).n_bytes) / n_weights(group)
    )


def test_a_base_that_many_share_pays() -> None:
    """½ log2(1 / (1 - ρ)) bits a weight, less b / n: here ρ = ½, 5 bits, 32 experts."""
    group = layer(32, 64, 96, bound=ErrorBound(0.3, "rate"), statistics=False)
    want = 0.5 - 5 / 32
    assert saved("residual:d2_moe_fixed:r0:base5:plain", group) == pytest.approx(want, abs=0.12)
    # Two experts: the base costs 2.5 bits a weight.
    few = layer(2, 64, 96, bound=ErrorBound(0.3, "rate"), statistics=False)
    assert saved("residual:d2_moe_fixed:r0:base5:plain", few) < 0


def test_low_rank_of_noise_never_pays() -> None:
    group = layer(2, 64, 96, common=0, bound=ErrorBound(0.3, "rate"), statistics=False)
    for bits in (0.7, 1, 2):
        assert saved(f"residual:svd:b{bits}:f8", group) < 0


def test_low_rank_of_what_is_pays() -> None:
    group = layer(2, 64, 96, common=0, bound=ErrorBound(0.3, "rate"), statistics=False)
    rng = np.random.default_rng(0)
    experts = tuple(
        replace(e, matrices={
            r: (m.astype(np.float32) + 0.2 * rng.standard_normal((m.shape[0], 1))
                * rng.standard_normal((1, m.shape[1]))).astype(m.dtype)
            for r, m in e.matrices.items()}, bounds=dict.fromkeys(ROLES, ErrorBound(0.005)))
        for e in group.experts
    )  # fmt: skip
    # A component of 100 times the noise: at most ½ log2(101) = 3.3 bits, for 0.2 that it takes. The
    # codec's classes of rows and columns have seen some of that already.
    assert 1 < saved("residual:svd:r1:f8", replace(group, experts=experts)) < 3.1


def test_what_is_not_finite_comes_back() -> None:
    group = layer(2, bound=ErrorBound(0.4, "rate"))
    bad: Array = group.experts[0].matrices["up"].astype(np.float32)
    bad[1, 2], bad[3, 4], bad[5, 6] = np.nan, np.inf, -np.inf
    bad = bad.astype(NUMPY_DTYPES["BF16"])
    first = replace(group.experts[0], matrices={**group.experts[0].matrices, "up": bad})
    for coder in ("", "calibrated:"):
        spoiled = replace(group, experts=(first, *group.experts[1:]))
        found = made(f"residual:{coder}svd:r2", spoiled).experts[first.key]["up"]
        lost = ~np.isfinite(bad.astype(np.float32))
        assert (found.decoded.view(np.uint16)[lost] == bad.view(np.uint16)[lost]).all()
        assert found.certificate.patched >= 3
        assert found.certificate.kept


def test_weights_that_are_all_zero() -> None:
    group = layer(2, bound=ErrorBound(0.4, "rate"), statistics=False)
    zero = tuple(
        replace(e, matrices={r: np.zeros_like(m) for r, m in e.matrices.items()})
        for e in group.experts
    )
    artifact = made("residual:svd:r2", replace(group, experts=zero))
    assert artifact.max_abs_error == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("residual", "expected a method behind it"),
        ("residual:calibrated", "expected a method behind it"),
        ("residual:nosuch", "'nosuch': unknown"),
        ("residual:bounded:bound", "'residual:bounded:bound'.*only approximates"),
        ("residual:residual:svd:r1", "only approximates"),
        ("residual:calibrated:calibrated", "only approximates"),
        ("residual:moe_i2_re:b3", "takes experts away"),
        ("residual:svd", "expected one of bN or rN"),
    ],
)
def test_bases_that_are_none(setting: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        get_method(setting)


def test_what_it_cannot_take() -> None:
    with pytest.raises(MethodError, match="needs a bound"):
        made("residual:svd:r1", layer())
    with pytest.raises(MethodError, match="an average promise"):
        made("residual:svd:r1", layer(bound=ErrorBound(0.1, "rmse")))
    with pytest.raises(MethodError, match="not gathered: hidden, inputs"):
        made("residual:calibrated:svd:r1", layer(bound=ErrorBound(0.1, "rate"), statistics=False))


def test_settings_say_all() -> None:
    for setting in (
        "residual:svd:b1",
        "residual:calibrated:svd:r3",
        "residual:calibrated:k3:svd:r3",
    ):
        assert get_method(setting).setting == setting
        assert get_method(get_method(setting).setting) == get_method(setting)
    assert get_method("residual:bound:svd:b1").setting == "residual:svd:b1"
    assert get_method("residual:calibrated:k2:svd:b1").setting == "residual:calibrated:svd:b1"


def test_a_payload_by_the_table() -> None:
    """Written from docs/format-method.md; what it decodes to is known by hand."""
    base = write_product(np.array([[1.0], [2.0]]), np.array([[1.0, 0.5, 0.25]]), 16)
    rest = np.array([[0, 0.5, -0.5], [1, 0, 0]], np.float32)
    coded = encode(rest, 1e-6)
    verbatim = np.array([7.0], "<f4").tobytes()
    # One place below 6: no low bits, 3 is the fourth of a unary number.
    from moebound.codec.patch import pack_positions

    data = b"\x03svd\x01" + bytes([len(base)]) + base + bytes([len(coded)]) + coded
    data += b"\x01" + pack_positions(np.array([3], np.uint64), 6) + verbatim
    found = Residual.decode(memoryview(data), MatrixSpec((2, 3), "F32"), [])
    want = np.array([[1, 1, -0.25], [7, 1, 0.5]])
    np.testing.assert_allclose(found, want, atol=1e-3)
    assert found[1, 0] == 7
    assert Residual.verbatim(memoryview(data), MatrixSpec((2, 3), "F32")) == 1


@pytest.mark.parametrize("setting", ["residual:d2_moe_fixed:r2", "residual:calibrated:svd:r2"])
def test_damaged_payloads_are_refused_or_decode(setting: str) -> None:
    rng = np.random.default_rng(0)
    group = layer(2, 6, 10, bound=ErrorBound(0.1, "rate"))
    artifact = made(setting, group)
    opened = [Residual.open_shared(_payload(part)) for part in artifact.shared]
    matrix = artifact.experts[ExpertKey(3, 0)]["gate"]
    blob = parse_matrix(matrix.data)
    for _ in range(400):
        data = bytearray(blob.payload)
        at = int(rng.integers(0, len(data)))
        if rng.random() < 0.2:
            del data[at:]
        else:
            data[at] = rng.integers(0, 256)
        # The frame names the method, so one that is unknown here is a MethodError there, too.
        with suppress(CorruptionError, FormatError, MethodError), np.errstate(all="ignore"):
            found = Residual.decode(memoryview(bytes(data)), MatrixSpec(blob.shape, "BF16"),
                                    [opened[i] for i in matrix.uses])  # fmt: skip
            assert found.shape == blob.shape


def _payload(part: bytes) -> memoryview:
    from moebound.methods.blob import parse_shared

    return parse_shared(part).payload
