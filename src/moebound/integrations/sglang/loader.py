"""SGLang's loader for stores: decoded weights by the names of the source's checkpoint.

`--load-format` takes only SGLang's own names, so a store is told by its config.json, and nothing
needs to be asked for: a hook around SGLang's `get_model_loader` gives `MoeboundModelLoader` for a
model whose quantization is `moebound`. The model is built, sharded and run by SGLang as if its
checkpoint were ordinary.

Written against SGLang 0.5.23; what is used of it is recorded in tests/integrations/engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from moebound.errors import StoreError
from moebound.integrations.engine import (
    QUANT_METHOD,
    PlainLayers,
    fetch_store,
    refuse_more_sources,
    store_weights,
)

HOOKED = "sglang.srt.model_loader.loader.get_model_loader"

_FORMATS = ("auto", "safetensors")
"""What `--load-format` may say of a store."""


class MoeboundModelLoader(DefaultModelLoader):  # type: ignore[misc]  # SGLang is not installed
    """SGLang's ordinary loader, whose weights come from a store; also where they are updated from
    disk. Raises moebound's errors for what is no store, damaged, or has edited routing."""

    def download_model(self, model_config: Any) -> None:
        fetch_store(model_config.model_path, model_config.revision, self.load_config.download_dir)

    def _get_weights_iterator(self, source: Any, **_: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Of its own sources: (prefix + name, tensor). _: how files are prefetched."""
        if self.load_config.draft_model_idx is not None:
            raise StoreError(
                f"{source.model_or_path}: draft model {self.load_config.draft_model_idx} of a "
                "store: `moebound decompress` makes an ordinary checkpoint of it, which SGLang can "
                "take apart"
            )
        weights = store_weights(
            source.model_or_path, source.revision, self.load_config.download_dir
        )
        return ((source.prefix + name, tensor) for name, tensor in weights)

    def _get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        refuse_more_sources(model)
        return self._get_weights_iterator(self.Source.init_new(model_config, model))


class MoeboundQuantization(PlainLayers, QuantizationConfig):  # type: ignore[misc]  # SGLang is not installed
    """What SGLang finds for `quant_method: moebound`: nothing is quantized once it is loaded."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        # None means plain for every other kind of layer.
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_scaled_act_names(self) -> list[str]:
        return []


def choose_loader(original: Callable[..., Any], load_config: Any, model_config: Any = None) -> Any:
    """Around SGLang's `get_model_loader`. Raises StoreError for a store and a `--load-format` that
    reads another kind of file; "dummy" reads none, and stays SGLang's."""
    if model_config is None or model_config.quantization != QUANT_METHOD:
        return original(load_config, model_config)
    asked = load_config.load_format
    asked = getattr(asked, "value", asked)
    if asked == "dummy":
        return original(load_config, model_config)
    if asked not in _FORMATS:
        raise StoreError(
            f"--load-format {asked!r}: {model_config.model_path} is a store of moebound, which "
            f"loads with one of {', '.join(_FORMATS)}"
        )
    return MoeboundModelLoader(load_config)


_entered = False


def enter() -> None:
    """Into SGLang's tables. Any number of times."""
    global _entered
    QUANTIZATION_METHODS[QUANT_METHOD] = MoeboundQuantization
    if not _entered:
        HookRegistry.register(HOOKED, choose_loader, HookType.AROUND)
        _entered = True
