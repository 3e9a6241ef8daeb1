"""What is measured: a model, loaded in one of several ways, that is fed tokens.

offloaded    `moebound.load`, raw or compressed experts
stock        transformers, everything in memory
accelerate   transformers with its own offload of experts to disk
llama.cpp    through llama-cpp-python, from a GGUF file that is mapped into memory
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebound.bench.offload.routing import ForcedRouting
from moebound.cache import Trace
from moebound.errors import UnsupportedArchitectureError
from moebound.extras import need


class Subject(ABC):
    """One text at a time. trace: what is routed where, in place of the model's own choices."""

    @abstractmethod
    def begin(self, at: int) -> None:
        """A new text, whose first token is this one of the trace."""

    @abstractmethod
    def step(self, tokens: list[int]) -> float:
        """Feed these; the sum of the last one's logits, when it is there."""

    def stats(self, *, reset: bool) -> dict[str, Any] | None:
        """What `Offloaded.stats` has since the last reset; None where nobody counts."""
        return None

    def close(self) -> None:
        """Let go of what it holds."""
        return


class Torch(Subject):
    """Any model of transformers."""

    def __init__(self, model: Any, spec: dict[str, Any], trace: Trace | None) -> None:
        self._model = model
        self._routing = None
        if trace is not None:
            self._routing = ForcedRouting(model, trace, top_k=spec["top_k"])
        self._past: Any = None

    def begin(self, at: int) -> None:
        from transformers import DynamicCache

        self._past = DynamicCache()
        if self._routing is not None:
            self._routing.begin(at)

    def step(self, tokens: list[int]) -> float:
        ids = torch.tensor([tokens], device=self._model.device)
        with torch.inference_mode():
            logits = self._model(ids, past_key_values=self._past, use_cache=True).logits[:, -1]
            return float(logits.double().sum())  # waits for the device


class Offloading(Torch):
    """A model of `moebound.load`."""

    def __init__(self, spec: dict[str, Any], trace: Trace | None) -> None:
        from moebound.offload.loading import load

        self._offloaded = load(spec["source"], drop_cache=spec["drop_cache"], **spec["options"])
        super().__init__(self._offloaded.model, spec, trace)

    def stats(self, *, reset: bool) -> dict[str, Any] | None:
        found = self._offloaded.stats()
        if reset:
            self._offloaded.meter.reset()
        return found

    def close(self) -> None:
        self._offloaded.close()


class LlamaCpp(Subject):
    """Its own router chooses: nothing can be put in place of it. As many threads as torch has."""

    def __init__(self, spec: dict[str, Any], trace: Trace | None) -> None:
        llama_cpp = need("llama_cpp", "llama.cpp")
        if spec["options"].get("mapped"):
            _without_repacking(llama_cpp)
        n_context = spec["prompt"] + max(spec["warm"], spec["tokens"]) + 1
        threads = torch.get_num_threads()
        self._model: Any = llama_cpp.Llama(
            spec["source"], n_ctx=n_context, n_batch=spec["prompt"], n_ubatch=spec["prompt"],
            n_threads=threads, n_threads_batch=threads, use_mmap=True, verbose=False,
        )  # fmt: skip
        self._logits_of: Any = llama_cpp.llama_get_logits_ith
        self._n_vocab: int = self._model.n_vocab()

    def begin(self, at: int) -> None:
        self._model.reset()

    def logits(self) -> np.ndarray[Any, Any]:
        """Of the last token, [vocab] float32."""
        found = self._logits_of(self._model.ctx, -1)
        pointer = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self._n_vocab,)).copy()

    def step(self, tokens: list[int]) -> float:
        self._model.eval(tokens)
        return float(self.logits().astype(np.float64).sum())

    def close(self) -> None:
        self._model.close()


def _without_repacking(llama_cpp: Any) -> None:
    """What `--no-repack` does, which llama-cpp-python has no argument for."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def changed() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = changed


def _stock(spec: dict[str, Any], trace: Trace | None) -> Subject:
    from moebound.model.pretrained import load_model

    model = load_model(spec["source"], dtype="auto", **spec["options"])
    return Torch(model, spec, trace)


def _accelerate(spec: dict[str, Any], trace: Trace | None) -> Subject:
    """transformers' own disk offload: experts modules on disk, all else in memory."""
    from moebound.model.pretrained import load_model, read_config

    config = read_config(spec["source"])
    if config.model_type != "deepseek_v3":
        raise UnsupportedArchitectureError(
            f"{spec['source']}: which modules accelerate has to offload is known for deepseek_v3 "
            f"only, found {config.model_type}"
        )
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu",
                              "model.rotary_emb": "cpu"}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        if layer < config.first_k_dense_replace:
            places[stem] = "cpu"
            continue
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate",
                     "mlp.shared_experts"):  # fmt: skip
            places[f"{stem}.{part}"] = "cpu"
        places[f"{stem}.mlp.experts"] = "disk"
    folder = Path(spec["scratch"]) / "offload"
    model = load_model(spec["source"], dtype="auto", device_map=places, offload_folder=folder)
    return Torch(model, spec, trace)


SUBJECTS: dict[str, Callable[[dict[str, Any], Trace | None], Subject]] = {
    "offloaded": Offloading,
    "stock": _stock,
    "accelerate": _accelerate,
    "llama.cpp": LlamaCpp,
}
