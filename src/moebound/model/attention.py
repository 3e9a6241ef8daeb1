"""Attention of one token a text on a CPU, by the native kernel; that of prompts, by torch.

A token's attention reads the keys and values of its text once. The kernel (`native/attend/`) does
that for each text of a pass, in memory where the cache has them, and sums in one order: a text's
result depends on no threads, no instruction set and no other text. It differs from torch's by float
rounding. Keys of fewer than LEAST_WIDTH numbers, other dtypes than bfloat16, masks, windows and
whatever else a model asks for stay torch's.

Latent attention (DeepSeek-V2 and what follows it, Moonlight among them) keeps latents, of which
`expand_kv` makes keys and values of the whole text for every token. The kernel does not need them:
with weights W and U of a head and a latent c, a . (W c) = (a W) . c, and a sum of values U c is U
times the sum of latents. So what `expand_kv` gives is `Latents`, which nobody has expanded; where
the kernel is not used, they are expanded then.

torch's fused kernel for CPUs asks for keys and values of equal widths. Of latent attention's it
falls back to single products, which take several times as long; zeros make values as wide as keys,
and outputs are cut again (`padded_attention`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from moebound import _native
from moebound.model.few_rows import NativeLinear, threads_for, watched
from moebound.model.strands import passing
from moebound.types import Array

NAME = "moebound-sdpa"
"""The value of `attn_implementation` that means `attention`."""

LEAST_WIDTH = 64
"""Narrower keys take no time worth saving, and stay with torch's way, to the bit as stock."""

_GROUP = 32
"""Widths are multiples of it in the kernel."""

_WITHOUT_EFFECT = frozenset(
    {"scaling", "is_causal", "position_ids", "use_cache", "logits_to_keep", "return_dict",
     "output_attentions", "output_hidden_states", "output_router_logits"}
)  # fmt: skip
"""What attention of one token without a mask may be given. Anything else has to be None, or 0."""


@dataclass(frozen=True, eq=False)
class OfTexts:
    """Keys, values or latents of texts that are the rows of one pass: [1, heads, T, width] each,
    T being its own."""

    each: Sequence[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Latents:
    """What keys and values are made of. kv: [B, 1, T, rank], turned: [B, 1, T, R], or of texts."""

    module: Any
    kv: torch.Tensor | OfTexts
    turned: torch.Tensor | OfTexts

    def expanded(self) -> tuple[Any, Any]:
        """Keys and values, as the module's own class makes them."""
        expand = partial(type(self.module).expand_kv, self.module)
        if isinstance(self.kv, torch.Tensor):
            return expand(self.kv, self.turned)  # type: ignore[no-any-return]
        assert isinstance(self.turned, OfTexts)
        with passing(None):  # T rows are no texts
            made = [expand(*of) for of in zip(self.kv.each, self.turned.each, strict=True)]
        return OfTexts([keys for keys, _ in made]), OfTexts([values for _, values in made])


def register_attention() -> None:
    """Enter it into transformers' tables under NAME. Idempotent."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | OfTexts | Latents,
    value: torch.Tensor | OfTexts | None,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa`. query: [B, heads, T, D]; key, value: [B, heads, T, D] and any width,
    or of T texts where B is 1. Returns [B, T, heads, the value's width]."""
    ours = attention_mask is None and _nothing_else(given)
    found = _native_way(query, key, value, given.get("scaling")) if ours else None
    if found is None and isinstance(key, Latents):
        key, value = key.expanded()
        found = _native_way(query, key, value, given.get("scaling")) if ours else None
    if found is not None:
        return found, None
    if isinstance(key, OfTexts):
        assert isinstance(value, OfTexts)
        found = torch.cat(
            [
                padded_attention(module, query[:, :, i : i + 1].contiguous(), *of, None, **given)
                for i, of in enumerate(zip(key.each, value.each, strict=True))
            ],
            dim=1,
        )
        return found, None
    assert isinstance(key, torch.Tensor)
    assert isinstance(value, torch.Tensor)
    return padded_attention(module, query, key, value, attention_mask, **given), None


def padded_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **given: Any,
) -> torch.Tensor:
    """By torch, with values made as wide as keys. [B, T, heads, the value's width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    width = value.shape[-1]
    less = key.shape[-1] - width if key.shape[-1] >= LEAST_WIDTH else 0
    if less > 0:
        value = pad(value, (0, less))
    output: torch.Tensor = sdpa_attention_forward(module, query, key, value, *args, **given)[0]
    return output[..., :width].contiguous() if less > 0 else output


def fuse_attention(model: Any) -> bool:
    """Have a model on a CPU compute attention so: whether it does. What its linear layers are is
    asked at each pass."""
    config = model.config.get_text_config(decoder=True)
    if model.device.type != "cpu" or config._attn_implementation != "sdpa":
        return False
    if _asks_for_names(model):
        return False
    latent = latent_attention(model)
    if not latent and (config is not model.config or not model._can_set_attn_implementation()):
        return False
    register_attention()
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        return False
    for module in latent:
        module.expand_kv = partial(_unexpanded, module)
    return True


def latent_attention(model: nn.Module) -> list[Any]:
    """Modules whose keys and values the kernel does without; it reads the weight of their
    `kv_b_proj`."""
    found = [module for module in model.modules() if _is_latent(module)]
    return [] if found and _asks_for_names(model) else found


def _asks_for_names(model: nn.Module) -> bool:
    """Whether the model's code does something else where attention is called other than stock's: as
    sparse attention (DeepSeek-V3.2), which then leaves its mask to the function."""
    return any(map(_file_asks_for_names, {type(module).__module__ for module in model.modules()}))


@cache
def _file_asks_for_names(file: str) -> bool:
    if file.startswith(("torch.", "moebound.")):
        return False
    try:
        source = inspect.getsource(sys.modules[file])
    except (KeyError, OSError, TypeError):  # its source is not there
        return True
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not\b)", source) is not None


def _unexpanded(module: Any, kv: Any, turned: Any) -> tuple[Any, Any]:
    latents = Latents(module, kv, turned)
    if module.config._attn_implementation == NAME and not watched():
        return latents, None
    return latents.expanded()


def _is_latent(module: nn.Module) -> bool:
    """Whether this is latent attention as DeepSeek-V3 has it, whose keys and values nobody looks at
    but the attention function."""
    of: Any = type(module)
    linear = isinstance(getattr(module, "kv_b_proj", None), nn.Linear)
    return linear and hasattr(of, "expand_kv") and _expands_alike(of)


@cache
def _expands_alike(of: Any) -> bool:
    """By its source, which is read once."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    try:
        known = _code(of.expand_kv) == _code(DeepseekV3Attention.expand_kv)
        behind = inspect.getsource(of.forward).partition(
            "key_states, value_states = self.expand_kv("
        )[2]
    except OSError:  # its source is not there
        return False
    return known and all(behind.count(name) == 1 for name in ("key_states", "value_states"))


def _code(function: Callable[..., Any]) -> str:
    return inspect.getsource(function).rpartition('"""')[2]


def _nothing_else(given: dict[str, Any]) -> bool:
    return not given.get("dropout") and all(
        name in _WITHOUT_EFFECT or name == "dropout" or value is None
        for name, value in given.items()
    )


def _native_way(
    query: torch.Tensor, key: Any, value: Any, scale: float | None
) -> torch.Tensor | None:
    """[B, T, heads, the value's width]; None if this is not for the kernel."""
    width = query.shape[3]
    if watched() or width < LEAST_WIDTH or _native.isa() == "scalar":
        return None
    weight = None
    if isinstance(key, Latents):
        weight, key, value = _weight(key.module), key.kv, key.turned
        if weight is None:
            return None
    batch, heads, rows, _ = query.shape
    texts = isinstance(key, OfTexts)
    keys, values = (key.each, value.each) if texts else ([key], [value])
    every = [query, *keys, *values]
    if not all(_fits(tensor) for tensor in every):
        return None
    if ((batch, rows) != (1, len(keys))) if texts else ((rows, len(key)) != (1, batch)):
        return None
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*every, *([] if weight is None else [weight]))
    ):
        return None
    asked = _bits(query)
    asked = asked[0].swapaxes(0, 1) if texts else asked[:, :, 0]  # [texts, heads, D]
    first, second = ([of for some in each for of in _bits(some)] for each in (keys, values))
    scale = width**-0.5 if scale is None else scale
    work = heads * width * sum(some.shape[0] * some.shape[2] for some in keys)
    if weight is None:
        if heads % keys[0].shape[1]:
            return None
        out = query.new_empty((batch, rows, heads, values[0].shape[3]))
        _native.attend(asked, first, second, _bits(out).reshape(-1), scale, threads_for(2 * work))
        return out
    wide = weight.shape[0] // heads - (width - values[0].shape[3])
    out = query.new_empty((batch, rows, heads, wide))
    _native.attend_latent(
        asked, [of[0] for of in first], [of[0] for of in second], _bits(weight),
        _bits(out).reshape(-1), scale, threads_for(weight.numel() * len(first) + 4 * work),
    )  # fmt: skip
    return out


def _fits(tensor: Any) -> bool:
    """Whether the kernel takes it: a tensor [B, heads, T, width]."""
    return bool(
        tensor.dtype == torch.bfloat16
        and tensor.is_cpu
        and tensor.shape[3] % _GROUP == 0
        and tensor.stride(3) == 1
        and tensor.shape[2] > 0
    )


def _weight(module: Any) -> torch.Tensor | None:
    """What latents are multiplied by, [heads · (nope + values), rank]; None if somebody else
    computes that layer, or watches it."""
    linear = module.kv_b_proj
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    forward = vars(linear).get("forward")
    own = isinstance(forward, NativeLinear) or (
        isinstance(forward, partial) and forward.func.__module__.startswith("moebound.")
    )
    weight: torch.Tensor = linear.weight
    plain = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and weight.is_cpu
    if not (forward is None or own) or linear.bias is not None or not plain:
        return None
    return weight if weight.is_contiguous() else None


def _bits(tensor: torch.Tensor) -> Array:
    """The patterns of bfloat16 in its memory."""
    return tensor.view(torch.uint16).numpy()
