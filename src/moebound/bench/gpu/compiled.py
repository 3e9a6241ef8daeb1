"""What the kernels compile to, for GPUs that are not here: registers, shared memory, spills, loops.

Needs triton and its bundled ptxas, cuobjdump and nvdisasm; no GPU. Compiling says nothing about
correctness or speed on one. Not where TRITON_INTERPRET is set: nothing is compiled then.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebound.extras import unavailable

CAPABILITIES = (80, 90)

_TYPES = {
    "compressed": "*u8", "block": "*u8", "jobs": "*i64", "status": "*i32", "symbols": "*u8",
    "entries": "*u32",
    "row_classes": "*u8", "column_classes": "*u8", "words": "*u16", "n_words": "*i32",
    "states": "*u32", "patterns": "*u16", "codes": "*u32", "missed": "*u8", "lows": "*u8",
    "offsets": "*i64", "out": "*u16",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time constants. name: for people. warps: of a program."""

    kernel: str
    name: str
    constants: dict[str, Any]
    warps: int = 1


_DECODE = {
    "ITEM": 2, "LOW_BITS": 0, "CLASSES": False, "EXACT": False, "SCALED": False, "FACTORS": False,
    "HALVES": False, "ALIGNED": True, "WIDE": True, "BALLOT": True, "SEGMENTS": 1,
}  # fmt: skip
_ENCODE = {"TABLE_LOG": 12, "LANES": 32, "CLASSES": True, "BALLOT": True, "SEGMENTS": 1}

_CLASSES = _DECODE | {"CLASSES": True, "WIDE": False}
_SCALED = _DECODE | {"SCALED": True}
_FACTORS = _SCALED | {"FACTORS": True}
_CLASSES_FACTORS = _CLASSES | {"SCALED": True, "FACTORS": True}
_EXACT = _CLASSES | {"EXACT": True, "LOW_BITS": 8}

VARIANTS = (
    Variant("decode_segments", "one table", _DECODE),
    Variant("decode_segments", "one table, narrow", _DECODE | {"WIDE": False}),
    Variant("decode_segments", "classes", _CLASSES),
    Variant("decode_segments", "classes, wide", _CLASSES | {"WIDE": True}),
    Variant("decode_segments", "low bits", _DECODE | {"LOW_BITS": 4}),
    Variant("decode_segments", "float32", _CLASSES | {"ITEM": 4}),
    Variant("decode_segments", "any address", _CLASSES | {"ALIGNED": False}),
    Variant("decode_segments", "steps", _SCALED),
    Variant("decode_segments", "steps, classes", _CLASSES | {"SCALED": True}),
    Variant("decode_segments", "steps, both dtypes", _CLASSES | {"SCALED": True, "HALVES": True}),
    Variant("decode_segments", "steps, float32", _CLASSES | {"SCALED": True, "ITEM": 4}),
    Variant("decode_segments", "factors", _FACTORS),
    Variant("decode_segments", "factors, classes", _CLASSES_FACTORS),
    Variant("decode_segments", "factors, both dtypes", _CLASSES_FACTORS | {"HALVES": True}),
    Variant("decode_segments", "factors, float32", _CLASSES_FACTORS | {"ITEM": 4}),
    Variant("decode_segments", "exact", _EXACT),
    Variant("decode_segments", "exact float32", _EXACT | {"ITEM": 4}),
    Variant("expand_tables", "", {"WIDE": False, "BLOCK": 1024, "BLOCKS": 4}, warps=4),
    Variant("expand_tables", "wide", {"WIDE": True, "BLOCK": 1024, "BLOCKS": 4}, warps=4),
    Variant("lay_patches", "", {"ITEM": 2, "BLOCK": 256}, warps=4),
    Variant("look_up_codes", "", {"BLOCK": 1024}, warps=4),
    Variant("encode_segments", "classes", _ENCODE),
    Variant("encode_segments", "one table", _ENCODE | {"CLASSES": False}),
    Variant(
        "assemble_segments", "", {"LANES": 32, "LOW_BITS": 4, "BLOCK": 1024, "GROUPS": 64}, warps=4
    ),
)


@dataclass(frozen=True)
class Compiled:
    """One variant for one GPU.

    registers: of a thread. shared_bytes: of a program. spilled_bytes: of a thread, in local memory
    or on the stack. loop_instructions: of the loop that decodes or encodes a step, 0 without one.
    layout_changes: of tensors between threads, each a trip through shared memory.
    """

    kernel: str
    variant: str
    capability: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    loop_instructions: int
    layout_changes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile and read the resources. Raises BackendUnavailable without triton."""
    try:
        from triton import compile as triton_compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise unavailable("compiling kernels", "triton", reason=error) from error
    from moebound.codec.device import decode_kernel, encode_kernel

    function = getattr(decode_kernel, variant.kernel, None) or getattr(
        encode_kernel, variant.kernel
    )
    names = [name for name in function.arg_names if name not in variant.constants]
    types = {name: _type(name, variant) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if types.get(name, "").startswith("*")
    }
    source = ASTSource(
        fn=function,
        signature=types | dict.fromkeys(variant.constants, "constexpr"),
        constexprs=variant.constants,
        attrs=aligned,
    )
    compiled = triton_compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.warps, "enable_fp_fusion": False},
    )
    usage, listing = _inspect(compiled.asm["cubin"])
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        variant.kernel,
        variant.name,
        capability,
        found["REG"],
        int(compiled.metadata.shared),
        found["STACK"] + found["LOCAL"],
        loop_instructions(listing),
        compiled.asm["ttgir"].count("ttg.convert_layout"),
    )


def compile_all(capabilities: tuple[int, ...] = CAPABILITIES) -> list[Compiled]:
    """Every variant for every capability."""
    return [compile_variant(v, capability) for capability in capabilities for v in VARIANTS]


def loop_instructions(listing: str) -> int:
    """Instructions of the smallest loop with a vote in it, in what nvdisasm prints."""
    lines = re.findall(r"^(\.L\w+):|^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE)
    labels: dict[str, int] = {}
    code: list[str] = []
    for label, _, instruction in lines:
        if label:
            labels[label] = len(code)
        else:
            code.append(instruction)
    sizes = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*`\((\.L\w+)\)", instruction)
        first = labels.get(target[1], end + 1) if target else end + 1
        if first <= end and any("VOTE" in i for i in code[first:end]):
            sizes.append(end - first + 1)
    return min(sizes, default=0)


def _type(name: str, variant: Variant) -> str:
    if name == "slots":
        return "*u32" if variant.constants["WIDE"] else "*u8"
    return _TYPES.get(name, "i32")


def _inspect(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of resources, and nvdisasm's listing."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"]
        usage, listing = (
            subprocess.run(
                [str(tools / tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in commands
        )
    return usage, listing
