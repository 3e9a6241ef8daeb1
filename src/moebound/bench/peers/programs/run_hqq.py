"""HQQ (Badri and Shaji, 2023) by its own library. It looks at no text.

setting: {"bits", "group"}. As `hqq` quantizes by default (axis 1), packed as it packs: 3 bits are
ten in 32. Scales and zero points are float16, one of each a group.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import Quantizer
from peer_exchange import Request, count_bytes, main, read_weights, write_checkpoint


def run(request: Request, answer: Path) -> dict[str, Any]:
    bits, group = request.setting["bits"], request.setting["group"]
    made, parts = {}, dict[str, int]()
    for name, values in read_weights(request, set(request.experts.values())):
        packed, meta = Quantizer.quantize(
            torch.from_numpy(values), nbits=bits, group_size=group, axis=1, device="cpu",
            compute_dtype=torch.float16, bitpack=True,
        )  # fmt: skip
        # As HQQLinear keeps them, in what it computes with.
        stored = {name: meta[name].to(torch.float16) for name in ("scale", "zero")}
        count_bytes(parts, {"packed": packed, **stored})
        exact = meta | {kind: values.float() for kind, values in stored.items()}
        exact["compute_dtype"] = torch.float32
        made[name] = Quantizer.dequantize(packed, exact).float().numpy()
    write_checkpoint(request, answer / "checkpoint", made)
    return {
        "library": "hqq",
        "library_version": version("hqq"),
        "settings": {"nbits": bits, "group_size": group, "axis": 1},
        "parts": parts,
        "remarks": ["it reads no text"],
    }


if __name__ == "__main__":
    main(run)
