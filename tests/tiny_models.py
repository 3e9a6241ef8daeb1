"""Tiny random Mixture-of-Experts checkpoints, written by transformers itself.

One entry per architecture: what it takes to make its config small. Everything else (names on
disk, packing, order) is transformers' own, so a test that passes here passes on the layout that
the library really writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

MakeTiny = Callable[..., Path]
"""Type of fixtures that cache `make_tiny`: (name, **options) -> folder."""

# Applied wherever a config has such a field. Spelled out once because families differ in names.
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,  # so that no matrix is square, nor gate and up together
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 4,
    "mamba_d_conv": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 4,
    "n_groups": 1,
    "sliding_window": 16,
    "index_topk": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


# Numbers that a config may leave open (None) and that a MoE layer cannot do without.
_NEVER_OPEN = {"num_experts_per_tok", "n_routed_experts", "n_shared_experts", "head_dim"}


@dataclass(frozen=True)
class Tiny:
    """How to make one architecture small: what to set besides SMALL.

    overrides: for the config of the language model. parts: for the other parts of a multimodal
    config (its `text_config` gets SMALL and the overrides).
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2}

TINY: dict[str, Tiny] = {
    "afmoe": Tiny(),
    "aria_text": Tiny(),
    "axk1": Tiny(_SPARSE),
    "axk2": Tiny(_SPARSE),
    "bailing_hybrid": Tiny(_SPARSE),
    "beam": Tiny(_SPARSE),
    "cohere2_moe": Tiny(),
    "deepseek_v2": Tiny(),
    "deepseek_v3": Tiny({"num_hidden_layers": 3}),
    "deepseek_v32": Tiny(_SPARSE),
    "deepseek_v4": Tiny(),
    "dots1": Tiny({"n_shared_experts": 1, "first_k_dense_replace": 1}),
    "ernie4_5_moe": Tiny(),
    "exaone_moe": Tiny(_SPARSE),
    "flex_olmo": Tiny(),
    "flint": Tiny({"mlp_only_layers": [0]}),
    "gemma4_text": Tiny({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                         "moe_intermediate_size": 16}),
    "glm4_moe": Tiny(),
    "glm4_moe_lite": Tiny(_SPARSE),
    "glm4v_moe_text": Tiny(),
    "glm5_next_text": Tiny({"num_key_value_heads": 4, "qk_rope_head_dim": 0}),
    "glm_moe_dsa": Tiny(_SPARSE),
    "gpt_oss": Tiny(),
    "granitemoe": Tiny(),
    "granitemoe_swa": Tiny(),
    "granitemoehybrid": Tiny(),
    "granitemoeshared": Tiny(),
    "hunyuan_v1_moe": Tiny({"head_dim": 8}),
    "hy_v3": Tiny(_SPARSE),
    "hy_v4": Tiny(_SPARSE),
    "inkling2_text": Tiny(),
    "inkling_text": Tiny(),
    "jamba": Tiny(),
    "jetmoe": Tiny({"kv_channels": 8}),
    "kimi_linear": Tiny(_SPARSE),
    "kolibri1": Tiny(),
    "laguna": Tiny(_SPARSE),
    "lfm2_moe": Tiny({"layer_types": ["full_attention", "conv"]}),
    "llama4_text": Tiny({"intermediate_size_mlp": 48}),
    "mellum": Tiny(),
    "mimo_v2_flash": Tiny(_SPARSE),
    "minimax": Tiny(),
    "minimax_m2": Tiny(),
    "minimax_m3_vl_text": Tiny(),
    "mistral4": Tiny(),
    "mistral_large4_text": Tiny(_SPARSE),
    "mixtral": Tiny(),
    "muse_spark_text": Tiny(),
    "nemotron_h": Tiny({"layers_block_type": ["linear_attention", "moe", "full_attention"]}),
    "olmoe": Tiny(),
    "openai_privacy_filter": Tiny(),
    "phimoe": Tiny(),
    "qwen2_moe": Tiny(),
    "qwen3_5_moe_text": Tiny(),
    "qwen3_moe": Tiny(),
    "qwen3_next": Tiny(),
    "solar_open": Tiny(),
    "zaya": Tiny({"num_experts_per_tok": 1}),
    # Multimodal: the experts are in the language model, and the names have another prefix.
    "aria": Tiny(),
    "ernie4_5_vl_moe": Tiny({"moe_intermediate_size": [16, 8], "hidden_size": 256,
                             "num_attention_heads": 2, "vocab_size": 128},
                            {"vision_config": _VISION}),
    "gemma4": Tiny({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                    "moe_intermediate_size": 16}),
    "glm4v_moe": Tiny(parts={"vision_config": _VISION}),
    "llama4": Tiny({"intermediate_size_mlp": 48},
                    {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32,
                                       "vision_output_dim": 32}}),
    "minimax_m3_vl": Tiny(),
    "qwen3_5_moe": Tiny(parts={"vision_config": _VISION}),
    "qwen3_vl_moe": Tiny(parts={"vision_config": _VISION}),
}  # fmt: skip


def tiny_config(name: str) -> PreTrainedConfig:
    """The smallest config of an architecture that transformers accepts."""
    tiny = TINY[name]
    config_class = CONFIG_MAPPING[name]
    default = config_class()
    if _is_nested(default):
        parts: dict[str, Any] = {
            part: _small(type(value), {} if part != "text_config" else tiny.overrides)
            for part, value in vars(default).items()
            if isinstance(value, PreTrainedConfig)
        }
        for part, overrides in tiny.parts.items():
            parts[part] = {**parts[part], **overrides}
        return config_class(**parts)
    return config_class(**_small(config_class, tiny.overrides))


def _is_nested(config: PreTrainedConfig) -> bool:
    return isinstance(getattr(config, "text_config", None), PreTrainedConfig)


def _small(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    default = config_class().to_dict()
    settings = {
        key: value
        for key, value in SMALL.items()
        if key in default and (default[key] is not None or key in _NEVER_OPEN)
    }
    if default.get("kv_lora_rank") and default.get("num_key_value_heads"):
        # latent attention: each head has keys and values of its own, or stock code fails
        settings["num_key_value_heads"] = SMALL["num_attention_heads"]
    layers = overrides.get("num_hidden_layers", SMALL["num_hidden_layers"])
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(default.get(key), list) and default[key]:
            # the first and the last kinds: where dense layers or both attentions exist, both occur
            settings[key] = [default[key][0]] + [default[key][-1]] * (layers - 1)
    return settings | overrides


def tiny_model(name: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """A random model: experts' rows and columns differ in scale, as those of real models do."""
    config = tiny_config(name)
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config)._from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "expert" in key and parameter.dim() >= 2:
                spread = torch.randn(parameter.shape) * 0.02
                for axis in (-1, -2):
                    shape = list(parameter.shape)
                    shape[axis] = 1
                    spread = spread * torch.exp(0.5 * torch.randn(shape))
                parameter.copy_(spread)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class, with a language modelling head where there is one, that a config is for."""
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING]
    if _is_nested(config):  # some causal heads are listed for it, and take the text part only
        mappings.insert(0, mappings.pop(1))
    found: Any = next(m[type(config)] for m in mappings if type(config) in m)
    return cast(type[PreTrainedModel], found)


def make_tiny(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard_size: int | str = "1GB",
    original_format: bool = True,
) -> Path:
    """Save a random model of this architecture to folder, as transformers would.

    original_format: names as on the hub; False leaves transformers' own fused names.
    """
    model = tiny_model(name, dtype=dtype, seed=seed)
    model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=original_format)
    return folder
