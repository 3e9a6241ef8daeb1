"""vLLM's loader for stores: decoded weights by the names of the source's checkpoint.

The model is built, sharded (tensor, pipeline, expert parallel) and run by vLLM as if its checkpoint
were ordinary; `model.load_weights` gets the tensors one after the other. Each process decodes what
it is handed; with expert parallelism and vLLM's own filter on, only the experts that are its own,
where they have tensors of their own.

config.json of a store names the quantization method `moebound`, which vLLM looks up. What it finds
is `MoeboundQuantization`: every layer is the plain one.

Written against vLLM 0.33.0, and run with 0.32.0; what is used of it is recorded in
tests/integrations/engines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from moebound.errors import StoreError
from moebound.integrations.engine import (
    QUANT_METHOD,
    PlainLayers,
    fetch_store,
    refuse_more_sources,
    store_weights,
)

LOAD_FORMAT = "moebound"
"""Of `--load-format`."""

_FORMATS = (LOAD_FORMAT, "dummy")
"""What `--load-format` may say of a store: "dummy" reads none."""


class MoeboundModelLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not installed
    """vLLM's ordinary loader, whose weights come from a store. Raises moebound's errors for what is
    no store, damaged, or has edited routing."""

    def download_model(self, model_config: Any) -> None:
        fetch_store(model_config.model, model_config.revision, self.load_config.download_dir)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        refuse_more_sources(model)
        self.counter_before_loading_weights: float = time.perf_counter()  # what vLLM logs from
        return store_weights(
            model_config.model,
            model_config.revision,
            self.load_config.download_dir,
            experts=self.local_expert_ids,
        )


class MoeboundQuantization(PlainLayers, QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed
    """What vLLM finds for `quant_method: moebound`: nothing is quantized once it is loaded."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Called for every layer while the model is built: before another loader takes a store's
        bytes for weights. Raises StoreError for its `--load-format`."""
        config = get_current_vllm_config_or_none()
        if config is not None and config.load_config.load_format not in _FORMATS:
            raise StoreError(
                f"--load-format {config.load_config.load_format}: {config.model_config.model} is a "
                f"store of moebound, which vLLM loads with --load-format {LOAD_FORMAT}"
            )
        # None means plain for every other kind of layer.
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def enter() -> None:
    """Into vLLM's tables. Any number of times."""
    register_model_loader(LOAD_FORMAT)(MoeboundModelLoader)
    register_quantization_config(QUANT_METHOD)(MoeboundQuantization)
