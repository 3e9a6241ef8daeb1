"""Every method of the folder: its size, its bytes, what it leaves, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moebound.errors import CorruptionError, FormatError, MethodError
from moebound.methods import (
    Artifact,
    GroupView,
    MatrixSpec,
    compress,
    get_method,
    method_class,
)
from moebound.methods.blob import parse_matrix, parse_shared
from moebound.methods.reading import OpenPart, Stored
from moebound.types import NUMPY_DTYPES, DType, ExpertKey

from .made import ROLES, layer, n_weights

SIZED = [
    "svd:b6", "svd:b4:f8", "svd:b5:energy", "moe_i2_re:b6", "moe_i2_re:b6:p0.25", "soco_lite:b6",
    "d2_moe_fixed:b6", "d2_moe_fixed:b5:f8:base4", "d2_moe_fixed:b6:plain",
    "rfid_re:b5", "rfid_re:b5:eta0", "rfid_re:b8:gu", "rfid_re:b4:flat:f8", "rfid_re:b5:g3:x0.5",
    "mobe_fixed:b5:s20", "mobe_fixed:b4:s20:f8:silu", "mobe_fixed:b9:s20:gu",
    "resmoe_fixed:b6", "resmoe_fixed:b3:f8:base4",
    "milo_fixed:b6", "milo_fixed:b4:i1", "milo_fixed:b5:freq:g32", "modegpt_re:b8",
    "modegpt_re:b4:q4",
]  # fmt: skip
OTHERS = [
    "svd:r4", "moe_i2_re:r4", "d2_moe_fixed:r3", "mobe_fixed:r8:m3:s5", "resmoe_fixed:k0.25",
    "milo_fixed:r2:int3", "milo_fixed:r0:int4", "modegpt_re:k0.5",
    "modegpt_re:k0.5+rtn:int6:g16", "modegpt_re:k0.5+gptq_re:int6:g16",
]  # fmt: skip


def made(setting: str, group: GroupView) -> Artifact:
    return compress(get_method(setting), group)


@pytest.mark.parametrize("setting", SIZED)
def test_the_bits_that_were_asked(setting: str) -> None:
    group = layer(8, 48, 80)
    artifact = made(setting, group)
    asked = float(setting.split(":b")[1].split(":")[0])
    found = 8 * artifact.n_bytes / n_weights(group)
    assert asked * 0.96 <= found <= asked * 1.005
    assert artifact.guarantee == "none"


@pytest.mark.parametrize("setting", SIZED + OTHERS)
def test_there_and_back(setting: str) -> None:
    """From bytes alone; on any number of threads; the setting says all."""
    group = layer()
    method = get_method(setting)
    assert get_method(method.setting) == method
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        artifact = compress(method, group)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    again = compress(method, group, threads=2)
    parts = {i: OpenPart.of(data, 0, i) for i, data in enumerate(artifact.shared)}
    for key, roles in artifact.experts.items():
        for role, matrix in roles.items():
            assert again.experts[key][role].data == matrix.data
            found = Stored.of(matrix.data).decode(lambda _, i: parts[i])
            assert found.tobytes() == matrix.decoded.tobytes()
            assert found.shape == group.experts[0].matrices[role].shape
    assert again.shared == artifact.shared


@pytest.mark.parametrize(
    "setting",
    [
        "svd:b8",
        "d2_moe_fixed:b8",
        "rfid_re:b8:eta0",
        "mobe_fixed:b8:s20",
        "resmoe_fixed:b8",
        "milo_fixed:b8",
        "soco_lite:b8",
    ],
)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_more_bits_are_nearer(setting: str, dtype: DType) -> None:
    group = layer(dtype=dtype)
    few, many = made(setting.replace("b8", "b5"), group), made(setting, group)
    assert many.rmse < few.rmse < 0.03


def turned(group: GroupView) -> GroupView:
    """The same experts as a checkpoint has them that keeps matrices [in, out]."""
    return replace(
        group,
        experts=tuple(
            replace(
                e,
                matrices={r: np.ascontiguousarray(m.T) for r, m in e.matrices.items()},
                transposed=frozenset(ROLES),
            )
            for e in group.experts
        ),
    )


@pytest.mark.parametrize(
    "setting",
    [
        "svd:r4",
        "soco_lite:b6",
        "d2_moe_fixed:r3",
        "rfid_re:b5",
        "mobe_fixed:r8:s5",
        "resmoe_fixed:k0.25",
        "modegpt_re:k0.5",
        "modegpt_re:k0.5+moqe_re:int8",
    ],
)
def test_matrices_that_are_stored_in_out(setting: str) -> None:
    group = layer()
    one, other = made(setting, group), made(setting, turned(group))
    for expert in group.experts:
        for role in ROLES:
            a = one.weights(expert.key)[role].astype(np.float32)
            b = other.weights(expert.key)[role].astype(np.float32).T
            np.testing.assert_allclose(a, b, atol=0.002)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "setting",
    [
        "svd:r4",
        "d2_moe_fixed:r3",
        "rfid_re:b5",
        "mobe_fixed:r8:s5",
        "resmoe_fixed:k0.25",
        "modegpt_re:k0.5",
        "modegpt_re:k0.5+moqe_re:int8",
        "milo_fixed:b5",
    ],
)
def test_gate_and_up_in_one(setting: str, interleaved: bool) -> None:
    group = layer()
    fused = []
    for e in group.experts:
        gate, up = e.matrices["gate"], e.matrices["up"]
        both = np.stack([gate, up], axis=1 if interleaved else 0).reshape(-1, gate.shape[1])
        fused.append(replace(e, matrices={"gate_up": both, "down": e.matrices["down"]},
                             interleaved=interleaved))  # fmt: skip
    found = made(setting, replace(group, experts=tuple(fused)))
    if setting.startswith(("resmoe", "modegpt")):  # what looks at neurons sees the same ones
        apart = made(setting, group)
        for e in group.experts:
            both = found.weights(e.key)["gate_up"]
            gate = both[::2] if interleaved else both[: len(both) // 2]
            want = apart.weights(e.key)["gate"].astype(np.float32)
            np.testing.assert_allclose(gate.astype(np.float32), want, atol=1e-3)
    assert found.rmse < 0.03


@pytest.mark.parametrize(
    "setting",
    [
        "d2_moe_fixed:r3",
        "moe_i2_re:b6:p0.25",
        "soco_lite:b6",
        "rfid_re:b5",
        "milo_fixed:b5:freq",
        "modegpt_re:k0.5",
    ],
)
def test_experts_that_no_token_reached(setting: str) -> None:
    group = layer()
    none = {name: dict(some) for name, some in group.statistics.items()}
    for key in (ExpertKey(3, 2), ExpertKey(3, 5)):
        for some in none.values():
            some[key] = np.zeros_like(some[key])
    assert np.isfinite(made(setting, replace(group, statistics=none)).rmse)
    nowhere = {
        name: {k: np.zeros_like(v) for k, v in some.items()}
        for name, some in group.statistics.items()
    }
    assert np.isfinite(made(setting, replace(group, statistics=nowhere)).rmse)


def test_diagonals_will_do() -> None:
    group = layer()
    statistics = dict(group.statistics)
    for side in ("inputs", "hidden"):
        statistics[side] = {k: h.diagonal().copy() for k, h in statistics[side].items()}
    for setting in ("d2_moe_fixed:r3", "soco_lite:b6", "modegpt_re:k0.5"):
        assert made(setting, replace(group, statistics=statistics)).rmse < 0.04


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("svd", "expected one of bN or rN"),
        ("svd:b3:r4", "expected one of bN or rN"),
        ("svd:b3:f9", "bits of a number of a factor, 2 to 8 or 16"),
        ("svd:b3:f8:f8", "expected one of"),
        ("svd:b3:energy1", "expected one of"),
        ("svd:r1.5", "expected one of"),
        ("svd:3b", "expected one of"),
        ("rfid_re:b3:x2", "how much effective rank counts"),
        ("mobe_fixed:b0", "bits a weight, all counted"),
        ("d2_moe_fixed:b3:base1", "bits of a weight of the base"),
        ("modegpt_re:b3+calibrated", "expected a share that is kept and no more"),
        ("modegpt_re:k0.5:q4+rtn:int4:g64", "expected a share that is kept and no more"),
        ("modegpt_re:k0.5+svd:r2", "looks at a whole layer"),
        ("modegpt_re:k0.5+reap_re:keep4", "looks at a whole layer"),
        ("residual:modegpt_re:k0.5+calibrated", "keeps a bound"),
    ],
)
def test_options_that_are_none(setting: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        get_method(setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("d2_moe_fixed:b1", r"the base alone takes more; the least is 2\.\d+ bits"),
        ("resmoe_fixed:b2", r"the barycentre alone takes more; the least is 2\.\d+ bits"),
        ("rfid_re:b3:gu", r"what stays take more; the least is 6\.\d+ bits"),
        ("mobe_fixed:b3:gu", r"what stays as it is takes more; the least is 5\.\d+ bits"),
        ("milo_fixed:b2", r"integers of 2 bits take more; the least is 2\.\d+ bits"),
        ("svd:b0.1", r"frames alone take more; the least is 0\.\d+ bits"),
        ("svd:b40", r"at full rank it takes 2\d\.\d+ bits, and that is the most"),
        ("modegpt_re:b20", r"it takes 16\.\d+ bits, and that is the most"),
        ("svd:r3:energy", "is sized by bN"),
    ],
)
def test_sizes_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        made(setting, layer())


def test_the_nearest_that_it_names_can_be() -> None:
    for setting in ("d2_moe_fixed", "resmoe_fixed", "milo_fixed"):
        with pytest.raises(MethodError) as caught:
            made(f"{setting}:b1", layer())
        least = str(caught.value).split("the least is ")[1].split()[0]
        made(f"{setting}:b{least}", layer())


def test_what_it_cannot_take() -> None:
    for setting in SIZED[::3]:
        group = layer()
        bad = group.experts[0].matrices["up"].copy()
        bad[1, 2] = np.nan
        spoiled = replace(group.experts[0], matrices={**group.experts[0].matrices, "up": bad})
        with pytest.raises(MethodError, match="layer 3 expert 0, up: a weight is not finite"):
            made(setting, replace(group, experts=(spoiled, *group.experts[1:])))
    with pytest.raises(MethodError, match="statistics that were not gathered: outputs"):
        made("moe_i2_re:b6", layer(statistics=False))
    smaller = replace(layer(), experts=layer().experts[:4] + layer(p=20).experts[4:])
    for setting in ("d2_moe_fixed:r3:plain", "rfid_re:b5", "mobe_fixed:r8", "resmoe_fixed:k0.25"):
        with pytest.raises(MethodError, match="experts of different sizes"):
            made(setting, smaller)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "setting",
    [
        "rfid_re:b7",
        "mobe_fixed:b7:s3",
        "mobe_fixed:r6:m2:s3",
        "d2_moe_fixed:r2",
        "resmoe_fixed:k0.3",
        "moe_i2_re:r3:p0.5",
    ],
)
def test_groups_that_do_not_divide(setting: str, n: int) -> None:
    assert made(setting, layer(n)).rmse < 0.05


def test_shared_experts_have_no_statistics() -> None:
    group = layer(2, statistics=False)
    shared = tuple(replace(e, key=ExpertKey(3, e.key.expert, True)) for e in group.experts)
    for setting in ("svd:r4", "moe_i2_re:r4", "soco_lite:b8", "d2_moe_fixed:r3", "rfid_re:b8",
                    "milo_fixed:b6:freq"):  # fmt: skip
        assert made(setting, GroupView(shared)).rmse < 0.04
    with pytest.raises(MethodError, match="no statistics of its hidden values"):
        made("modegpt_re:k0.5", GroupView(shared))


# Hostile bytes


@pytest.mark.parametrize(
    "setting",
    [
        "svd:r4",
        "d2_moe_fixed:r3",
        "rfid_re:b14",
        "mobe_fixed:r8:s2",
        "resmoe_fixed:k0.25",
        "milo_fixed:b9",
        "modegpt_re:k0.5:q4",
        "modegpt_re:k0.5+rtn:int4:g8",
    ],
)
def test_damaged_payloads_are_refused_or_decode(setting: str) -> None:
    group, rng = layer(2, 6, 10), np.random.default_rng(0)
    artifact = made(setting, group)
    cls = method_class(setting.split(":")[0])
    payloads = [bytes(parse_shared(part).payload) for part in artifact.shared]
    for role in ("gate", "down"):
        matrix = artifact.experts[ExpertKey(3, 0)][role]
        blob = parse_matrix(matrix.data)
        spec = MatrixSpec(blob.shape, "BF16")
        for _ in range(300):
            parts = list(payloads)
            data = bytearray(blob.payload)
            where = int(rng.integers(0, 1 + len(matrix.uses)))
            hit = data if not where else bytearray(parts[matrix.uses[where - 1]])
            at = int(rng.integers(0, min(len(hit), int(rng.choice([8, 10**6])))))
            if rng.random() < 0.2:
                del hit[at:]
            else:
                hit[at] = rng.integers(0, 256)
            if where:
                parts[matrix.uses[where - 1]] = bytes(hit)
            try:
                opened = [cls.open_shared(memoryview(parts[i])) for i in matrix.uses]
                with np.errstate(all="ignore"):
                    found = cls.decode(memoryview(bytes(data)), spec, opened)
            except (CorruptionError, FormatError):
                continue
            assert found.shape == spec.shape
            assert found.dtype in (np.float32, NUMPY_DTYPES["BF16"])
