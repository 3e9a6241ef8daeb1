"""The one door to transformers' Auto classes, for every config, model and tokenizer.

transformers asks on the terminal whether it may run Python code that lies in a checkpoint, unless
it is told not to. Here it is told so, always; and its errors get words that say what can be done.

    load_model(folder, dtype="auto")
    load_tokenizer(folder)
    what_runs(checkpoint.config)     # before: whether it can be loaded at all
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moebound.checkpoint import TensorInfo, local_folder, open_checkpoint, read_tensor
from moebound.checkpoint.families import find_family
from moebound.checkpoint.gguf_source import gguf_file
from moebound.checkpoint.quantized import KNOWN
from moebound.codec.arrays import to_torch
from moebound.errors import CheckpointError, MoeboundError, UnsupportedArchitectureError
from moebound.model.quiet import without_bars

if TYPE_CHECKING:
    import torch

Source = str | os.PathLike[str]

STILL = "it can be compressed, verified and decompressed, but not run"


class Runs(NamedTuple):
    """How a model can be run. how: "offloaded", experts compressed while it runs; "decoded", by
    `from_pretrained` only, with all experts decoded; "no". why: of the two latter, in words."""

    how: Literal["offloaded", "decoded", "no"]
    why: str = ""


def what_runs(config: Mapping[str, Any]) -> Runs:
    """By a config.json of a family that is known here, in the installed transformers."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    named = f"transformers {transformers.__version__}"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            return Runs("no", f"{named} has model_type {model_type!r} only as code in the "
                              f"checkpoint (auto_map), which is never run: {STILL}")  # fmt: skip
        return Runs("no", f"{named} does not know model_type {model_type!r}: {STILL}")
    if _auto_class(CONFIG_MAPPING[model_type]) is None:
        return Runs("no", f"{named} has no class that makes text with model_type {model_type!r}: "
                          f"{STILL}")  # fmt: skip
    if not find_family(config).experts_functions:
        return Runs("decoded", f"model_type {model_type!r} does not use transformers' experts "
                               "functions, so its experts cannot be loaded on demand; "
                               "from_pretrained decodes all of them")  # fmt: skip
    return Runs("offloaded")


def read_config(src: Source, **options: Any) -> Any:
    """A checkpoint's config, as transformers has it. Raises as `load_model`."""
    from transformers import AutoConfig

    with _in_words(src, "a model"):
        return AutoConfig.from_pretrained(
            _folder(src), trust_remote_code=False, **_local(src), **options
        )


def load_model(
    src: Source,
    *,
    config: Any = None,
    weights: Mapping[str, TensorInfo] | None = None,
    **options: Any,
) -> Any:
    """The language model in `src`, in evaluation mode; a multimodal one with its other parts.

    config: what `read_config` gave, maybe changed. options: of `from_pretrained`. The weights of a
    quantized checkpoint are those that `compress` compresses (`checkpoint/quantized.py`); `weights`
    are some of them, where the others are not wanted. Raises
    CheckpointError for what transformers cannot load, UnsupportedArchitectureError where it has no
    class for it, and what loading a damaged store raises.
    """
    from transformers import GenerationConfig

    config = read_config(src) if config is None else config
    auto = _auto_class(type(config))
    if auto is None:
        raise UnsupportedArchitectureError(f"{src}: {what_runs(config.to_dict()).why}")
    found = _dequantized(src, config) if weights is None else _unread(weights)
    with _in_words(src, "a language model"), without_bars():
        if found is None:
            model = auto.from_pretrained(
                src, config=config, trust_remote_code=False, **_local(src), **options
            )
        else:
            # Auto classes take no weights without a path.
            model_class = auto._model_mapping[type(config)]
            model = model_class.from_pretrained(None, config=config, state_dict=found, **options)
            if (local_folder(src) / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(local_folder(src))
    model.train(False)
    return model


def load_tokenizer(src: Source) -> Any:
    """Raises CheckpointError for one that cannot be loaded."""
    from transformers import AutoTokenizer

    with _in_words(src, "a tokenizer"):
        return AutoTokenizer.from_pretrained(_folder(src), trust_remote_code=False, **_local(src))


def empty_model(config: Any, name: str) -> Any:
    """The model of a config, all of it on `meta`: names and shapes. name: for messages. Raises
    UnsupportedArchitectureError where transformers has no class for it."""
    import torch

    auto = _auto_class(type(config))
    if auto is None:
        raise UnsupportedArchitectureError(f"{name}: {what_runs(config.to_dict()).why}")
    with _in_words(name, "a language model"), torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False)


def _dequantized(src: Source, config: Any) -> dict[str, Any] | None:
    """The weights of a quantized checkpoint, by name, read when transformers takes them; `config`
    no longer says that they are quantized. None for any other model."""
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in KNOWN and gguf_file(Path(src)) is None:
        return None
    checkpoint = open_checkpoint(src)
    if checkpoint.stored_as is None:
        return None
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return _unread(checkpoint.tensors)


def _unread(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {name: _Unread(tensor) for name, tensor in tensors.items()}


class _Unread:
    """A tensor that is read when it is sliced, as those of safetensors are."""

    def __init__(self, tensor: TensorInfo) -> None:
        self._tensor = tensor

    def get_dtype(self) -> str:
        return self._tensor.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return to_torch(read_tensor(self._tensor))[index]


def _folder(src: Source) -> Source:
    """Where config and tokenizer are: `src`, but of a GGUF file the folder made of its metadata."""
    return src if gguf_file(Path(src)) is None else local_folder(src)


def _local(src: Source) -> dict[str, bool]:
    return {"local_files_only": True} if Path(src).exists() else {}


def _auto_class(config_class: Any) -> Any:
    """The Auto class that has a model for it, whose outputs are the scores of the next token."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if config_class not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config_class.model_type, "")
    # These fill in masked blocks of tokens instead.
    return None if str(name).endswith("BlockDiffusion") else AutoModelForImageTextToText


@contextmanager
def _in_words(src: Source, what: str) -> Iterator[None]:
    """Errors of transformers and what it uses, which may be any, as CheckpointError. A pipe or
    device, at which transformers would wait for ever, is one before."""
    try:
        for file in Path(src).iterdir() if Path(src).is_dir() else ():
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise CheckpointError(f"{file}: expected an ordinary file, found a pipe or device")
        yield
    except (MoeboundError, *_NOT_ERRORS):
        raise
    except BaseException as error:
        there = "" if Path(src).exists() else "no local folder of this name, and from the hub it "
        raise CheckpointError(
            f"{src}: {there}cannot be loaded as {what}: {_reason(error)}"
        ) from error


@contextmanager
def named(what: str) -> Iterator[None]:
    """Whatever a tokenizer raises inside, as CheckpointError: `tokenizers` raises bare Exception
    for a text that it has no token for, and panics are BaseExceptions."""
    try:
        yield
    except (MoeboundError, *_NOT_ERRORS):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


_NOT_ERRORS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text:
        return f"that takes Python code which lies in the checkpoint and is never run: {STILL}"
    if isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}"
