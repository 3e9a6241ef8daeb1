"""Experts that share weights: clusters, means, what is promised; and two experts in one's bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moebound.checkpoint import open_checkpoint
from moebound.errors import CorruptionError, FormatError, MethodError
from moebound.files.formats.statistics import Statistics
from moebound.methods import MatrixSpec, compress, get_method, method_class
from moebound.methods.merging.merged import average_linkage, k_means
from moebound.methods.merging.puzzle import SIMILAR, merged, packed, unpacked
from moebound.store import open_store
from moebound.types import Array, ExpertKey
from tiny_models import MakeTiny

from .keeping import RATE, group, headers, statistics, stored

SENT = np.array([5.0, 1, 3, 0])


def clusters_of(setting: str, given: Any) -> dict[int, int]:
    method: Any = get_method(setting)
    return dict(method.edit(given).alias)


def outputs(*rows: tuple[float, ...]) -> dict[str, Any]:
    """Statistics of experts with these mean outputs, over 4 tokens each."""
    mean = np.array(rows)
    return {"plain": 4 * np.stack([mean, mean * mean], 1), "tokens": np.full(len(mean), 4.0)}


def test_m_smoe_joins_the_dominant_with_the_most_similar_logits() -> None:
    logits = np.array([[1.0, 0, 1, 0], [0, 1, 0, 1], [2, 0.1, 2, 0], [0.2, 5, 0, 4]])
    gram = logits @ logits.T
    given = group(4, sent=np.array([9.0, 8, 1, 2]), logits=gram)
    assert clusters_of("m_smoe_re:keep2", given) == {2: 0, 3: 1}
    assert clusters_of("m_smoe_re:keep3", given) == {2: 0}


def test_hc_smoe_joins_what_is_nearest_on_average() -> None:
    """By hand: 0 and 1 first, then 3 to 2, since the mean distance decides, not the least."""
    rows = np.array([[0.0, 0], [1, 0], [4.4, 0], [7.5, 0], [20, 0]])
    assert average_linkage(rows, 4) == [[0, 1], [2], [3], [4]]
    assert average_linkage(rows, 3) == [[0, 1], [2, 3], [4]]  # 2 is 3.1 from 3, 3.9 from {0, 1}
    assert average_linkage(rows, 2) == [[0, 1, 2, 3], [4]]
    given = group(4, sent=SENT, **outputs((0, 0), (9, 9), (0, 1), (9, 8)))
    assert clusters_of("hc_smoe_fixed:keep2", given) == {2: 0, 3: 1}
    assert clusters_of("hc_smoe_fixed:keep2:kmeans", given) == {2: 0, 3: 1}


def test_k_means_leaves_no_cluster_empty() -> None:
    rows = np.zeros((5, 3))
    rows[4] = 1
    for n in range(1, 6):
        found = k_means(rows, n)
        assert sorted(place for members in found for place in members) == list(range(5))
        assert len(found) == n
        assert all(found)


def test_sub_moe_goes_by_the_cosine() -> None:
    given = group(4, sent=SENT, **outputs((1, 0), (0, 5), (9, 1), (0, 0.1)))
    assert clusters_of("sub_moe_re:keep2", given) == {2: 0, 3: 1}


def test_a_cluster_has_the_mean_by_tokens() -> None:
    given = group(4, sent=SENT, **outputs((0, 0), (9, 9), (0, 1), (9, 8)))
    artifact = compress(get_method("hc_smoe_fixed:keep2"), given)
    weights = [expert.matrices for expert in given.experts]
    for role in ("gate", "up", "down"):
        mean = (5 * weights[0][role].astype(float) + 3 * weights[2][role]) / 8
        np.testing.assert_allclose(artifact.weights(ExpertKey(3, 0))[role], mean, rtol=1e-6)
        # A cluster that got no token but for one: its weights are those of the one.
        assert (artifact.weights(ExpertKey(3, 3))[role] == weights[1][role]).all()
        for alias, target in ((2, 0), (3, 1)):
            mine, theirs = (artifact.experts[ExpertKey(3, e)][role] for e in (alias, target))
            assert (mine.decoded == theirs.decoded).all()
            assert len(mine.data) < 40
            error = np.abs(weights[alias][role].astype(float) - theirs.decoded).max()
            assert mine.certificate.max_abs_error == pytest.approx(error)
    silent = group(2, sent=np.zeros(2), **outputs((0, 0), (0, 1)))
    both = [expert.matrices["up"].astype(float) for expert in silent.experts]
    found = compress(get_method("hc_smoe_fixed:keep1"), silent).weights(ExpertKey(3, 0))["up"]
    np.testing.assert_allclose(found, (both[0] + both[1]) / 2, rtol=1e-6)


def test_a_bound_on_merged_weights_is_no_promise_for_the_experts() -> None:
    given = group(4, sent=SENT, **outputs((0, 0), (9, 9), (0, 1), (9, 8)))
    views = tuple(replace(e, bounds=dict.fromkeys(e.matrices, RATE)) for e in given.experts)
    artifact = compress(get_method("hc_smoe_fixed:keep2+bound"), replace(given, experts=views))
    for matrix in artifact:
        assert (matrix.certificate.guarantee, matrix.certificate.bound) == ("none", None)


def test_without_truncation_a_common_subspace_is_the_mean() -> None:
    """W = U S sum share_e V_e of the SVD of all side by side; to 1e-13 the mean itself. With a rank
    it is what the SVD gives; and V reshaped without a transpose is far off."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(6, 9)) for _ in range(3)]
    share = np.array([0.5, 0.3, 0.2])
    mean = sum(s * w for s, w in zip(share, weights, strict=True))
    u, s, vt = np.linalg.svd(np.concatenate(weights, axis=1), full_matrices=False)
    mixed = sum(p * vt[:, 9 * e : 9 * e + 9] for e, p in enumerate(share))
    np.testing.assert_allclose(u * s @ mixed, mean, atol=1e-13)
    whole: Any = get_method("sub_moe_re:keep2")
    np.testing.assert_allclose(whole.mixed(weights, share), mean, atol=1e-15)
    for rank in (1, 3, 6):
        cut: Any = get_method(f"sub_moe_re:keep2:rank{rank}")
        wanted = u[:, :rank] * s[:rank] @ mixed[:rank]
        np.testing.assert_allclose(cut.mixed(weights, share), wanted, atol=1e-12)
    scrambled = sum(p * part for p, part in zip(share, vt.reshape(3, 6, 9), strict=True))
    assert np.linalg.norm(u * s @ scrambled - mean) > np.linalg.norm(mean)
    with pytest.raises(MethodError, match="rank7: a matrix has 6 outputs"):
        get_method("sub_moe_re:keep2:rank7").mixed(weights, share)  # type: ignore[attr-defined]


# PuzzleMoE


def gaussian_pair() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000, 1000)).astype(np.float32)
    return a, b


def lost(a: Array, b: Array, similar: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """Relative error of a Gaussian pair by this threshold."""
    monkeypatch.setattr("moebound.methods.merging.puzzle.SIMILAR", similar)
    one = np.ones(1, np.float32)
    size, masks = merged(a, b, one, one)
    again = [np.where(mask, np.sign(w) * size, 0) for w, mask in zip((a, b), masks, strict=True)]
    off = sum(float(((w - g) ** 2).sum()) for w, g in zip((a, b), again, strict=True))
    return float(np.sqrt(off / float((a * a).sum() + (b * b).sum())))


def test_what_a_pair_of_gaussian_experts_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 % of weights are similar, 22 % relative error, and 0.4 is about the best threshold."""
    a, b = gaussian_pair()
    similar = np.abs(np.abs(a) - np.abs(b)) <= 0.4 * (np.abs(a) + np.abs(b))
    assert similar.mean() == pytest.approx(0.48, abs=0.01)
    errors = {t: lost(a, b, t, monkeypatch) for t in (0.2, 0.3, SIMILAR, 0.5, 0.6)}
    assert errors[0.4] == pytest.approx(0.22, abs=0.01)
    assert min(errors, key=lambda t: errors[t]) == 0.4


def test_sixteen_bits_hold_two_weights() -> None:
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(size=5000)).astype(ml_dtypes.bfloat16).astype(np.float32)
    size = np.maximum(size, 2.0**-15).astype(np.float32)
    bits = rng.integers(0, 16, 5000).astype(np.uint16)
    codes = packed(size, bits)
    assert codes.dtype == np.uint16
    again, back = unpacked(codes)
    assert (again == size).all()
    assert (back == bits).all()
    # What is smaller keeps its mantissa and gets the smallest exponent.
    small = packed(np.array([1.5 * 2.0**-30, 0.0], np.float32), np.zeros(2, np.uint16))
    assert unpacked(small)[0].tolist() == [1.5 * 2.0**-15, 2.0**-15]
    large = packed(np.array([3 * 2.0**20], np.float32), np.zeros(1, np.uint16))
    assert unpacked(large)[0].tolist() == [1.5 * 2.0**16]


def puzzled(setting: str, n: int) -> tuple[Any, Any]:
    given = group(
        n, tokens=np.full(n, 10.0), inputs_diagonal=np.ones((n, 6)), hidden_diagonal=np.ones((n, 8))
    )
    return given, compress(get_method(setting), given)


def test_pairs_of_experts_by_the_definition() -> None:
    """Every weight is the mean of sizes, its own, or 0; and 0 stays 0. One of five is whole."""
    given, artifact = puzzled("puzzle_moe_re:seed2", 5)
    assert len(artifact.shared) == 6
    originals = {e.key: e.matrices["up"] for e in given.experts}
    decoded = {key: artifact.weights(key)["up"] for key in originals}
    whole = [key for key in originals if (decoded[key] == originals[key]).all()]
    assert len(whole) == 1
    parts = {key: artifact.experts[key]["up"].uses for key in originals if key not in whole}
    pairs = {uses: [k for k in parts if parts[k] == uses] for uses in parts.values()}
    assert sorted(map(len, pairs.values())) == [2, 2]
    for first, second in pairs.values():
        a, b = (np.abs(originals[key]) for key in (first, second))
        similar = np.abs(a - b) <= np.float32(0.4) * (a + b)
        mean = ((a + b) / 2).astype(ml_dtypes.bfloat16).astype(np.float32)
        for key, own, other in ((first, a, b), (second, b, a)):
            size = np.where(similar, mean, own.astype(ml_dtypes.bfloat16).astype(np.float32))
            wanted = np.where(similar | (own > other), np.sign(originals[key]) * size, 0)
            assert (decoded[key] == wanted).all()
    again = puzzled("puzzle_moe_re:seed2", 5)[1]
    assert artifact.shared == again.shared
    assert artifact.shared != puzzled("puzzle_moe_re:seed3", 5)[1].shared


def test_the_more_salient_weight_is_that_of_the_larger_share() -> None:
    a, b = np.array([[1.0, 1.0]], np.float32), np.array([[-3.0, 3.0]], np.float32)
    size, (mine, theirs) = merged(a, b, np.array([4.0, 1], np.float32), np.ones(2, np.float32))
    assert size.tolist() == [[1.0, 3.0]]  # 1 x 4 is more than 3 x 1
    assert mine.tolist() == [[True, False]]
    assert theirs.tolist() == [[False, True]]


def test_pairs_bytes_by_the_formula() -> None:
    """2 bytes a pair of weights: 8 bits a weight; with 3 bits of W_m (3.25 + 4) / 2 = 3.6."""
    n, n_weights = 4, 64 * 64
    rng = np.random.default_rng(0)
    given = group(n, tokens=np.full(n, 10.0), inputs_diagonal=np.ones((n, 64)),
                  hidden_diagonal=np.ones((n, 64)))  # fmt: skip
    views = tuple(
        replace(e, matrices={"up": rng.normal(size=(64, 64)).astype(ml_dtypes.bfloat16)})
        for e in given.experts
    )
    for setting, bits in (("puzzle_moe_re", 8.0), ("puzzle_moe_re:seed0+rtn:int3:g64", 3.648)):
        artifact = compress(get_method(setting), replace(given, experts=views))
        payload = n * n_weights * bits / 8
        assert payload <= artifact.n_bytes < payload + (n + n // 2) * 100
    packed_parts = compress(get_method("puzzle_moe_re"), replace(given, experts=views)).shared
    assert sum(len(part) for part in packed_parts) - 2 * 2 * n_weights < 2 * 50


@pytest.mark.parametrize(
    ("payload", "shared"),
    [(b"\0", []), (b"\3", [(np.zeros(4, "<u2"), None)]), (b"", []), (b"\0\0", []),
     (b"\0", [(np.zeros(3, "<u2"), None)]), (b"\2" + bytes(15), [])],
)  # fmt: skip
def test_bytes_of_no_pair_are_refused(payload: bytes, shared: list[Any]) -> None:
    with pytest.raises(CorruptionError):
        method_class("puzzle_moe_re").decode(memoryview(payload), MatrixSpec((2, 2), "F32"), shared)


@pytest.mark.parametrize("payload", [b"", b"\0\0\0\0", b"\2", b"\1\5abc"])
def test_bytes_of_no_part_are_refused(payload: bytes) -> None:
    with pytest.raises(FormatError):
        method_class("puzzle_moe_re").open_shared(memoryview(payload))


ROADS = [
    "m_smoe_re:keep2", "m_smoe_re:keep3+rtn:int4:g16", "hc_smoe_fixed:keep2+bound",
    "hc_smoe_fixed:keep50%:kmeans+calibrated", "sub_moe_re:keep2:rank8", "puzzle_moe_re",
    "puzzle_moe_re:seed3+rtn:int3:g16",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Statistics]:
    src = tiny("qwen2_moe")
    return src, statistics(src, tmp_path_factory.mktemp("stats") / "s")


@pytest.mark.parametrize("method", ROADS)
def test_the_whole_road(method: str, made: tuple[Path, Statistics], tmp_path: Path) -> None:
    src, found = made
    summary = stored(src, tmp_path / "dst", method, found)
    store = open_store(tmp_path / "dst")
    for expert in store.experts():
        for matrix in expert.matrices:
            assert matrix.record.certificate.guarantee == "none"
    if not method.startswith("puzzle"):
        assert all(edit.alias for edit in store.router_edits().values())
    if method == "m_smoe_re:keep2":
        weights = sum(m.size for m in open_checkpoint(src).experts()[0].matrices)
        assert summary.expert_bytes_after == 2 * 2 * 2 * weights + headers(tmp_path / "dst")


@pytest.mark.parametrize(
    "method", ["reap_re:keep2+rtn:int4:g16", "m_smoe_re:keep2+bound", "puzzle_moe_re"]
)
def test_shared_experts_are_coded_and_no_more(
    method: str, made: tuple[Path, Statistics], tmp_path: Path
) -> None:
    """No router chooses among them: all stay, and what a bound promises is not for them."""
    src, found = made
    stored(src, tmp_path / "dst", method, found, shared_experts=True)
    store = open_store(tmp_path / "dst")
    shared = [expert for expert in store.experts() if expert.key.shared]
    assert len(shared) == 2
    for expert in shared:
        for matrix in expert.matrices:
            assert matrix.tensor.n_bytes > matrix.record.certificate.n_weights / 4
    edits = store.router_edits().values()
    assert len(edits) == (0 if method.startswith("puzzle") else 2)
