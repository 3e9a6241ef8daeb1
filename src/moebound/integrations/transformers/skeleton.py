"""A model without its routed experts: everything else is loaded, their parameters never exist.

transformers builds a model on the `meta` device, then fills it. In between, a quantizer may change
modules. This one takes the experts' parameters out and leaves, under the same names, tensors on
`meta` with their shapes: so the checkpoint's tensors for them are "unexpected", which are not read,
and what looks at shapes still finds them. A store's other compressed tensors (shared experts) are
decoded as `hf.py` does. Linear layers whose codes are to stay codes become `CodeLinear`s, with no
weight.

    model = load_skeleton(folder, routed=names, dtype="auto", device="cpu")
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils.quantization_config import QuantizationConfigMixin

from moebound.checkpoint.shards import TensorInfo, read_json
from moebound.codec.arrays import torch_dtype
from moebound.errors import UnsupportedArchitectureError
from moebound.integrations.transformers.hf import (
    MoeboundQuantizer,
    check_certified,
    check_whole,
    final_names,
)
from moebound.integrations.transformers.tables import enter
from moebound.model.attention import latent_attention
from moebound.model.code_linear import CodeLinear, tied_weights
from moebound.model.pretrained import load_model, read_config, what_runs
from moebound.model.stacks import Stack, find_stack
from moebound.store import compressed_tensors
from moebound.store.format import CONFIG_FILE, read_settings
from moebound.types import DType

METHOD = "moebound-skeleton"
"""`quant_method` of the config that stands in for the checkpoint's own while a skeleton loads."""


def load_skeleton(
    folder: Path,
    *,
    routed: Collection[str],
    dtype: torch.dtype | str,
    device: str,
    weights: Mapping[str, TensorInfo] | None = None,
    codes: Mapping[str, DType] | None = None,
) -> Any:
    """The model in `folder`, on `device`, in evaluation mode; no routed expert in it.

    routed: names of the routed experts' tensors, which are left unread. weights: all others, of a
    quantized checkpoint. codes: tensors, and the dtype they decode to, that are left unread where
    they are the weight of a linear layer of the model, in that dtype or in float32, and of nothing
    else, attention itself among it: the layer is then a `CodeLinear` without codes.
    Raises CheckpointError for what transformers cannot load, UnsupportedArchitectureError for what
    `what_runs` says cannot be run so.
    """
    config = read_config(folder)
    runs = what_runs(config.to_dict())
    if runs.how != "offloaded":
        raise UnsupportedArchitectureError(f"{folder}: {runs.why}")
    config.quantization_config = {
        "quant_method": METHOD,
        "routed": sorted(routed),
        "codes": dict(codes or {}),
    }
    options: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
    return load_model(folder, config=config, weights=weights, dtype=dtype, **options)


class SkeletonConfig(QuantizationConfigMixin):
    """Says which tensors stay unread. Dropped from the model once it is loaded."""

    dequantize = True

    def __init__(self, routed: list[str], codes: dict[str, DType], **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # a new method
        self.routed = routed
        self.codes = codes


class SkeletonQuantizer(MoeboundQuantizer):
    """Takes the experts' parameters out before weights are loaded."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._model = model
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        asked = cast(SkeletonConfig, self.quantization_config)
        unread = {*asked.routed, *leave_codes(model, asked.codes)}
        self._take([t for t in compressed_tensors(files) if t.name not in unread], model)
        config = read_json(files[0].parent / CONFIG_FILE) if files else {}
        if read_settings(config) is None or not check_certified(files, unread=unread):
            check_whole(self._compressed, self._own)
        for name, module in model.named_modules():
            stack = find_stack(name, module)
            if stack is not None:
                _take_out(stack)
        # They are left unread on purpose: no report about them.
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        ignored |= {r".*experts?\..*", r".*_linear\..*"}
        ignored |= {f"{re.escape(name)}$" for name in unread - set(asked.routed)}
        model._keys_to_ignore_on_load_unexpected = ignored
        return model


def leave_codes(model: Any, codes: Mapping[str, DType]) -> list[str]:
    """Put `CodeLinear`s where these tensors are the weight; those for which there is one."""
    found = list[str]()
    if not codes:
        return found
    tied = tied_weights(model)
    read = [module.kv_b_proj for module in latent_attention(model)]
    for name, final in final_names(codes, get_model_conversion_mapping(model), model).items():
        place, _, leaf = final.rpartition(".")
        if leaf != "weight" or final in tied:
            continue
        layer = model.get_submodule(place)
        dtypes = torch_dtype(codes[name]), torch.float32
        if type(layer) is nn.Linear and layer not in read and layer.weight.dtype in dtypes:
            parent, _, own = place.rpartition(".")
            setattr(model.get_submodule(parent), own, CodeLinear(layer, name))
            found.append(name)
    return found


def _take_out(stack: Stack) -> None:
    for place in stack.places.values():
        owner, _, leaf = place.parameter.rpartition(".")
        module = stack.module.get_submodule(owner)
        parameter = module._parameters.pop(leaf, None)
        if parameter is not None:  # gate and up may share one
            setattr(module, leaf, torch.empty_like(parameter, device="meta"))
    # transformers initialises what no tensor of the checkpoint filled: here is nothing to fill.
    stack.module._is_hf_initialized = True  # type: ignore[assignment]


enter(METHOD, SkeletonConfig, SkeletonQuantizer)
