"""Load what SRC names, whatever it is: a folder, a store, a hub id, or builtin:NAME."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moebound.errors import CheckpointError, MoeboundError
from moebound.integrations.transformers.tokenizer import load_tokenizer
from moebound.model.batched import NAME as BATCHED
from moebound.model.batched import register_batched
from moebound.model.dtypes import parse_dtype
from moebound.model.fingerprint import of_parameters
from moebound.model.quiet import without_bars
from moebound.wordmath.builtin import PREFIX, resolve

SMALL_EXPERT_WEIGHTS = 1 << 20
"""Up to so many weights an expert, experts="auto" means "moebound-batched": larger experts leave
nothing to gain from it."""

Kind = Literal["builtin", "store", "checkpoint", "hub"]


@dataclass(frozen=True)
class Source:
    """What was loaded, for records. name: SRC, a folder by its last part. kind: what it is.
    dtype, experts: what it is computed with. weights: a digest of the weights as they were loaded
    (of a sample of each tensor), which tells two models of one name apart."""

    name: str
    kind: Kind
    dtype: str
    experts: str
    weights: str = ""

    def to_json(self) -> dict[str, str]:
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in evaluation mode with its tokenizer."""

    model: Any
    tokenizer: Any
    source: Source

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found


def load(
    src: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    experts: str = "auto",
) -> Loaded:
    """Load a model and its tokenizer with plain transformers.

    dtype: "float32" (exact for bf16 weights, so that no other rounding is measured than that of
    the weights), "bfloat16", "float16", or "auto" for the checkpoint's own. device: as torch
    spells it, or "auto" to spread over all there are (accelerate). experts: an implementation of
    transformers, or "auto": "moebound-batched" where experts are small, else transformers' choice.

    Runs no code from the checkpoint. Raises CheckpointError for what cannot be loaded, and what
    loading a damaged store raises.
    """
    src = os.fspath(src)
    path = resolve(src)
    parse_dtype(dtype)  # before anything is loaded
    name = Path(src).resolve().name if Path(src).exists() else src
    model = _load_model(src, path, dtype, device)
    tokenizer = load_tokenizer(path, name=src, local=Path(path).is_dir())
    chosen = _choose_experts(model, experts)
    kind = _kind(src, Path(path))
    dtype_name = str(model.dtype).removeprefix("torch.")
    source = Source(name, kind, dtype_name, chosen, of_parameters(model))
    return Loaded(model, tokenizer, source)


def _load_model(src: str, path: str, dtype: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    from moebound.integrations.transformers import register

    register()
    options: dict[str, Any] = {"dtype": parse_dtype(dtype)}
    if device != "cpu":
        options["device_map"] = device
    if Path(path).is_dir():
        options["local_files_only"] = True
    try:
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(path, **options)
    except MoeboundError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"{src}: cannot be loaded as a language model: {error}") from error
    model.train(False)
    return model


def _choose_experts(model: Any, asked: str) -> str:
    """Set the experts implementation; returns the name of the one that is in use."""
    if asked == "auto":
        asked = BATCHED if _largest_expert(model) <= SMALL_EXPERT_WEIGHTS else ""
        if not model._can_set_experts_implementation():
            asked = ""
    if asked:
        register_batched()
        try:
            model.set_experts_implementation(asked)
        except (ValueError, RuntimeError) as error:
            raise MoeboundError(f"experts implementation {asked!r}: {error}") from error
    config = model.config.get_text_config(decoder=True)
    return str(getattr(config, "_experts_implementation", None) or "its own")


def _largest_expert(model: Any) -> int:
    """Weights of the down projection of the largest expert; 0 for a dense model."""
    sizes = [
        parameter[0].numel()
        for name, parameter in model.named_parameters()
        if name.endswith("down_proj") and parameter.dim() == 3
    ]
    return max(sizes, default=0)


def _kind(src: str, path: Path) -> Kind:
    if src.startswith(PREFIX):
        return "builtin"
    if not path.is_dir():
        return "hub"
    from moebound.checkpoint.shards import read_json

    config = read_json(path / "config.json")
    settings = config.get("quantization_config")
    is_store = isinstance(settings, dict) and settings.get("quant_method") == "moebound"
    return "store" if is_store else "checkpoint"
