"""What llama.cpp's conversion does to tensors beside naming them, and how it is undone.

Functions are named as there (conversion/*.py). All values are float32 here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moebound.types import Array

How = Callable[..., Array]
"""Values of the file's tensors -> the model's tensor."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """parts: the file's tensors; "" is the one that the table of names has. how: what makes the
    model's of them, None where nothing does. each: it is done to each slice of the leading axis,
    which is one expert. half: which half of the rows it is, of two in one."""

    parts: tuple[str, ...]
    how: How | None = None
    each: bool = False
    half: int | None = None


def change_of(
    arch: str, permuted: bool, name: str, config: Config, there: Collection[str]
) -> Change | None:
    """What has to be undone for one of the model's tensors, by its name on the hub; None where the
    file has it as it is. there: names of the file's tensors."""
    if permuted and (found := re.search(r"\.(q|k)_proj\.(weight|bias)$", name)):
        key = "num_attention_heads" if found[1] == "q" else "num_key_value_heads"
        return Change(("",), partial(unpermute, heads=int(config[key])))
    rule = _RULES.get(arch)
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return rule(name, f"blk.{layer[1]}." if layer else "", config, there) if rule else None


def unpermute(values: Array, heads: int) -> Array:
    """`LlamaModel.permute`: llama.cpp has pairs beside each other, transformers has halves."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return pairs.reshape(values.shape)


def _deepseek2(name: str, blk: str, config: Config, there: Collection[str]) -> Change | None:
    """`DeepseekV2Model.modify_tensors` splits `kv_b_proj`; files from before have it whole."""
    if name.endswith("kv_b_proj.weight") and f"{blk}attn_k_b.weight" in there:
        return Change((f"{blk}attn_k_b.weight", f"{blk}attn_v_b.weight"), _keys_and_values)
    return None


def _keys_and_values(keys: Array, values: Array) -> Array:
    """Of each head [rank, nope] and [value, rank]."""
    both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
    return both.reshape(-1, both.shape[-1])


def _gpt_oss(name: str, blk: str, config: Config, there: Collection[str]) -> Change | None:
    """`GptOssModel.modify_tensors`: gate and up alternate, and weights are [in, out]."""
    gate, up, down = (f"{blk}ffn_{part}_exps" for part in ("gate", "up", "down"))
    if name.endswith("experts.gate_up_proj"):
        return Change((f"{gate}.weight", f"{up}.weight"), _alternating, each=True)
    if name.endswith("experts.down_proj"):
        return Change((f"{down}.weight",), np.transpose, each=True)
    if name.endswith("experts.gate_up_proj_bias"):
        return Change((f"{gate}.bias", f"{up}.bias"), _alternating_bias)
    if name.endswith("experts.down_proj_bias"):
        return Change((f"{down}.bias",), np.asarray)
    return None


def _alternating(gate: Array, up: Array) -> Array:
    return _alternating_bias(gate.T, up.T)


def _alternating_bias(gate: Array, up: Array) -> Array:
    return np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)


def _llama4(name: str, blk: str, config: Config, there: Collection[str]) -> Change | None:
    """`Llama4Model.modify_tensors`: weights are [in, out], gate before up."""
    gate, up, down = (f"{blk}ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
    if name.endswith("experts.gate_up_proj"):
        return Change((gate, up), _beside, each=True)
    if name.endswith("experts.down_proj"):
        return Change((down,), np.transpose, each=True)
    return None


def _beside(gate: Array, up: Array) -> Array:
    return np.concatenate([gate.T, up.T], axis=1)


def _granite(name: str, blk: str, config: Config, there: Collection[str]) -> Change | None:
    """`GraniteMoeModel.modify_tensors` splits gate and up."""
    for inner, part, each in (("block_sparse_moe", "exps", True), ("shared_mlp", "shexp", False)):
        if name.endswith(f"{inner}.input_linear.weight"):
            gate, up = f"{blk}ffn_gate_{part}.weight", f"{blk}ffn_up_{part}.weight"
            return Change((gate, up), _below, each=each)
        if name.endswith(f"{inner}.output_linear.weight"):
            return Change((f"{blk}ffn_down_{part}.weight",), np.asarray, each=each)
    return None


def _below(gate: Array, up: Array) -> Array:
    return np.concatenate([gate, up])


def _qwen3_next(name: str, blk: str, config: Config, there: Collection[str]) -> Change | None:
    """`Qwen3NextModel.modify_tensors`."""
    if name.endswith(".A_log"):
        return Change(("",), _logarithm)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return Change(("",), lambda values: values - np.float32(1))
    if name.endswith("in_proj_qkvz.weight"):
        parts = (f"{blk}attn_qkv.weight", f"{blk}attn_gate.weight")
        return Change(parts, partial(_by_key_head, config=config))
    return None


def _logarithm(values: Array) -> Array:
    """Stored is -exp of it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(-values)


def _by_key_head(qkv: Array, gate: Array, config: Config) -> Array:
    """All queries, keys, values | gates -> those of a key head together."""
    heads, width = config["linear_num_key_heads"], qkv.shape[-1]
    keys = heads * config["linear_key_head_dim"]
    pieces = [*np.split(qkv, [keys, 2 * keys]), gate]
    return np.concatenate([p.reshape(heads, -1, width) for p in pieces], axis=1).reshape(-1, width)


def _qwen35(name: str, blk: str, config: Config, there: Collection[str]) -> Change | None:
    """`_LinearAttentionVReorderBase.modify_tensors`: value heads of one key head apart."""
    change = _qwen3_next(name, blk, config, there)
    keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    back = partial(
        _grouped, heads=config["linear_num_key_heads"], per=config["linear_num_value_heads"]
    )
    if name.endswith(".A_log"):
        return Change(("",), lambda values: _logarithm(back(values)))
    if change is not None:
        return change
    if ".in_proj_qkv." in name or ".conv1d." in name:
        return Change(("",), lambda values: np.concatenate([values[:keys], back(values[keys:])]))
    if ".out_proj." in name:
        return Change(("",), lambda values: back(values.T).T)
    if re.search(r"\.in_proj_[zab]\.|\.dt_bias$", name):
        return Change(("",), back)
    return None


def _grouped(values: Array, heads: int, per: int) -> Array:
    """Rows of value heads, [value head of a key head, key head, ...] -> the other way round."""
    its = values.reshape(per // heads, heads, values.shape[0] // per, *values.shape[1:])
    return its.swapaxes(0, 1).reshape(values.shape)


_RULES: Mapping[str, Callable[[str, str, Config, Collection[str]], Change | None]] = {
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
    "llama4": _llama4,
    "granitemoe": _granite,
    "qwen3next": _qwen3_next,
    "qwen35moe": _qwen35,
}
