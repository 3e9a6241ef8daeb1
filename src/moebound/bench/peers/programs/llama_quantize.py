"""llama.cpp's own quantizer of GGUF files. Imports nothing of ours.

llama_quantize.py SOURCE MADE TYPE      # a file of another type, without importance matrix
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp


def quantize(
    source: Path, made: Path, kind: str, importance: Mapping[str, Any] | None = None
) -> None:
    """Write `made`, the model of `source` in a file type of llama.cpp's `llama-quantize`, as
    "q4_k_m", its mixtures of types by layer and projection included.

    importance: by name in GGUF, float32; llama.cpp asks for it at types of 2 bits and less but
    "q2_k". Rows that are no whole number of blocks get another type, as llama.cpp has it.
    """
    ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}", None)
    if ftype is None:
        raise SystemExit(f"llama.cpp has no file type {kind!r}")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, os.cpu_count() or 1
    if importance is not None:
        float_p = ctypes.POINTER(ctypes.c_float)
        # The last one is empty: it ends the list.
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name = name.encode()
            entry.data, entry.size = values.ctypes.data_as(float_p), values.size
        params.imatrix = entries
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(made).encode(),
                                          ctypes.byref(params))  # fmt: skip
    if code:
        raise SystemExit(f"llama_model_quantize gave {code}")


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
