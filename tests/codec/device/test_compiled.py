"""The kernels compile for GPUs that are not here, and keep to their registers."""

from __future__ import annotations

import pytest

from moebound.bench.gpu.compiled import CAPABILITIES, VARIANTS, Variant, compile_variant

MOST_REGISTERS = 64
"""Of a thread of a one-warp program, if 32 of them are to fit a multiprocessor."""


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.kernel}-{v.name}")
def test_compiles_without_spills(variant: Variant, capability: int) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")
    compiled = compile_variant(variant, capability)
    assert compiled.spilled_bytes == 0
    if variant.kernel in ("decode_segments", "encode_segments"):
        assert compiled.loop_instructions > 0
        # One warp and one segment: there is one layout, and nothing to pass through memory.
        assert compiled.shared_bytes == 0
        exact_float32 = variant.constants.get("EXACT") and variant.constants.get("ITEM") == 4
        assert compiled.registers <= MOST_REGISTERS + (8 if exact_float32 else 0)
