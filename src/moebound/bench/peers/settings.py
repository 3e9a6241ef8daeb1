"""What is asked of a peer, by its setting: `gptq:int4:g128`, `awq:int3:g64:sym`, `gguf:iq3_s`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.errors import MethodError

PROGRAMS = Path(__file__).parent / "programs"
_GROUPED = re.compile(r"int([2-8]):g([0-9]{1,6})((?::[a-z0-9]+)*)")
GGUF_TYPE = re.compile(r"i?q[1-8](_[a-z0-9]+)*")
"""A file type of llama.cpp, as `llama-quantize` calls it."""


@dataclass(frozen=True)
class Peer:
    """A quantizer of others. setting: what makes it. program: the file that its environment's
    interpreter runs. asked: its options, as request.json has them."""

    setting: str
    environment: str
    program: Path
    asked: Mapping[str, Any]


@dataclass(frozen=True)
class _Kind:
    """environment, program: see `Peer`. defaults: options that a setting need not name. flags:
    those that it may, and what they say."""

    environment: str
    program: str
    defaults: Mapping[str, Any]
    flags: Mapping[str, Mapping[str, Any]]


_SIGNS = {"sym": {"symmetric": True}, "asym": {"symmetric": False}}
_SEEN = {"routed": {"routed": True}}
# Whether grids are symmetric is by each library's own preset: W4A16 of GPTQ and AutoRound is,
# W4A16_ASYM, which llm-compressor's examples of AWQ use, is not.
_KINDS = {
    "gptq": _Kind(
        "llmcompressor", "run_llm_compressor.py",
        {"method": "gptq", "symmetric": True, "routed": False}, _SIGNS | _SEEN,
    ),
    "awq": _Kind(
        "llmcompressor", "run_llm_compressor.py",
        {"method": "awq", "symmetric": False, "routed": False}, _SIGNS | _SEEN,
    ),
    "autoround": _Kind(
        "autoround", "run_auto_round.py", {"symmetric": True, "iters": 200},
        _SIGNS | {f"i{n}": {"iters": n} for n in (50, 1000)},
    ),
    "hqq": _Kind("hqq", "run_hqq.py", {}, {}),
}  # fmt: skip
_GGUF = "gguf"
KNOWN = (*_KINDS, _GGUF)


def get_peer(setting: str) -> Peer:
    """The peer of a setting. Raises MethodError for one that is not known."""
    name, _, options = setting.partition(":")
    if name == _GGUF:
        if not GGUF_TYPE.fullmatch(options):
            raise MethodError(
                f"peer {setting!r}: expected a file type of llama.cpp, as in gguf:q4_k_m or "
                "gguf:iq3_s"
            )
        return Peer(setting, "llamacpp", PROGRAMS / "run_llama_cpp.py", {"type": options})
    if name not in _KINDS:
        raise MethodError(f"peer {setting!r}: unknown; expected one of {', '.join(KNOWN)}")
    kind, found = _KINDS[name], _GROUPED.fullmatch(options)
    flags = [] if found is None else [flag for flag in found[3].split(":") if flag]
    if found is None or int(found[2]) < 1 or any(flag not in kind.flags for flag in flags):
        more = f", then any of {', '.join(kind.flags)}" if kind.flags else ""
        raise MethodError(
            f"peer {setting!r}: expected integers of int2 to int8 and a group, as in "
            f"{name}:int4:g128{more}"
        )
    asked = dict(kind.defaults) | {"bits": int(found[1]), "group": int(found[2])}
    for flag in flags:
        asked |= kind.flags[flag]
    return Peer(setting, kind.environment, PROGRAMS / kind.program, asked)
