"""What runs need: a checkpoint, its store, token ids, a trace; made once below the work folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moebound.bench.offload.gguf_file import write_gguf
from moebound.bench.offload.gguf_quantized import quantize_gguf
from moebound.bench.offload.model import make_checkpoint, make_store
from moebound.bench.offload.routing import fit_trace
from moebound.bench.offload.settings import OffloadSettings
from moebound.bench.offload.text import drawn_ids, task_ids
from moebound.cache import Trace, ZipfTrace, load_trace
from moebound.checkpoint import local_folder, open_checkpoint, top_k_of
from moebound.errors import UnsupportedArchitectureError
from moebound.extras import check

OTHERS_MARK = "-others-"
"""In the name of a store that has more than experts coded."""


@dataclass(frozen=True)
class Prepared:
    """raw: the checkpoint. store: it, its experts compressed; coded: all else too, None where no
    run asks for that. ids: a .npy of the tokens that are read. trace:
    None where no run is forced; routed_by: what it came from. top_k: experts a token. gguf: where
    that file is, or will be."""

    raw: Path
    store: Path
    coded: Path | None
    ids: Path
    trace: Path | None
    routed_by: str | None
    top_k: int
    gguf: Path

    def place(
        self, how: str, source: str, quantized: str | None = None, linears: str = "values"
    ) -> Path:
        """What a run loads. Makes the GGUF file, as large as the checkpoint, when it is needed.
        quantized: the type of llama.cpp that it is to have, if not the checkpoint's. linears: what
        its linear layers are to be.

        Raises BackendUnavailable for llama.cpp where it is not installed,
        UnsupportedArchitectureError for models that cannot be written for it, and MethodError for
        a type that it does not make of them.
        """
        if how != "llama.cpp":
            if source == "raw":
                return self.raw
            return self.store if linears == "values" or self.coded is None else self.coded
        check("llama.cpp", "llama_cpp", "gguf")
        if quantized is None:
            return write_gguf(self.raw, self.gguf)
        file = self.gguf.with_name(f"{self.gguf.stem}-{quantized}.gguf")
        return (
            file
            if file.exists()
            else quantize_gguf(write_gguf(self.raw, self.gguf), file, quantized)
        )


def prepare(settings: OffloadSettings, work: Path) -> Prepared:
    """Make what is not there yet. Raises CacheError for a trace that does not fit the model,
    UnsupportedArchitectureError for a model without experts, and as opening a checkpoint does."""
    if settings.model is None:
        stem, raw = "raw", make_checkpoint(work / "raw", settings.shapes)
        prefix = "store"
    else:
        stem = re.sub(r"[^A-Za-z0-9.-]+", "-", settings.model).strip("-")
        raw, prefix = local_folder(settings.model), f"{stem}-store"
    checkpoint = open_checkpoint(raw)
    layers: dict[int, int] = {}
    for expert in checkpoint.experts():
        layers[expert.key.layer] = layers.get(expert.key.layer, 0) + 1
    if not layers:
        raise UnsupportedArchitectureError(f"{raw}: no experts in it")
    top_k = top_k_of(checkpoint.config)
    trace, routed_by, experts = None, None, max(layers.values())
    if "forced" in settings.routing:
        found, routed_by = _trace(settings, len(layers), experts, top_k)
        trace = work / "trace.npz"
        fit_trace(found, layers=len(layers), experts=experts, top_k=top_k).save(trace)
    n_ids = 2 * settings.prompt + settings.warm + settings.tokens
    n_ids = max(n_ids, settings.clients * (settings.prompt + settings.tokens))
    ids = work / "ids.npy"
    if settings.model is None:
        np.save(ids, drawn_ids(settings.shapes.vocab, n_ids))
    else:
        np.save(ids, task_ids(raw, settings.task, n_ids))
    store = work / f"{prefix}-{settings.codec.replace(':', '-')}-{settings.rate:g}"
    make_store(raw, store, settings.rate, settings.codec)
    coded = None
    if set(settings.linears) - {"values"}:
        coded = store.with_name(f"{store.name}{OTHERS_MARK}{settings.others:g}")
        make_store(raw, coded, settings.rate, settings.codec, others=settings.others)
    return Prepared(raw, store, coded, ids, trace, routed_by, top_k, work / f"{stem}.gguf")


def _trace(settings: OffloadSettings, layers: int, experts: int, top_k: int) -> tuple[Trace, str]:
    """A recorded one, or one long text a run, prompts of the run's length cut from it; its name."""
    if settings.trace is not None:
        return load_trace(settings.trace), str(settings.trace)
    drawn = ZipfTrace(layers=layers, experts=experts, top_k=top_k, tokens=2048, sequences=4,
                      prompt=settings.prompt)  # fmt: skip
    return drawn.draw(), str(drawn)
