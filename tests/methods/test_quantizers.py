"""Quantizers as error sources: what they leave, and what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebound.checkpoint import Role
from moebound.errors import BackendUnavailable, MethodError, MoeboundError
from moebound.methods import get_method
from moebound.methods.rtn import Rtn
from moebound.sensitivity.noise import Changed, generators_for, parse_source
from moebound.types import ExpertKey, TensorStats


def apply(name: str, matrix: torch.Tensor) -> Changed:
    draws = generators_for(0, ExpertKey(1, 0))
    return parse_source(name).apply({"gate": matrix}, None, TensorStats(), draws)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("rtn:int4:g64", 4 + 20 / 64),
        ("rtn:int3:g128", 3 + 19 / 128),
        ("rtn:int8:g32", 8 + 24 / 32),
        ("rtn:int1:g128", 1 + 16 / 128),
    ],
)
def test_every_byte_is_counted(name: str, bits: float) -> None:
    matrix = weights(64, 128)
    framing = (apply(name, matrix).n_bytes or 0) - bits * matrix.numel() / 8
    assert 0 < framing < 32  # of the one matrix: what it is, and a checksum


def test_a_group_by_hand() -> None:
    # Scale 6 / 3 = 2, zero point 1: the integers 0, 1, 2, 3 stand for -2, 0, 2, 4.
    matrix = torch.tensor([[-2.0, -0.9, 0.9, 4.0]])
    found = apply("rtn:int2:g4", matrix).matrices["gate"]
    assert found.tolist() == [[-2.0, 0.0, 0.0, 4.0]]


@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), group=st.integers(2, 70))
def test_no_weight_moves_by_more_than_a_step(seed: int, bits: int, group: int) -> None:
    matrix = weights(5, 13, seed=seed)
    found = apply(f"rtn:int{bits}:g{group}", matrix).matrices["gate"]
    assert found.shape == matrix.shape
    for start in range(0, matrix.numel(), group):
        part = matrix.flatten()[start : start + group]
        step = (part.clamp(min=0).max() - part.clamp(max=0).min()) / (2**bits - 1)
        error = (found.flatten()[start : start + group] - part).abs().max()
        # Half a step of rounding, half of the zero point's; float16 rounds the step, by 2^-11 of
        # it or, of tiny ones, by 2^-25, and so many steps are multiplied by it.
        assert error <= 1.01 * step * (1 + 2.0**bits * 2**-11) + 2.0**bits * 2**-25


@pytest.mark.parametrize("end", ["", ":coded"])
def test_one_bit_is_the_sign_times_the_mean(end: str) -> None:
    # The last group has two weights only.
    matrix = torch.tensor([[-1.0, 2.0, -3.0, 0.0, 4.0, -8.0]])
    found = apply(f"rtn:int1:g4{end}", matrix).matrices["gate"]
    assert found.tolist() == [[-1.5, 1.5, -1.5, 1.5, 6.0, -6.0]]
    assert torch.equal(
        apply("rtn:int1:g4", torch.zeros(2, 64)).matrices["gate"], torch.zeros(2, 64)
    )


def test_a_width_for_each_linear_block() -> None:
    roles: tuple[Role, ...] = ("gate", "up", "down")
    matrices = {role: weights(8, 64, seed=at) for at, role in enumerate(roles)}
    draws = generators_for(0, ExpertKey(1, 0))
    found = parse_source("rtn:int2-5:g64").apply(matrices, None, TensorStats(), draws)
    for role, matrix in matrices.items():
        alone = apply(f"rtn:int{5 if role == 'down' else 2}:g64", matrix).matrices["gate"]
        assert torch.equal(found.matrices[role], alone)
    assert get_method("rtn:int2-5:g64:coded").setting == "rtn:int2-5:g64:coded"
    assert get_method("rtn:int3-3:g64").setting == "rtn:int3:g64"
    for setting in ("hqq:int1:g64", "hqq:int2-3:g64", "rtn:int0:g64", "rtn:int2-9:g64"):
        with pytest.raises(MethodError, match=r"expected integers of int[12] to int8"):
            get_method(setting)


@pytest.mark.parametrize("down", [0, 9, "3"])
def test_widths_of_down_that_are_none(down: Any) -> None:
    with pytest.raises(MethodError, match="expected a whole number from 1 to 8"):
        Rtn(2, 64, False, down)


def test_what_no_scale_can_stand_for() -> None:
    matrix = torch.zeros(2, 64)
    assert torch.equal(apply("rtn:int4:g64", matrix).matrices["gate"], matrix)


def test_entropy_coding_keeps_the_weights_and_counts_real_bytes() -> None:
    # Few weights a row that are far from zero leave most integers unused.
    matrix = weights(256, 256)
    matrix[:, ::64] = 1.0
    plain, coded = (apply(f"rtn:int4:g64{end}", matrix) for end in ("", ":coded"))
    assert torch.equal(plain.matrices["gate"], coded.matrices["gate"])
    assert plain.n_bytes is not None
    assert coded.n_bytes is not None
    assert coded.n_bytes < 0.6 * plain.n_bytes


# NumPy says so of what hqq does with torch's tensors.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.slow
def test_hqq_is_the_library_and_beats_rounding_to_nearest() -> None:
    pytest.importorskip("hqq.core.quantize", reason="pip install '.[peers]'")
    matrix = weights(64, 128)
    hqq, rtn = (apply(f"{method}:int3:g64", matrix) for method in ("hqq", "rtn"))
    assert 0 < (hqq.n_bytes or 0) - (3 + 32 / 64) * matrix.numel() / 8 < 32

    def error(found: Changed) -> float:
        return float(np.sqrt(((found.matrices["gate"] - matrix) ** 2).mean()))

    assert error(hqq) < error(rtn)


def test_hqq_has_no_integers_of_7_bits() -> None:
    with pytest.raises(MethodError, match="hqq:int7:g64: hqq has integers of 2 to 6"):
        apply("hqq:int7:g64", weights(8, 64))


def test_without_hqq_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hqq.core.quantize", None)
    with pytest.raises(BackendUnavailable, match=r"pip install '\.\[peers\]'"):
        apply("hqq:int4:g64", weights(8, 64))


@pytest.mark.parametrize("name", ["rtn:int9:g64", "rtn:int4", "hqq:int4:g64:coded:x", "rtn:int4:g"])
def test_options_that_are_none(name: str) -> None:
    with pytest.raises(MethodError, match=f"method '{name}': .* int[12] to int8"):
        parse_source(name)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(MoeboundError, match="2 weights or more"):
        parse_source("rtn:int4:g1")
