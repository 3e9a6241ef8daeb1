"""Error sources: each has the size and shape that it says, from a stream of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moebound import decode, encode
from moebound.checkpoint.families import Role
from moebound.codec.sz3 import ALGORITHMS
from moebound.errors import BackendUnavailable, BoundError, CodecError, MoeboundError
from moebound.model.dtypes import stored_dtype
from moebound.sensitivity.noise import (
    Changed,
    ErrorSource,
    generators_for,
    matrix_stats,
    parse_source,
    source_ids,
)
from moebound.types import DType, ErrorBound, ExpertKey, TensorStats

KEY = ExpertKey(3, 7)
CODECS = [*(name for name in source_ids() if name.startswith("codec:")),
          *(f"codec:sz3:{algorithm}" for algorithm in ALGORITHMS)]  # fmt: skip
SIMULATED = ["gaussian-sd", "gaussian-var", "gaussian-power", "uniform", "randomise"]


def expert(dtype: torch.dtype = torch.float32, scale: float = 0.02) -> dict[Role, torch.Tensor]:
    torch.manual_seed(0)
    shapes: dict[Role, tuple[int, int]] = {"gate": (192, 256), "up": (192, 256), "down": (256, 192)}
    # Projections differ in size, so that scope "expert" and scope "matrix" do.
    sizes = {"gate": 1.0, "up": 2.0, "down": 4.0}
    return {r: (scale * sizes[r] * torch.randn(shape)).to(dtype) for r, shape in shapes.items()}


def whole(weights: dict[Role, torch.Tensor]) -> TensorStats:
    return sum((matrix_stats(w) for w in weights.values()), TensorStats())


def apply(
    source: str | ErrorSource,
    weights: dict[Role, torch.Tensor],
    bound: ErrorBound | None,
    *,
    seed: int = 0,
    key: ExpertKey = KEY,
    dtype: DType | None = None,
) -> Changed:
    generators = generators_for(seed, key)
    return parse_source(source).apply(weights, bound, whole(weights), generators, dtype=dtype)


def errors(changed: Changed, weights: dict[Role, torch.Tensor], role: Role) -> torch.Tensor:
    return changed.matrices[role].double() - weights[role].double().cpu()


@pytest.mark.parametrize("scope", ["expert", "matrix"])
@pytest.mark.parametrize(
    ("source", "deviation"),
    [
        ("gaussian-sd", lambda e: e),
        ("gaussian-var", lambda e: math.sqrt(e)),
        ("gaussian-power", lambda e: e / math.sqrt(3)),
        ("uniform", lambda e: e / math.sqrt(3)),
    ],
)
def test_the_power_of_simulated_errors(source: str, deviation: object, scope: str) -> None:
    weights = expert()
    bound = ErrorBound(0.5, "rate", scope)  # type: ignore[arg-type]
    changed = apply(source, weights, bound)
    for role, w in weights.items():
        reference = whole(weights) if scope == "expert" else matrix_stats(w)
        epsilon = bound.absolute(reference)
        assert changed.epsilons is not None
        assert changed.epsilons[role] == pytest.approx(epsilon)
        found = errors(changed, weights, role)
        wanted = deviation(epsilon)  # type: ignore[operator]
        assert float(found.std()) == pytest.approx(wanted, rel=0.02)  # 49,152 draws
        assert abs(float(found.mean())) < 5 * wanted / math.sqrt(w.numel())


def test_rate_is_the_papers() -> None:
    """ε = α · ‖θ‖₁ / n over gate, up and down together (2509.07727, section 3.1)."""
    weights = expert()
    theta = torch.cat([w.flatten() for w in weights.values()]).double()
    changed = apply("gaussian-sd", weights, ErrorBound(0.8, "rate", "expert"))
    assert changed.epsilons is not None
    wanted = pytest.approx(0.8 * float(theta.abs().sum()) / len(theta))
    assert changed.epsilons == {"gate": wanted, "up": wanted, "down": wanted}


def test_uniform_stays_in_the_bound_and_fills_it() -> None:
    weights = expert()
    changed = apply("uniform", weights, ErrorBound(0.01))
    found = torch.cat([errors(changed, weights, role).flatten() for role in weights]).abs()
    assert float(found.max()) <= 0.01 + 1e-8  # float32 rounding of the sum
    assert float(found.max()) > 0.0099


def test_gaussians_leave_the_bound_as_often_as_they_should() -> None:
    weights = expert()
    found = errors(apply("gaussian-sd", weights, ErrorBound(0.01)), weights, "gate").abs()
    assert float((found > 0.01).double().mean()) == pytest.approx(0.3173, abs=0.01)


def test_randomise_keeps_mean_and_spread_only() -> None:
    weights = expert()
    weights["up"] += 1.0
    changed = apply("randomise", weights, None)
    new = changed.matrices["up"]
    assert changed.epsilons is None
    assert float(new.mean()) == pytest.approx(1.0, abs=0.001)
    assert float(new.std()) == pytest.approx(float(weights["up"].std()), rel=0.02)
    pair = torch.stack([new.flatten(), weights["up"].flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.02


@pytest.mark.parametrize("source", SIMULATED)
def test_draws_depend_on_seed_layer_expert_and_projection_only(source: str) -> None:
    weights = expert()
    bound = None if source == "randomise" else ErrorBound(0.01)
    first = apply(source, weights, bound)
    backwards = dict(reversed(list(weights.items())))
    again = apply(source, backwards, bound)
    assert all(torch.equal(first.matrices[role], again.matrices[role]) for role in weights)
    only: dict[Role, torch.Tensor] = {"up": weights["up"]}
    assert torch.equal(apply(source, only, bound).matrices["up"], first.matrices["up"])
    for other in (
        apply(source, weights, bound, seed=1),
        apply(source, weights, bound, key=ExpertKey(3, 8)),
        apply(source, weights, bound, key=ExpertKey(7, 3)),
    ):
        for role in weights:
            assert not torch.equal(first.matrices[role], other.matrices[role])
    # Equally shaped projections do not share their noise.
    same: dict[Role, torch.Tensor] = {"gate": weights["gate"], "up": weights["gate"].clone()}
    both = apply(source, same, bound).matrices
    assert not torch.equal(both["gate"], both["up"])


def test_two_bounds_are_the_same_noise_in_two_sizes() -> None:
    zeros = {role: torch.zeros_like(w) for role, w in expert().items()}
    one = apply("gaussian-sd", zeros, ErrorBound(0.01)).matrices["gate"]
    two = apply("gaussian-sd", zeros, ErrorBound(0.02)).matrices["gate"]
    torch.testing.assert_close(two, 2 * one)


@pytest.mark.parametrize("source", SIMULATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_not_changed(source: str, dtype: torch.dtype) -> None:
    weights = expert(dtype)
    before = {role: w.clone() for role, w in weights.items()}
    changed = apply(source, weights, None if source == "randomise" else ErrorBound(0.01))
    for role, w in weights.items():
        assert torch.equal(w, before[role])
        assert changed.matrices[role].dtype == torch.float32


@pytest.mark.parametrize("source", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codecs_keep_their_bound_and_count_their_bytes(source: str, dtype: torch.dtype) -> None:
    weights = expert(dtype)
    # A bf16 checkpoint that was loaded in float32 is encoded as bf16.
    loaded = {role: w.float() for role, w in weights.items()}
    lossy = parse_source(source).needs_bound
    bound = ErrorBound(0.3, "rate", "expert") if lossy else None
    changed = apply(source, loaded, bound)
    n_bytes = 0
    for role, w in weights.items():
        found = float(errors(changed, loaded, role).abs().max())
        assert torch.equal(changed.matrices[role], changed.matrices[role].to(dtype).float())
        if lossy:
            assert changed.epsilons is not None
            assert found <= changed.epsilons[role]
            assert found or source == "codec:sz3:lossless"
            n_bytes += len(encode(w, changed.epsilons[role], codec=source.removeprefix("codec:")))
        else:
            assert found == 0
    assert changed.n_bytes is not None
    if lossy:
        assert changed.n_bytes == n_bytes


def test_a_codec_source_is_what_encode_and_decode_give() -> None:
    weights = expert(torch.bfloat16)
    bound = ErrorBound(0.3, "rate", "expert")
    epsilon = bound.absolute(whole(weights))
    wanted = decode(encode(weights["down"], epsilon))
    assert isinstance(wanted, torch.Tensor)
    assert torch.equal(apply("codec:bound", weights, bound).matrices["down"], wanted.float())


@pytest.mark.parametrize("source", [*SIMULATED[:4], "codec:bound"])
def test_zero_weights_under_a_relative_bound_stay_zero(source: str) -> None:
    zeros = {role: torch.zeros_like(w) for role, w in expert().items()}
    changed = apply(source, zeros, ErrorBound(0.5, "rate", "expert"))
    assert all(not matrix.any() for matrix in changed.matrices.values())


def test_codecs_take_weights_that_are_not_finite() -> None:
    weights = expert()
    weights["gate"][0, 0] = math.nan
    weights["up"][1, 1] = math.inf
    changed = apply("codec:bound", weights, ErrorBound(0.3, "rate", "expert"))
    assert math.isnan(changed.matrices["gate"][0, 0])
    assert changed.matrices["up"][1, 1] == math.inf


@pytest.mark.parametrize("source", ["gaussian-sd", "uniform", "codec:bound", "codec:sz3"])
def test_a_bound_is_needed(source: str) -> None:
    with pytest.raises(BoundError, match=rf"'{source}' needs a bound"):
        apply(source, expert(), None)


def test_ids() -> None:
    for name in [*source_ids(), *CODECS]:
        source = parse_source(name)
        assert source.id == str(source) == name
        assert parse_source(source) is source
        assert parse_source(name) == source
        assert source.simulated == (not name.startswith("codec:"))
        assert source.seeded == source.simulated


def test_unknown_ids() -> None:
    with pytest.raises(
        MoeboundError, match=r"'gauss': unknown\. There are gaussian-sd, .*codec:sz3"
    ):
        parse_source("gauss")
    with pytest.raises((CodecError, BackendUnavailable), match="nothing"):
        parse_source("codec:nothing")
    with pytest.raises(MoeboundError, match="seed -1"):
        generators_for(-1, KEY)


def test_streams_are_frozen() -> None:
    """A study is repeated with the numbers that it was made with."""
    draws = generators_for(5, ExpertKey(2, 9))("up").standard_normal(3, dtype=np.float32)
    np.testing.assert_array_equal(draws, np.array(FROZEN, np.float32))


FROZEN = [0.45995032787323, 1.0109153985977173, 1.009662389755249]


@pytest.mark.parametrize(
    ("stored", "loaded", "wanted"),
    [
        (torch.bfloat16, torch.bfloat16, "BF16"),
        (torch.bfloat16, torch.float32, "BF16"),
        (torch.float16, torch.float16, "F16"),
        (torch.float16, torch.float32, "F16"),
        (torch.float32, torch.float32, "F32"),
    ],
)
def test_the_dtype_of_the_checkpoint_is_found(
    stored: torch.dtype, loaded: torch.dtype, wanted: str
) -> None:
    weights = {role: w.to(loaded) for role, w in expert(stored).items()}
    weights["gate"][0, 0] = math.nan
    assert stored_dtype(weights) == wanted
