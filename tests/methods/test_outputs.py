"""What is certified of outputs: measured as the definition says, and never more than promised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebound.codec import Certificate
from moebound.codec.certificate import Columns, Outputs
from moebound.methods import GroupView, compress, get_method
from moebound.methods.artifact import Artifact
from moebound.methods.base import ColumnBounds, Seen
from moebound.methods.calibrated import Calibrated
from moebound.methods.feedback import damped, round_with_feedback, upper_factor
from moebound.methods.geometry import Geometry
from moebound.methods.outputs import output_error, output_power, outputs_kept, promises
from moebound.types import Array, DType, ErrorBound

from .test_calibrated import KEY, group, moments, weights_of


def certified(
    weights: Array, h: Array, rate: float, *, rounded_by: Array | None = None,
    transposed: bool = False, method: str = "calibrated", tokens: int = 1000,
) -> Artifact:  # fmt: skip
    """rounded_by: another H than the one that outputs are certified by, which is at most that."""
    by = h if rounded_by is None else rounded_by
    view = group(weights, by, ErrorBound(rate, "rate"), transposed=transposed)
    seen = {KEY: Seen(tokens, {"inputs": h, "hidden": h})}
    return compress(get_method(method), GroupView(view.experts, view.statistics, seen))


@pytest.mark.parametrize("n", [1, 40, 300, 513])
def test_error_and_power_are_sums_over_the_text(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((2 * n, n)) * np.exp(rng.standard_normal(n))
    w, other = rng.standard_normal((7, n)), rng.standard_normal((7, n))
    other[0, 0] = w[0, 0] = np.nan  # stored as it is
    clean, approximated = np.nan_to_num(w), np.nan_to_num(other)
    wanted = np.square(x @ (clean - approximated).T).sum()
    assert output_error(w, other, x.T @ x) == pytest.approx(wanted, rel=1e-10)
    assert output_power(w, x.T @ x) == pytest.approx(np.square(x @ clean.T).sum(), rel=1e-10)
    diagonal = np.square(x).sum(0)
    assert output_error(w, other, diagonal) == pytest.approx(
        float(np.square(clean - approximated).sum(0) @ diagonal)
    )


def test_the_factor_is_of_h_and_upper() -> None:
    h = damped(torch.from_numpy(moments(70)))
    upper = upper_factor(h)
    torch.testing.assert_close(upper @ upper.T, h)
    assert torch.equal(upper, upper.triu())
    # A column's share is what those behind it cannot make good.
    inverse = torch.linalg.inv(h)
    inverse_upper = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(upper.diagonal(), 1 / inverse_upper.diagonal())


def test_a_factor_of_what_is_hardly_positive() -> None:
    h = torch.ones(30, 30, dtype=torch.float64)
    upper = upper_factor(h)
    assert torch.isfinite(upper).all()
    assert torch.linalg.eigvalsh(upper @ upper.T - h).min() > -1e-9  # of a larger one


@given(
    rows=st.integers(1, 30), cols=st.integers(1, 130), seed=st.integers(0, 10**6),
    rate=st.floats(0.02, 4), kappa=st.sampled_from(["", ":k1", ":k1.3", ":k4"]),
    dtype=st.sampled_from(["BF16", "F16", "F32"]), transposed=st.booleans(),
    rank=st.sampled_from([None, 1, 3]), pseudo=st.sampled_from([0.0, 5.0]),
)  # fmt: skip
def test_outputs_keep_what_is_promised(
    rows: int, cols: int, seed: int, rate: float, kappa: str, dtype: DType, transposed: bool,
    rank: int | None, pseudo: float,
) -> None:  # fmt: skip
    """For any weights, moments, steps and casts; also where more was rounded by than was seen."""
    weights = weights_of(rows, cols, dtype, seed)
    stored = np.ascontiguousarray(weights.T) if transposed else weights
    h = moments(cols, seed, rank=rank)
    by = h + pseudo * moments(cols, seed + 1)
    made = certified(stored, h, rate, rounded_by=by, transposed=transposed,
                     method="calibrated" + kappa).experts[KEY]["up"]  # fmt: skip
    outputs, columns = made.certificate.outputs, made.certificate.columns
    if columns is None:  # an exact copy is smaller
        assert made.decoded.tobytes() == stored.tobytes()
        assert outputs is None
        return
    assert outputs is not None
    error = weights.astype(np.float64) - (made.decoded.T if transposed else made.decoded)
    wanted = float(np.einsum("ij,jk,ik->", error, h, error))
    assert outputs.error == pytest.approx(wanted, rel=1e-6, abs=1e-9 * outputs.power)
    assert outputs.error <= outputs.promised
    assert made.certificate.kept
    assert columns.kept <= 1
    assert columns.narrowest <= columns.widest <= (made.certificate.abs_bound or 0)


@given(seed=st.integers(0, 10**6), cols=st.integers(1, 100), kappa=st.floats(1, 3))
def test_the_box_holds_for_any_errors_within_bounds(seed: int, cols: int, kappa: float) -> None:
    rng = np.random.default_rng(seed)
    h, steps = moments(cols, seed, rank=1 + seed % cols), rng.random(cols).astype(np.float32)
    epsilon = steps.astype(np.float64) * kappa / 2
    signs = np.sign(h[0]) if seed % 2 else rng.uniform(-1, 1, (6, cols))
    error = np.broadcast_to(signs * epsilon, (6, cols))
    bounds = ColumnBounds(steps, kappa / 2, False)
    _, box = promises(h, Geometry.of(h), bounds, 6)
    assert output_error(error, np.zeros_like(error), h) <= box * (1 + 1e-9)


@given(seed=st.integers(0, 10**6), cols=st.integers(1, 150), scale=st.floats(1e-3, 1.0))
def test_the_lattice_holds_where_nothing_is_clamped(seed: int, cols: int, scale: float) -> None:
    h = moments(cols, seed)
    w, geometry = weights_of(9, cols, "F32", seed), Geometry.of(h)
    steps = (0.02 * scale * 2.0 ** (geometry.levels / 4)).astype(np.float32)
    codes = round_with_feedback(
        torch.from_numpy(w[:, geometry.order]), torch.from_numpy(steps[geometry.order]),
        geometry.upper, 1e9,
    ).numpy()  # fmt: skip
    decoded = np.empty(w.shape)
    decoded[:, geometry.order] = codes * steps[geometry.order].astype(np.float64)
    found = output_error(w, decoded, h)
    assert found <= geometry.lattice(steps.astype(np.float64), len(w)) * (1 + 1e-4)
    # And what was damped away cannot be more than was added.
    assert found <= geometry.mean * (1 + 1e-6) * float(
        np.square((w - decoded)[:, geometry.order] @ geometry.upper.numpy()).sum()
    )


def test_the_lattices_promise_is_near() -> None:
    made = certified(weights_of(256, 128), moments(128), 1.0).experts[KEY]["up"].certificate
    outputs = made.outputs
    assert outputs is not None
    assert outputs.promised / 12 < outputs.error < outputs.promised / 2
    assert outputs.relative == outputs.error / outputs.power < 0.05


def test_where_the_lattice_fails_the_box_is_promised() -> None:
    """Errors beyond the nearest points, as clamps may leave them."""
    h, w = np.ones((8, 8)) + 1e-6 * np.eye(8), np.zeros((4, 8))
    epsilon = np.full(8, 0.5)
    geometry, bounds = Geometry.of(h), ColumnBounds(np.full(8, 0.5, np.float32), 1.0, False)
    found = outputs_kept(w, w + epsilon, bounds, h, 9, geometry)
    lattice, box = promises(h, geometry, bounds, 4)
    assert lattice < found.error <= found.promised == box


def test_an_expert_without_tokens_is_certified_as_that() -> None:
    h = moments(16)
    made = certified(weights_of(8, 16), np.zeros((16, 16)), 0.4, rounded_by=h, tokens=0)
    outputs = made.experts[KEY]["up"].certificate.outputs
    assert outputs is not None
    assert (outputs.tokens, outputs.error, outputs.power) == (0, 0, 0)
    assert outputs.relative is None


def test_without_a_text_nothing_is_said_of_outputs() -> None:
    weights = weights_of(8, 16)
    view = group(weights, moments(16), ErrorBound(0.4, "rate"))
    certificate = compress(Calibrated(), view).experts[KEY]["up"].certificate
    assert certificate.outputs is None
    assert certificate.columns is not None
    assert "outputs" not in certificate.to_json()
    plain = compress(get_method("bounded"), GroupView(view.experts))
    assert plain.experts[KEY]["up"].certificate.columns is None


def test_json_and_back() -> None:
    made = certified(weights_of(8, 16), moments(16), 0.4).experts[KEY]["up"].certificate
    assert Certificate.from_json(made.to_json()) == made
    bare = replace(made, columns=None, outputs=None)
    assert Certificate.from_json(bare.to_json()) == bare
    for name, field, value in (
        ("outputs", "error", -1.0), ("outputs", "error", "much"), ("outputs", "tokens", 0.5),
        ("columns", "kept", float("nan")), ("columns", "more", 1.0),
    ):  # fmt: skip
        document = made.to_json()
        document[name][field] = value
        with pytest.raises((ValueError, TypeError)):
            Certificate.from_json(document)
    assert not replace(made, columns=Columns(1, 2, 1.01)).kept
    assert not replace(made, outputs=Outputs(3, 2.0, 1.0, 5.0)).kept
