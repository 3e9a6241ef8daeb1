"""Rotary embeddings that a GGUF file describes, as `rope_parameters` of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moebound.checkpoint.gguf_header import Header
from moebound.types import Array

Parameters = dict[str, Any]


def rope_of(header: Header, known: Mapping[str, Any], dims: int, width: int) -> Parameters:
    """known: the parameters that the family's config has by default. dims: how many of a head's
    `width` dimensions rotate.

    Raises UnsupportedArchitectureError for what no config says, CheckpointError for a key that is
    missing.
    """
    found: Parameters = {"rope_theta": header.get("rope.freq_base", 10000.0)}
    if dims != width and header.arch != "deepseek2":
        found["partial_rotary_factor"] = dims / width
    elif "partial_rotary_factor" in known:
        found["partial_rotary_factor"] = 1.0
    kind = header.get("rope.scaling.type")
    factor = header.get("rope.scaling.factor", 0.0)
    if kind is None and factor not in (0.0, 1.0):
        kind = "linear"  # as llama.cpp takes it
    if header.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise header.refuse("YaRN of another rope.scaling.yarn_ext_factor than 1")
    tables = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    tables &= header.tensors.keys()
    if "rope_freqs.weight" in tables and kind in (None, "none"):
        return found | _llama3(header, found["rope_theta"], dims)
    if tables == {"rope_factors_long.weight", "rope_factors_short.weight"} and (
        header.arch == "phimoe"
    ):
        return found | _longrope(header)
    if tables:
        raise header.refuse(f"rotary embeddings scaled by a tensor ({', '.join(sorted(tables))})")
    if kind in (None, "none"):
        return found | {"rope_type": "default"}
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": header.need("rope.scaling.factor")}
    if kind == "yarn":
        return found | _yarn(header, known)
    raise header.refuse(f"rotary embeddings scaled as {kind!r}")


def _yarn(header: Header, known: Mapping[str, Any]) -> Parameters:
    """Whether the ramp's ends are rounded (`truncate`), files do not say: the family's default."""
    found: Parameters = {
        "rope_type": "yarn",
        "factor": header.need("rope.scaling.factor"),
        "original_max_position_embeddings": header.need("rope.scaling.original_context_length"),
    }
    if "truncate" in known:
        found["truncate"] = known["truncate"]
    for key, name in (
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
        ("rope.scaling.yarn_attn_factor", "attention_factor"),
    ):
        if (value := header.get(key)) is not None:
            found[name] = value
    return found


def _table(header: Header, name: str) -> Array:
    tensor = header.tensors[name][1]
    values: Array = header.gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.astype(np.float64).reshape(-1)


def _longrope(header: Header) -> Parameters:
    """`Phi3MiniModel.generate_extra_tensors`. One factor of attention, for short and long texts."""
    scale = header.get("rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "longrope",
        "long_factor": _table(header, "rope_factors_long.weight").tolist(),
        "short_factor": _table(header, "rope_factors_short.weight").tolist(),
        "long_mscale": scale,
        "short_mscale": scale,
        "original_max_position_embeddings": header.need("rope.scaling.original_context_length"),
    }


def _llama3(header: Header, theta: float, dims: int) -> Parameters:
    """Llama 3's four numbers, of the divisor of each frequency that
    `LlamaModel.generate_extra_tensors` writes.

    Divisors are 1 for short waves, `factor` for long ones, and 1 / ((1 - s) / factor + s) between,
    where s = (context / wave - low) / (high - low). One of the three may be chosen: multiplied by
    the same number they give the same. Raises UnsupportedArchitectureError where other numbers made
    the divisors.
    """
    divisors = _table(header, "rope_freqs.weight")
    waves = 2 * math.pi * theta ** (np.arange(0, dims, 2) / dims)
    factor = float(divisors.max(initial=1.0))
    if np.all(divisors == 1.0):
        return {"rope_type": "default"}
    smooth = np.flatnonzero((divisors > 1.0) & (divisors < factor * (1 - 1e-6)))
    parts = (1 / divisors[smooth] - 1 / factor) / (1 - 1 / factor)
    low, high = 1.0, 4.0  # as in Llama 3, where fewer than two waves are between
    if len(smooth) > 1:
        slope, offset = np.polyfit(1 / waves[smooth], parts, 1)
        high, context = (1.0 - offset) / -offset, slope / -offset
    elif len(smooth) == 1:
        context = float(waves[smooth[0]] * (low + parts[0] * (high - low)))
    else:  # one step
        high, context = low, math.sqrt(waves[divisors == 1.0].max() * waves[divisors > 1.0].min())
    found = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": _whole(high),
        "original_max_position_embeddings": round(context),
    }
    if len(divisors) != len(waves) or not np.allclose(
        _divisors(waves, found), divisors, rtol=1e-5, atol=0
    ):
        raise header.refuse("rotary embeddings scaled by a tensor (rope_freqs) in another way than "
                            "Llama 3's")  # fmt: skip
    return found


def _whole(value: float) -> float:
    """A number that a fit missed by its rounding."""
    return float(round(value)) if abs(value - round(value)) < 1e-3 else value


def _divisors(waves: Array, found: Parameters) -> Array:
    context, factor = found["original_max_position_embeddings"], found["factor"]
    low, high = found["low_freq_factor"], found["high_freq_factor"]
    span = (high - low) or 1.0
    parts = np.clip((context / waves - low) / span, 0.0, 1.0)
    between: Array = 1 / ((1 - parts) / factor + parts)
    result: Array = np.where(
        waves < context / high, 1.0, np.where(waves > context / low, factor, between)
    )
    return result
