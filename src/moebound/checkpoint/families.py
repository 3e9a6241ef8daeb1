"""What is known of every model family: one table, `FAMILIES`.

A family is a set of model types that name and pack their experts the same way. A layout is one
way of naming the matrices below a MoE block; most families have two, because hub checkpoints keep
one tensor per expert and projection, while transformers keeps (and can save) all experts of a layer
in one 3-D tensor. The names come from transformers 5.23, its `conversion_mapping.py` and its
configuration and modeling files. How the experts lie in a loaded module is told by the module's
shapes, not by its family: `model/stacks.py`.

Left out on purpose: DBRX (experts stacked along the rows of a 2-D tensor), LongCat-Flash (experts
without weights between the others), encoder-decoder MoE (NLLB, Switch). JetMoE's attention experts
stay as they are; only its feed-forward experts are found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from moebound.errors import UnsupportedArchitectureError

Role = Literal["gate", "up", "down", "gate_up"]
"""What a matrix does: down(act(gate x) * up x); gate_up is both in one tensor."""

ROLE_ORDER: tuple[Role, ...] = ("gate", "up", "gate_up", "down")

HALVES: Mapping[str, tuple[Role, Role]] = {"gate_up": ("gate", "up")}
"""What a matrix holds that is two in one."""


@dataclass(frozen=True, eq=False)
class Layout:
    """One way of naming and packing the matrices of a layer's experts.

    path: regular expression between `layers.N.` and the leaf. A group `expert` in it says one
    tensor per expert; without one, all experts of the layer are in one tensor, one a leading slice.
    leaves: last part of the tensor's name -> role.
    transposed: stored [in, out] instead of [out, in]; None where both are found in checkpoints of
    the same type, and only the shape tells. interleaved: gate and up alternate along the output
    axis, instead of all of gate before all of up. Both describe the bytes on disk; reading does
    not undo them.
    """

    path: str
    leaves: Mapping[str, Role]
    transposed: bool | None = False
    interleaved: bool = False

    @property
    def fused(self) -> bool:
        return "(?P<expert>" not in self.path


class Match(NamedTuple):
    """What a tensor's name says: whose matrix it is. expert is None where all are in one tensor."""

    layer: int
    expert: int | None
    role: Role
    layout: Layout


@dataclass(frozen=True, eq=False)
class Family:
    """What some model types have in common.

    layouts: of routed experts on disk, tried in order. shared: the same for shared experts. gated:
    whether experts have a gate projection. expert_groups: how many times the config's number of
    experts a layer has. top_k: the config's names for the number of experts a token is sent to.
    routers: names of the module that chooses, beside the experts module. experts_functions:
    whether experts are computed by transformers' table of experts functions, so that another
    function can be entered for them.
    """

    name: str
    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...]
    gated: bool = True
    expert_groups: int = 1
    shared: tuple[Layout, ...] = field(default_factory=lambda: SHARED)
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    routers: tuple[str, ...] = ("gate",)
    experts_functions: bool = True

    @cached_property
    def _patterns(self) -> dict[bool, list[tuple[re.Pattern[str], Layout]]]:
        return {
            shared: [(self._pattern(layout), layout) for layout in layouts]
            for shared, layouts in ((False, self.layouts), (True, self.shared))
        }

    def _pattern(self, layout: Layout) -> re.Pattern[str]:
        leaves = "|".join(map(re.escape, layout.leaves))
        return re.compile(
            rf"(?:(?:{_LANGUAGE_MODEL})\.)*layers\.(?P<layer>\d{{1,6}})\.{layout.path}"
            rf"\.(?P<leaf>{leaves})"
        )

    def match(self, name: str, *, shared: bool = False) -> Match | None:
        """The (shared) expert matrix that a tensor's name stands for, or None."""
        for pattern, layout in self._patterns[shared]:
            found = pattern.fullmatch(name)
            if found:
                groups = found.groupdict()
                expert = groups.get("expert")
                return Match(
                    int(groups["layer"]),
                    None if expert is None else int(expert),
                    layout.leaves[groups["leaf"]],
                    layout,
                )
        return None

    @property
    def roles(self) -> tuple[frozenset[Role], ...]:
        """The sets of roles that make a whole expert."""
        if self.gated:
            return frozenset[Role]({"gate", "up", "down"}), frozenset[Role]({"gate_up", "down"})
        return (frozenset[Role]({"up", "down"}),)


# What may stand before `layers.N.`: keeps out towers and multi-token-prediction heads that are not
# the language model.
_LANGUAGE_MODEL = "model|language_model|text_model|llm|thinker|backbone"

# In a loaded model also what wrappers (torch.compile, DDP, PEFT) put around it, and DBRX's names.
_DECODER = re.compile(
    rf"(?:(?:{_LANGUAGE_MODEL}|_orig_mod|module|base_model|transformer)\.)*"
    r"(?:layers|blocks|h)\.(?P<layer>\d+)\..+"
)

# Leaves: the spellings of gate, up and down.
_GATE_UP_DOWN: dict[str, Role] = {
    "gate_proj.weight": "gate",
    "up_proj.weight": "up",
    "down_proj.weight": "down",
}
_W1_W3_W2: dict[str, Role] = {"w1.weight": "gate", "w3.weight": "up", "w2.weight": "down"}
_FUSED: dict[str, Role] = {"gate_up_proj": "gate_up", "down_proj": "down"}


def _each(block: str, leaves: Mapping[str, Role]) -> Layout:
    """One tensor per expert: `<block>.experts.<e>.<leaf>`."""
    return Layout(rf"{block}experts\.(?P<expert>\d{{1,6}})", leaves)


def _fused(block: str, *, transposed: bool | None = False, interleaved: bool = False) -> Layout:
    """One tensor per layer, as transformers has it: `<block>.experts.gate_up_proj`."""
    return Layout(rf"{block}experts", _FUSED, transposed, interleaved)


SHARED: tuple[Layout, ...] = (
    # Two spellings of the gate: HunYuan 4 says linear_gate.
    Layout(
        r"(?:(?:mlp|feed_forward|mixer|ffn|block_sparse_moe)\.)?"
        r"(?:shared_experts?|share_expert|shared_mlp)",
        {
            **_GATE_UP_DOWN,
            **_W1_W3_W2,
            "linear_gate.weight": "gate",
            "gate_up_proj.weight": "gate_up",
            "input_linear.weight": "gate_up",
            "output_linear.weight": "down",
            # Inkling: 3-D, one shared expert a slice.
            "gate_proj": "gate",
            "up_proj": "up",
            "down_proj": "down",
        },
    ),
    Layout(
        r"mlp\.shared_experts",
        {"shared_w13_weight": "gate_up", "shared_w2_weight": "down"},
        interleaved=True,
    ),
)
"""Shared experts are named alike in all families, so one table does for all."""

_MLP = r"mlp\."
_FEED_FORWARD = r"feed_forward\."

FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen_deepseek",
        (
            "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek",
            "deepseek_ocr2", "deepseek_ocr2_text", "deepseek_v2", "deepseek_v3", "deepseek_v32",
            "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo",
            "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm5_next",
            "glm5_next_text", "glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "hy_v4", "kimi_k2",
            "kolibri1", "laguna", "mellum", "mimo_v2_flash", "mistral4", "muse_spark",
            "muse_spark_text", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text",
            "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
            "qwen3_omni_moe_thinker", "qwen4_exp", "qwen4_exp_text", "solar_open",
            "unlimited_ocr", "unlimited_ocr_text", "zaya",
        ),
        (_each(_MLP, _GATE_UP_DOWN), _fused(_MLP)),
        top_k=("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
        routers=("gate", "router"),
    ),
    # Text experts and, numbered on from them, as many vision experts of another size.
    Family(
        "ernie4_5_vl_moe",
        ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
        (_each(_MLP, _GATE_UP_DOWN),),
        expert_groups=2,
        top_k=("moe_k", "num_experts_per_tok"),
    ),
    Family(
        "mixtral",
        ("kimi_linear", "minimax", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text", "mixtral",
         "phimoe"),
        (_each(r"(?:block_sparse_moe|mlp)\.", _W1_W3_W2), _fused(_MLP)),
        top_k=("num_experts_per_tok", "num_experts_per_token"),
        routers=("gate", "router"),
    ),
    Family(
        "deepseek_v4",
        ("deepseek_v4",),
        (_each(r"(?:ffn|mlp)\.", _W1_W3_W2), _fused(_MLP)),
    ),
    Family(
        "mistral_large4",
        ("mistral_large4", "mistral_large4_text"),
        (_each("", _W1_W3_W2), _fused(_MLP)),
    ),
    Family(
        "granite",
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
        (
            Layout(
                "block_sparse_moe",
                {"input_linear.weight": "gate_up", "output_linear.weight": "down"},
            ),
            _fused(r"block_sparse_moe\."),
        ),
        routers=("router",),
    ),
    Family(
        "jetmoe",
        ("jetmoe",),
        (Layout("mlp", {"input_linear.weight": "gate_up", "output_linear.weight": "down"}),),
        top_k=("num_experts_per_tok", "moe_top_k"),
        routers=("router",),  # in the experts module
        experts_functions=False,
    ),
    Family(
        "gpt_oss",
        ("gpt_oss",),
        (_fused(_MLP, transposed=True, interleaved=True),),
        top_k=("num_experts_per_tok", "experts_per_token"),
        routers=("router",),
    ),
    Family(
        "openai_privacy_filter",
        ("openai_privacy_filter",),
        (_fused(_MLP, transposed=True),),
        routers=("router",),
    ),
    # Transposed in the released checkpoints, not so when transformers saves them again.
    Family(
        "qwen3_vl_moe",
        ("qwen3_vl_moe", "qwen3_vl_moe_text"),
        (_fused(_MLP, transposed=None),),
    ),
    Family(
        "llama4",
        ("llama4", "llama4_text"),
        (_fused(_FEED_FORWARD, transposed=True),),
        routers=("router",),
        experts_functions=False,
    ),
    Family(
        "aria",
        ("aria", "aria_text"),
        (
            Layout(
                r"mlp\.experts", {"fc1.weight": "gate_up", "fc2.weight": "down"}, transposed=True
            ),
            _fused(_MLP, transposed=True),
        ),
        top_k=("moe_topk",),
        routers=("router",),
    ),
    Family(
        "gemma4",
        ("diffusion_gemma", "diffusion_gemma_text", "gemma4", "gemma4_text"),
        (_fused(""),),
        top_k=("top_k_experts",),
        routers=("router",),
    ),
    Family(
        "inkling",
        ("inkling_mm_model", "inkling_text", "inkling2", "inkling2_text"),
        (
            Layout(
                r"mlp\.experts", {"w13_weight": "gate_up", "w2_weight": "down"}, interleaved=True
            ),
            _fused(_MLP),
        ),
    ),
    Family(
        "jamba",
        ("jamba",),
        (_each(_FEED_FORWARD, _GATE_UP_DOWN), _fused(_FEED_FORWARD)),
        routers=("router",),
    ),
    Family("lfm2_moe", ("lfm2_moe",), (_each(_FEED_FORWARD, _W1_W3_W2), _fused(_FEED_FORWARD))),
    Family(
        "nemotron_h",
        ("nemotron_h",),
        (
            _each(r"mixer\.", {"up_proj.weight": "up", "down_proj.weight": "down"}),
            Layout(r"mixer\.experts", {"up_proj": "up", "down_proj": "down"}),
        ),
        gated=False,
    ),
    Family(
        "step3",
        ("step3p5", "step3p7"),
        (Layout("moe", _GATE_UP_DOWN), _fused(_MLP)),
        top_k=("num_experts_per_tok", "moe_top_k"),
    ),
)  # fmt: skip

SUPPORTED: dict[str, Family] = {
    model_type: family for family in FAMILIES for model_type in family.model_types
}
"""Every supported model_type -> its family."""

ROUTERS: tuple[str, ...] = tuple(sorted({name for family in FAMILIES for name in family.routers}))
"""What routers are called, in any family: for who sees modules only."""


# Names under which configs keep the two numbers that are checked against the tensors.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Where multimodal configs keep the language model's.
_TEXT_PARTS = ("text_config", "thinker_config", "llm_config", "language_config")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: the config itself unless it is multimodal."""
    for _ in range(4):  # thinker_config.text_config is the deepest known
        inner = next((config[part] for part in _TEXT_PARTS if config.get(part)), None)
        if not isinstance(inner, Mapping):
            break
        config = inner
    return config


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a model config, by its model_type or that of its text part.

    Raises UnsupportedArchitectureError with the model_type found and the list of those supported.
    """
    found = [config.get("model_type"), text_config(config).get("model_type")]
    for model_type in found:
        if isinstance(model_type, str) and model_type in SUPPORTED:
            return SUPPORTED[model_type]
    raise UnsupportedArchitectureError(
        f"model_type {found[0]!r} is not a Mixture-of-Experts architecture known here; "
        f"supported: {', '.join(sorted(SUPPORTED))}"
    )


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Decoder layers of the model. Layers past them are prediction heads, not part of it."""
    return _count(text_config(config), _LAYER_COUNTS)


def num_experts(config: Mapping[str, Any]) -> int | None:
    """Routed experts in each MoE layer, or None where the config has no single number."""
    return _count(text_config(config), _EXPERT_COUNTS)


def top_k_of(config: Mapping[str, Any]) -> int:
    """Experts that a token is sent to in a layer; the most, where layers differ.

    Raises UnsupportedArchitectureError for a family that is not known, and a config that lacks it.
    """
    family, text = find_family(config), text_config(config)
    found = {name: text[name] for name in family.top_k if name in text}
    for value in found.values():
        numbers = value if isinstance(value, list) else [value]
        if numbers and all(type(number) is int and number > 0 for number in numbers):
            return int(max(numbers))
    raise UnsupportedArchitectureError(
        f"experts per token of model_type {text.get('model_type')!r}: expected a positive number "
        f"in the config as {' or '.join(family.top_k)}, found {found or 'none of them'}"
    )


def router_groups_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Into how many groups a router divides its experts, and from how many of them a token's are
    taken; (1, 1) where there are no groups (DeepSeek-V3, 2412.19437, section 2.1.2)."""
    text = text_config(config)
    groups = next((text[n] for n in ("n_group", "num_expert_group") if n in text), None)
    if type(groups) is not int or groups < 2 or text.get("topk_method") == "greedy":
        return 1, 1
    chosen = text.get("topk_group")
    return groups, chosen if type(chosen) is int and 0 < chosen <= groups else groups


def decoder_layer(module: str) -> int | None:
    """The decoder layer of the language model that a loaded model's module is in, by its name."""
    match = _DECODER.fullmatch(module)
    return int(match["layer"]) if match else None


def _count(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
