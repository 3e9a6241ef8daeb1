"""Figures of the papers, and of those who read their code: what they say of sizes and of energy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moebound.methods import Artifact, ExpertView, GroupView, SharedPayload, compress, get_method
from moebound.methods.bases.approximation import ranks
from moebound.methods.bases.d2_moe import D2Moe
from moebound.methods.bases.exact import per_rank, product_bytes
from moebound.methods.bases.lowrank import factors, spectrum
from moebound.methods.bases.moe_i2 import MoeI2
from moebound.methods.bases.rfid import Rfid, bucket_means, buckets, effective_rank
from moebound.methods.blob import parse_matrix, parse_shared
from moebound.types import NUMPY_DTYPES, Array, ExpertKey

from .made import ROLES, layer, n_weights, shape_of

QWEN3 = 128, 768, 2048


def made(setting: str, group: GroupView) -> Artifact:
    return compress(get_method(setting), group)


def payload_bytes(artifact: Artifact) -> int:
    """Without frames."""
    matrices = sum(len(parse_matrix(m.data).payload) for m in artifact)
    return matrices + sum(len(parse_shared(part).payload) for part in artifact.shared)


def of_shapes(n: int, p: int, d: int) -> GroupView:
    """A layer that has shapes, and one weight behind all of them."""
    zero = np.zeros((), NUMPY_DTYPES["BF16"])
    return GroupView(
        tuple(
            ExpertView(
                ExpertKey(0, e), {r: np.broadcast_to(zero, shape_of(r, p, d)) for r in ROLES}
            )
            for e in range(n)
        )
    )


def relative_error(group: GroupView, artifact: Artifact, *roles: Any) -> float:
    off = whole = 0.0
    for e in group.experts:
        for role in roles or ROLES:
            original = e.matrices[role].astype(np.float64)
            off += float(((original - artifact.weights(e.key)[role].astype(np.float64)) ** 2).sum())
            whole += float((original**2).sum())
    return float(np.sqrt(off / whole))


# Ranks and bytes


def test_the_rank_that_pays_at_all() -> None:
    """ON / (O + N) is 558.5 of 768 x 2048: at 559 a product takes more than the matrix."""
    shape = QWEN3[1:]
    assert product_bytes(shape, 558, 16) < 2 * 768 * 2048 < product_bytes(shape, 559, 16)
    # lr(O, N, r) = 2 r (O + N), and a byte a rank.
    assert product_bytes(shape, 100, 16) == 2 * 100 * (768 + 2048) + 100
    assert per_rank(shape, 16) == 2 * (768 + 2048) + 1


@pytest.mark.parametrize(("kept", "rank"), [(0.4, 219), (0.6, 331)])
def test_ranks_of_d2_moe(kept: float, rank: int) -> None:
    """Of Qwen3-30B's layers with the base stored whole: k = 219 and 331."""
    n, p, d = QWEN3
    group = of_shapes(n, p, d)
    bases = [SharedPayload(bytes(2 * p * d), 0)] * 3
    found = D2Moe(bits=16 * kept)._ranks(group, bases)
    assert max(found) - min(found) <= 1
    assert round(float(np.mean(found))) == rank
    # 2 · 3 p d for the base, 6 k (p + d) for each expert.
    assert 6 * p * d + n * 6 * rank * (p + d) == pytest.approx(kept * n * 6 * p * d, rel=0.001)


def test_ranks_by_importance() -> None:
    """MoE-I²: R_e = (I_e + ε)^0.15 / Σ · R_a · n. An expert of 1000 times the importance has 2.8
    times the rank."""
    group = layer(4, 64, 96)
    outputs = {e.key: np.ones((2, 96)) * (1000.0 if e.key.expert == 0 else 1.0)
               for e in group.experts}  # fmt: skip
    seen = GroupView(group.experts, {"outputs": outputs})
    kept = [(e, role) for e in seen.experts for role in ROLES]
    found = MoeI2(rank=16).chosen_ranks(seen, kept)
    share = np.array([1000**0.15, 1, 1, 1])
    want = share / share.sum() * 16 * 4
    for e in range(4):
        for role in ROLES:
            assert abs(found[ExpertKey(3, e), role] - want[e]) <= 1
    assert sum(found.values()) == 16 * 4 * 3


def test_ranks_within_budgets_and_caps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 20))
        scores, costs = rng.exponential(size=n), rng.integers(1, 50, n).astype(float)
        caps = [int(c) for c in rng.integers(0, 30, n)]
        budget = float(rng.uniform(0, 1.3) * (caps @ costs))
        found = ranks(list(scores), caps, list(costs), budget)
        assert all(0 <= r <= cap for r, cap in zip(found, caps, strict=True))
        left = budget - float(np.dot(found, costs))
        assert left >= -1e-9
        assert found == caps or left < max(costs)


def test_bytes_of_mobe() -> None:
    """γ = 1/3 + 2r/3d + 2mr/3np of a layer: 75 % at r = p, m = n/4 of Qwen3's shapes, down as it
    is; 2 (n p r + m r d + n m) bytes a projection."""
    n, p, d, m = 16, 24, 64, 4
    group = layer(n, p, d)
    artifact = made("mobe_fixed:r24:m4:s0:gu", group)
    wanted = 2 * 2 * (n * p * p + m * p * d + n * m) + n * p * d * 2
    # And beside them: a byte a rank and expert, heads.
    assert 0 < payload_bytes(artifact) - wanted < 2 * (n * (24 + 8) + 40) + 5 * n
    assert payload_bytes(artifact) / (2 * n_weights(group)) == pytest.approx(0.75, abs=0.02)


def test_bytes_of_resmoe() -> None:
    """A quarter of Δ at 16 bits and a bit for each weight: 5 bits a weight, and the barycentre."""
    group = layer(4, 48, 64)
    artifact = made("resmoe_fixed:k0.25", group)
    total = n_weights(group)
    wanted = 5 * total / 8 + 2 * total / 4 + 4 * 48
    assert payload_bytes(artifact) == pytest.approx(wanted, rel=0.01)


def test_bytes_of_milo() -> None:
    """q(O, N, 3, 64) and r (O + N) numbers."""
    group = layer(2, 64, 96, statistics=False)
    artifact = made("milo_fixed:r5:int3", group)
    each = 64 * 96 * 3 // 8 + 64 * 96 // 64 * 4 + 5 * (64 + 96) // 2 + 5
    assert payload_bytes(artifact) - 6 * each in range(1, 6 * 14)


def test_bytes_of_modegpt() -> None:
    """6 p' d, and a bit a channel and matrix."""
    group = layer(2, 64, 96)
    artifact = made("modegpt_re:k0.5", group)
    assert payload_bytes(artifact) == 2 * (6 * 32 * 96 + 3 * (64 // 8 + 3))


def test_bytes_of_rfid() -> None:
    """2 K (4 p + d) a group and projection, 2 |η| a matrix."""
    group = layer(8, 24, 40)
    method = Rfid(bits=8.0)
    members = method.grouped(group)
    chosen = method._ranks(group, members, list(ROLES))
    artifact = made("rfid_re:b8", group)
    wanted = sum(2 * k * (4 * 24 + 40) for k in chosen.values())
    wanted += 24 * 2 * round(0.03 * 24 * 40)
    beside = sum(4 * k for k in chosen.values()) + 24 * 16 + 3 * 20
    assert 0 < payload_bytes(artifact) - wanted < beside
    assert [e.key.expert for e in members[0]] == [7, 6, 5, 4]


# Energy and errors


def gaussian(n: int, p: int, d: int, seed: int = 0) -> GroupView:
    return layer(n, p, d, common=0, seed=seed, statistics=False)


@pytest.mark.slow
def test_mobe_of_gaussian_weights() -> None:
    """m = n/4, r = p of p/d = 3/8: it starts at 53 %, as a plain SVD of the same bytes, and what is
    fitted is a real gain (0.33 after tens of thousands of steps, it is said)."""
    group = gaussian(16, 48, 128)
    start = relative_error(group, made("mobe_fixed:r48:m4:s0", group))
    assert start == pytest.approx(0.53, abs=0.02)
    rank = int((16 * 48 * 48 + 4 * 48 * 128) / (16 * (48 + 128)))
    plain = relative_error(group, made(f"svd:r{rank}", group))
    assert plain == pytest.approx(start, abs=0.03)
    fitted = relative_error(group, made("mobe_fixed:r48:m4:s300", group))
    assert fitted < 0.40


def test_a_fit_that_diverges_keeps_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    group = gaussian(4, 16, 24)
    start = relative_error(group, made("mobe_fixed:r8:m2:s0", group))
    for rate in (50.0, 1e30):
        monkeypatch.setattr("moebound.methods.bases.mobe.RATE", rate)
        found = relative_error(group, made("mobe_fixed:r8:m2:s20", group))
        assert found <= start + 1e-6


def test_a_random_residual_has_the_energy_of_its_share() -> None:
    """One-hot columns of norm 1: d / D of what has no structure, 3 % at 3 %."""
    rng = np.random.default_rng(0)
    rest = rng.standard_normal((1, 60_000))
    taken = buckets(17, rest.size, 1800)
    means = bucket_means(rest, 1, taken, 1800)
    left = rest - means[0][taken]
    assert 1 - (left**2).sum() / (rest**2).sum() == pytest.approx(0.03, abs=0.003)
    counts = np.bincount(taken, minlength=1800)
    assert counts.min() > 10
    assert counts.std() < 1.2 * np.sqrt(60_000 / 1800)
    assert taken[:4].tolist() == BUCKETS


BUCKETS = [525, 302, 1092, 484]
"""splitmix64, written down."""


def test_eta_is_in_what_is_decoded() -> None:
    """A group whose weights are one constant a bucket: η has them, which ranks do not."""
    p, d = 12, 20
    taken = buckets((0x9E3779B97F4A7C15 * 4) % (1 << 64), p * d, round(0.5 * p * d))
    values = np.random.default_rng(0).standard_normal(round(0.5 * p * d))[taken].reshape(p, d)
    zero = np.zeros((p, d), np.float32)
    experts = tuple(
        ExpertView(ExpertKey(3, e), {"gate": (values * (e + 1)).astype(np.float32), "up": zero})
        for e in range(4)
    )
    group = GroupView(experts)
    with_eta = made("rfid_re:b11:flat:eta0.5", group)
    without = made("rfid_re:b11:flat:eta0", group)
    assert relative_error(group, with_eta, "gate") < 0.2
    assert relative_error(group, with_eta, "gate") < 0.7 * relative_error(group, without, "gate")


def test_effective_rank() -> None:
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.ones((5, 9))) == pytest.approx(1)
    # Two to one: exp(-(0.8 ln 0.8 + 0.2 ln 0.2)).
    assert effective_rank(np.diag([2.0, 1.0])) == pytest.approx(np.exp(0.5004024), rel=1e-6)


def test_ranks_follow_use_and_information() -> None:
    group = layer(8, 48, 64)
    method = Rfid(bits=5.0, xi=0.0)
    found = method._ranks(group, method.grouped(group), ["gate", "up", "down"])
    count = np.array([40 + 100 * e**2 for e in range(8)])
    share = count[4:].sum() / count.sum()
    ratio = found["gate", 0] / (found["gate", 0] + found["gate", 1])
    assert ratio == pytest.approx(share, abs=0.06) or found["gate", 0] == 64
    even = Rfid(bits=5.0, xi=1.0)
    found = even._ranks(group, even.grouped(group), ["gate", "up", "down"])
    assert abs(found["gate", 0] - found["gate", 1]) <= 2


def test_eckart_and_young() -> None:
    w = np.random.default_rng(0).standard_normal((30, 50)) * np.exp(-np.arange(50) / 10)
    s = np.linalg.svd(w, compute_uv=False)
    for matrix in (w, w.T):
        np.testing.assert_allclose(np.sqrt(spectrum(matrix)), s, rtol=1e-6, atol=1e-6)
        left, right, energy = factors(matrix)
        np.testing.assert_allclose(energy, s**2, rtol=1e-6, atol=1e-6)
        near = left[:, :7] @ right[:7]
        assert np.linalg.norm(matrix - near) == pytest.approx(np.sqrt((s[7:] ** 2).sum()))


def test_whitened_is_the_svd_of_w_times_s() -> None:
    """Against the textbook: SVD of W S with S Sᵀ = H, times S⁻¹."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((12, 20)), rng.standard_normal((60, 20)) * np.exp(np.arange(20) / 5)
    h = x.T @ x / 60
    s = np.linalg.cholesky(h)
    u, sigma, v = np.linalg.svd(w @ s)
    want = (u[:, :5] * sigma[:5]) @ v[:5] @ np.linalg.inv(s)
    left, right, energy = factors(w, h)
    np.testing.assert_allclose(left[:, :5] @ right[:5], want, atol=1e-8)
    np.testing.assert_allclose(energy[:12], sigma**2, rtol=1e-8)


def output_error(group: GroupView, artifact: Artifact) -> float:
    total = 0.0
    for e in group.experts:
        for role in ROLES:
            h = group.statistics["hidden" if role == "down" else "inputs"][e.key]
            off = e.matrices[role].astype(np.float64)
            off = off - artifact.weights(e.key)[role].astype(np.float64)
            total += float(np.einsum("ij,jk,ik->", off, h, off))
    return total


@pytest.mark.parametrize(
    ("with_it", "without"),
    [("d2_moe_fixed:r6", "d2_moe_fixed:r6:plain"), ("soco_lite:b6", "svd:b6:energy")],
)
def test_statistics_bring_outputs_nearer(with_it: str, without: str) -> None:
    group = layer(4, 48, 64)
    blind = output_error(group, made(without, group))
    assert output_error(group, made(with_it, group)) < 0.9 * blind


def test_soco_keeps_what_its_formula_says() -> None:
    """One matrix: the components with the largest σ² vᵀ H v."""
    group = layer(1, 24, 40)
    e = group.experts[0]
    one = GroupView((ExpertView(e.key, {"gate": e.matrices["gate"]}),), group.statistics)
    artifact = made("soco_lite:b8", one)
    h = group.statistics["inputs"][e.key]
    u, s, v = np.linalg.svd(e.matrices["gate"].astype(np.float64), full_matrices=False)
    gain = s**2 * np.einsum("kj,jl,kl->k", v, h, v)
    rank = parse_matrix(artifact.experts[e.key]["gate"].data).payload[0]
    kept = np.argsort(-gain)[:rank]
    want = (u[:, kept] * s[kept]) @ v[kept]
    np.testing.assert_allclose(artifact.weights(e.key)["gate"].astype(float), want, atol=2e-3)
    assert 0 < rank < 24


def swiglu(x: Array, weights: Any) -> Array:
    f = {r: torch.from_numpy(m.astype(np.float32)) for r, m in weights.items()}
    t = torch.from_numpy(x.astype(np.float32))
    hidden = torch.nn.functional.silu(t @ f["gate"].T) * (t @ f["up"].T)
    return (hidden @ f["down"].T).numpy()


def test_modegpt_makes_up_for_channels() -> None:
    """Half of the channels are linear in the others: half of them do. Without the new down
    projection, half of the output is lost."""
    rng = np.random.default_rng(0)
    p, d = 32, 40
    gate, up, down = (rng.standard_normal((s, t)) for s, t in ((p, d), (p, d), (d, p)))
    gate[16:], up[16:] = gate[:16], 2 * up[:16]
    weights = {"gate": gate, "up": up, "down": down}
    x = rng.standard_normal((2000, d))
    z = torch.from_numpy(x @ gate.T)
    hidden = (torch.nn.functional.silu(z) * torch.from_numpy(x @ up.T)).numpy()
    key = ExpertKey(0, 0)
    view = ExpertView(key, {r: m.astype(np.float32) for r, m in weights.items()})  # type: ignore[misc]
    statistics = {"hidden": {key: hidden.T @ hidden}, "tokens": {key: np.asarray(2000.0)}}
    group = GroupView((view,), statistics)
    want = swiglu(x, view.matrices)

    def error(weights: Any) -> float:
        return float(np.linalg.norm(swiglu(x, weights) - want) / np.linalg.norm(want))

    found = made("modegpt_re:k0.5", group).weights(key)
    cut = {**found, "down": np.where(found["down"] != 0, view.matrices["down"], 0)}
    assert error(found) < 0.1
    assert error(cut) > 0.3


def test_resmoe_sees_through_an_order() -> None:
    """Experts that are one, its neurons in another order: the barycentre is it, and nothing is
    left. Weights come back in their own places."""
    rng = np.random.default_rng(0)
    base = layer(1, 24, 40, statistics=False).experts[0].matrices
    experts = []
    for e in range(5):
        order = rng.permutation(24)
        experts.append(ExpertView(ExpertKey(3, e), {
            "gate": base["gate"][order], "up": base["up"][order],
            "down": np.ascontiguousarray(base["down"][:, order]),
        }))  # fmt: skip
    group = GroupView(tuple(experts))
    artifact = made("resmoe_fixed:k0", group)
    assert relative_error(group, artifact) < 0.01
    mean = made("d2_moe_fixed:r0:plain", group)
    assert relative_error(group, mean) > 0.8


def test_milo_is_nearer_than_its_integers_alone() -> None:
    """A compensator is worth its bytes where errors have structure: outlying channels here."""
    group = layer(2, 64, 96, statistics=False)
    experts = []
    for e in group.experts:
        spread = {r: m.astype(np.float32) for r, m in e.matrices.items()}
        for m in spread.values():
            m[:, ::32] *= 20
        experts.append(ExpertView(e.key, spread))
    group = GroupView(tuple(experts))
    alone = relative_error(group, made("milo_fixed:r0:int3", group))
    helped = relative_error(group, made("milo_fixed:r4:int3", group))
    assert helped < 0.9 * alone
    rtn = relative_error(group, made("rtn:int3:g64", group))
    assert alone < 1.02 * rtn
