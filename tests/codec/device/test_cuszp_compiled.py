"""cuSZp's kernels compile for GPUs that are not here: no spills, no trip through shared memory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled where triton interprets", allow_module_level=True)

ALL_OF_A_MULTIPROCESSOR = 32
"""Registers of a thread with which 2048 threads fit."""

_TYPES = {
    "x": "*fp32", "codes": "*u8", "stream": "*u8", "begins": "*i64", "inside": "*i32",
    "sizes": "*i64", "planes": "*i32", "wrong": "*i32", "n": "i64", "n_blocks": "i64",
    "reciprocal": "fp32", "step": "fp32",
}  # fmt: skip
_SHAPE: dict[str, Any] = {"BLOCKS": 4, "ROUNDS": 8}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    (kernel, constants | {"MODE": mode} | ({} if mode < 2 else {"ALIGNED": False}))
    for mode in range(3)
    for kernel, constants in [
        ("measure_blocks", _SHAPE),
        ("place_blocks", {}),
        ("write_blocks", _SHAPE | {"ALIGNED": True}),
        *(
            ("decode_blocks", _SHAPE | {"ALIGNED": True, "DTYPE": dtype})
            for dtype in ("F32", "BF16", "F16")
        ),
    ]
]


def _compile(kernel: str, constants: dict[str, Any], capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moebound.codec.device import cuszp_kernels

    function = getattr(cuszp_kernels, kernel)
    known = {name: constants[name] for name in function.arg_names if name in constants}
    types = _TYPES | {"out": "*fp32" if constants.get("DTYPE") == "F32" else "*u16"}
    signature = {n: "constexpr" if n in known else types[n] for n in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=function, signature=signature, constexprs=known, attrs=aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "constants"),
    VARIANTS,
    ids=[f"{k}-{c['MODE']}-{c.get('DTYPE', '')}" for k, c in VARIANTS],
)
def test_compiles(kernel: str, constants: dict[str, Any], capability: int, tmp_path: Path) -> None:
    compiled = _compile(kernel, constants, capability)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["STACK"] == found["LOCAL"] == 0
    assert "fma.rn.f32" not in compiled.asm["ptx"], "bytes would depend on contraction"
    if kernel != "place_blocks" and constants["MODE"] < 2:
        assert found["REG"] <= ALL_OF_A_MULTIPROCESSOR
        assert compiled.metadata.shared == 0
        assert "redux.sync" in compiled.asm["ptx"]
