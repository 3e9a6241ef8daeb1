"""`moebound bench gpu`, as far as a machine without a GPU can tell."""

from __future__ import annotations

import pytest
import torch

from moebound.bench.gpu import GpuSettings, run
from moebound.bench.gpu.cases import EXPERT_SHAPES, EXPERT_WEIGHTS, encode_expert, expert
from moebound.bench.gpu.compiled import loop_instructions
from moebound.bench.gpu.verify import _envelopes
from moebound.codec.device import read_stream
from moebound.errors import BackendUnavailable

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_without_a_gpu_it_says_so_before_doing_anything() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")
    said: list[str] = []
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        run(GpuSettings(rates=(0.3,)), say=said.append)
    assert said == []


def test_an_expert_has_the_size_of_moonlights() -> None:
    matrices = expert("gaussian")
    assert [m.shape for m in matrices] == list(EXPERT_SHAPES)
    assert sum(m.size for m in matrices) == EXPERT_WEIGHTS == 3 * 1408 * 2048
    coded = encode_expert(matrices, "gaussian", 0.8, 1 << 18)
    assert 1.7 < coded.bits_per_weight < 1.9


def test_the_checks_cover_what_a_payload_can_be() -> None:
    coded = [read_stream(data).coded for _, data in _envelopes()]
    kinds = [c for c in coded if c is not None]
    assert {c.lanes_log for c in kinds} == {0, 2, 5}
    assert any(c.n_tables > 1 for c in kinds)
    assert any(c.low_bits > 0 and not c.exact for c in kinds)
    assert any(c.exact for c in kinds)
    assert any(c.lower >= 0 for c in kinds)
    assert any(c.columns % 32 for c in kinds)
    assert None in coded


LISTING = """
.L_x_1:
        /*0010*/                   IADD3 R1, R1, 1, RZ ;
.L_x_2:
        /*0020*/                   VOTE.ANY R5, PT, P4 ;
        /*0030*/                   POPC R6, R5 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   NOP ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   NOP ;
        /*0080*/                   BRA `(.L_x_3);
"""


def test_the_loop_that_is_counted_is_the_smallest_with_a_vote() -> None:
    assert loop_instructions(LISTING) == 3
    assert loop_instructions(LISTING.replace("VOTE.ANY", "MOV")) == 0
