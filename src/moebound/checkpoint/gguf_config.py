"""The config of transformers that a GGUF file's metadata make, by architecture.

A key that a file lacks has the value that llama.cpp takes for it; where there is none, and no shape
of a tensor tells, it is an error that names the key. What no key says (how often attention slides,
limits of activations) is the default of the family's config, which is that of its published models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moebound.checkpoint.gguf_header import Header
from moebound.checkpoint.gguf_rope import rope_of
from moebound.errors import CorruptionError, MoeboundError, UnsupportedArchitectureError

Config = dict[str, Any]

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "expert_count": ("n_routed_experts", "moe_num_experts", "num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_topk", "moe_k"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
"""A key, and what configs call it. Where a config has none of the names, it is passed over."""

_TOLD_BY_SHAPES = ("feed_forward_length", "expert_feed_forward_length",
                   "expert_shared_feed_forward_length")  # fmt: skip
"""These may be missing: a wrong default has other shapes than the tensors, which are compared."""

_SCORES = {1: "softmax", 2: "sigmoid", 3: "softmax of those chosen", 4: "sqrtsoftplus"}
"""`expert_gating_func`, llama.cpp's llama_expert_gating_func_type."""


@dataclass(frozen=True)
class Arch:
    """What a GGUF architecture is in transformers.

    model_type: its config's, or how it follows from the header. permuted: whether rows of queries
    and keys are in llama.cpp's order. fields: keys besides `_FIELDS`, with the value that llama.cpp
    takes for a missing one, and what configs call them. fixed: what all models of it have, and no
    key says. more: the rest. scores: how its routers score experts. head_dim: whether
    `attention.key_length` is the config's.
    """

    model_type: str | Callable[[Header], str]
    permuted: bool = False
    fields: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[Header, Config], None] = lambda header, config: None
    scores: tuple[str, ...] = tuple(_SCORES.values())
    head_dim: bool = True

    def type_of(self, header: Header) -> str:
        return self.model_type if isinstance(self.model_type, str) else self.model_type(header)


def config_of(header: Header, arch: Arch) -> Config:
    """The config, as config.json has it, without `architectures`.

    Raises UnsupportedArchitectureError for what it could not say, CheckpointError for a key that is
    missing, CorruptionError for metadata that make none.
    """
    from transformers import CONFIG_MAPPING

    model_type = arch.type_of(header)
    config_class = CONFIG_MAPPING[model_type]
    _check_scores(header, arch)
    try:
        known = config_class().to_dict()
        found = _found(header, arch, known)
        config = config_class(**found).to_dict()
    except MoeboundError:
        raise
    except Exception as error:  # of metadata that are missing, or of another kind
        raise CorruptionError(
            f"{header.file}: its metadata make no {model_type} config: {error} "
            f"({type(error).__name__})"
        ) from error
    config["dtype"] = "bfloat16"
    return json.loads(json.dumps(config, default=str))  # type: ignore[no-any-return]


def _found(header: Header, arch: Arch, known: Mapping[str, Any]) -> Config:
    layers = int(header.need("block_count")) - int(header.get("nextn_predict_layers", 0))
    found: Config = {"num_hidden_layers": layers}
    for key, names in _FIELDS.items():
        name = next((name for name in names if name in known), None)
        if name is not None:
            value = header.get(key) if key in _TOLD_BY_SHAPES else header.need(key)
            if value is not None:
                found[name] = value
    for key, (name, default) in arch.fields.items():
        found[name] = header.get(key, default)
    head_dim = header.get("attention.key_length")
    if head_dim is not None and arch.head_dim:
        found["head_dim"] = head_dim
    for key, name in _TOKENS.items():
        if (value := header.value(f"tokenizer.ggml.{key}")) is not None:
            found[name] = value
    if "token_embd.weight" in header.tensors:
        found["vocab_size"] = header.tensors["token_embd.weight"][1].shape[-1]
    found["tie_word_embeddings"] = "output.weight" not in header.tensors
    for name in ("attention_bias", "qkv_bias", "use_bias"):
        if name in known:
            found[name] = "blk.0.attn_q.bias" in header.tensors
    found |= arch.fixed
    dims = header.get("rope.dimension_count")
    width = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    found["rope_parameters"] = rope_of(
        header, known.get("rope_parameters") or {}, int(dims or width), int(width)
    )
    arch.more(header, found)
    _check_window(header, found)
    return {key: _plain(value) for key, value in found.items()}


_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}


def _plain(value: Any) -> Any:
    """Of NumPy's numbers Python's. A float was float32: 1e-6 is 9.999999974752427e-07 there."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(str(np.float32(value)))
    return int(value) if isinstance(value, np.integer) else value


def _check_scores(header: Header, arch: Arch) -> None:
    number = header.get("expert_gating_func", 0)
    score = _SCORES.get(number, f"function {number}")
    if number and score not in arch.scores:
        raise header.refuse(
            f"routers whose scores are {score} ({header.arch}.expert_gating_func {number})"
        )


def _check_window(header: Header, found: Config) -> None:
    window = header.get("attention.sliding_window")
    if window and found.get("sliding_window") != window and header.arch != "llama4":
        raise header.refuse(f"a sliding window of {window}")


# What follows is of single architectures. Functions of llama.cpp's conversion are named as there.


def _deepseek(header: Header) -> str:
    """`DeepseekV2Model`. V2 has softmax, which is what llama.cpp takes without the key; V3,
    Kimi-K2, Moonlight and GLM-4.7-Flash have sigmoid."""
    sigmoid = _SCORES.get(header.get("expert_gating_func", 1)) == "sigmoid"
    return "deepseek_v3" if sigmoid else "deepseek_v2"


def _mla(header: Header, config: Config) -> None:
    """Older files have keys and values by head, and lengths of those."""
    rope = int(header.need("rope.dimension_count"))
    keys = header.get("attention.key_length_mla") or header.need("attention.key_length")
    values = header.get("attention.value_length_mla") or header.need("attention.value_length")
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "kv_lora_rank": header.need("attention.kv_lora_rank"),
        "q_lora_rank": header.get("attention.q_lora_rank") or None,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": int(keys) - rope,
        "v_head_dim": values,
    }
    if _deepseek(header) == "deepseek_v2":
        greedy = int(config["n_group"]) <= 1
        config["topk_method"] = "greedy" if greedy else "group_limited_greedy"
        if config["norm_topk_prob"]:
            raise header.refuse(
                "softmax scores that are normalized (deepseek2.expert_weights_norm)"
            )
    parameters = config["rope_parameters"]
    if parameters["rope_type"] == "yarn":
        # 0.1 times mscale_all_dim, which mscale equals in all published models.
        scale = float(np.float32(header.need("rope.scaling.yarn_log_multiplier")) * 10)
        parameters["mscale"] = parameters["mscale_all_dim"] = round(scale, 6)


def _glm(header: Header, config: Config) -> None:
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in header.tensors


def _delta_net(header: Header, config: Config) -> None:
    """`Qwen3NextModel`."""
    value_heads = int(header.need("ssm.time_step_rank"))
    config |= {
        "linear_conv_kernel_dim": header.need("ssm.conv_kernel"),
        "linear_key_head_dim": header.need("ssm.state_size"),
        "linear_num_key_heads": header.need("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": int(header.need("ssm.inner_size")) // value_heads,
    }
    layers = config["num_hidden_layers"]
    linear = header.value(f"{header.arch}.attention.recurrent_layers")
    if linear is None:
        every = int(header.get("full_attention_interval", 4))
        linear = [(layer + 1) % every != 0 for layer in range(layers)]
    config["layer_types"] = [
        "linear_attention" if one else "full_attention" for one in list(linear)[:layers]
    ]
    sections = header.value(f"{header.arch}.rope.dimension_sections")
    if sections is not None:
        config["rope_parameters"]["mrope_section"] = [int(one) for one in sections[:3]]


def _granite(header: Header) -> str:
    shared = header.get("expert_shared_feed_forward_length", 0)
    return "granitemoeshared" if shared else "granitemoe"


def _granite_more(header: Header, config: Config) -> None:
    if _granite(header) == "granitemoeshared":
        config["shared_intermediate_size"] = header.need("expert_shared_feed_forward_length")


def _window(header: Header, config: Config) -> None:
    if window := header.get("attention.sliding_window"):
        config["sliding_window"] = window


def _slides(header: Header, config: Config) -> None:
    """Which layers slide, or, where the file does not say, those that do by default: every second
    of GPT-OSS, three of four of EXAONE, as in llama.cpp."""
    config["sliding_window"] = header.need("attention.sliding_window")
    slides = header.value(f"{header.arch}.attention.sliding_window_pattern")
    if isinstance(slides, list):
        config["layer_types"] = [
            "sliding_attention" if one else "full_attention"
            for one in slides[: config["num_hidden_layers"]]
        ]


def _phi(header: Header, config: Config) -> None:
    _window(header, config)
    config["lm_head_bias"] = "output.bias" in header.tensors


def _ernie(header: Header, config: Config) -> None:
    config["moe_layer_end_index"] = config["num_hidden_layers"] - 1


def _llama4(header: Header, config: Config) -> None:
    """Attention is in chunks of 8192 tokens in llama.cpp, as in the default config. Keys of the
    model with 128 experts are not normalized."""
    if header.value("llama4.attention.sliding_window") == 0:
        raise header.refuse("full attention in all layers (llama4.attention.sliding_window 0)")
    config["intermediate_size_mlp"] = header.need("feed_forward_length")
    config["intermediate_size"] = header.need("expert_feed_forward_length")
    config["use_qk_norm"] = header.need("expert_count") != 128


_GROUPS: Mapping[str, tuple[str, Any]] = {
    "expert_group_count": ("n_group", 1),
    "expert_group_used_count": ("topk_group", 1),
    "expert_shared_count": ("n_shared_experts", 0),
    "expert_weights_scale": ("routed_scaling_factor", 1.0),
    "expert_weights_norm": ("norm_topk_prob", False),
    "leading_dense_block_count": ("first_k_dense_replace", 0),
}

ARCHS: Mapping[str, Arch] = {
    "qwen2moe": Arch("qwen2_moe"),
    # llama.cpp has no key for it, and normalizes always.
    "qwen3moe": Arch("qwen3_moe", fixed={"norm_topk_prob": True}),
    "llama": Arch("mixtral", permuted=True, more=_window),
    "deepseek2": Arch(
        _deepseek, fields=_GROUPS, more=_mla, scores=("softmax", "sigmoid"), head_dim=False
    ),
    "gpt-oss": Arch("gpt_oss", more=_slides, scores=("softmax of those chosen",)),
    "olmoe": Arch("olmoe", scores=("softmax",)),
    "glm4moe": Arch("glm4_moe", fields=_GROUPS, more=_glm, scores=("sigmoid",)),
    "dots1": Arch("dots1", fields=_GROUPS, fixed={"sliding_window": None}, scores=("sigmoid",)),
    "exaone-moe": Arch(
        "exaone_moe",
        fields={**_GROUPS, "expert_shared_count": ("num_shared_experts", 0)},
        more=_slides,
        scores=("sigmoid",),
    ),
    "qwen3next": Arch("qwen3_next", more=_delta_net),
    "qwen35moe": Arch("qwen3_5_moe_text", more=_delta_net),
    "granitemoe": Arch(
        _granite,
        permuted=True,
        fields={
            "attention.scale": ("attention_multiplier", 1.0),
            "embedding_scale": ("embedding_multiplier", 1.0),
            "residual_scale": ("residual_multiplier", 1.0),
            "logit_scale": ("logits_scaling", 1.0),
        },
        more=_granite_more,
    ),
    "phimoe": Arch("phimoe", more=_phi),
    "ernie4_5-moe": Arch(
        "ernie4_5_moe",
        fields={
            "expert_shared_count": ("moe_num_shared_experts", 0),
            "interleave_moe_layer_step": ("moe_layer_interval", 1),
            "leading_dense_block_count": ("moe_layer_start_index", 0),
        },
        more=_ernie,
    ),
    "hunyuan-moe": Arch("hunyuan_v1_moe"),
    "minimax-m2": Arch("minimax_m2", scores=("sigmoid",)),
    "llama4": Arch(
        "llama4_text",
        fields={"interleave_moe_layer_step": ("interleave_moe_layer_step", 1)},
        more=_llama4,
    ),
}
"""By `general.architecture`. `llama` with experts is Mixtral."""


def arch_of(header: Header) -> Arch:
    """Raises UnsupportedArchitectureError for one that is not read, or has no experts."""
    arch = ARCHS.get(header.arch)
    if arch is None or not header.get("expert_count"):
        raise UnsupportedArchitectureError(
            f"{header.file}: GGUF architecture {header.arch!r}"
            + (" without experts" if arch else "")
            + f" is not read; supported: {', '.join(ARCHS)} (with experts)"
        )
    return arch
