"""The tokenizer of a GGUF file, converted by transformers.

transformers converts it whatever the model is, but asks for an architecture that it knows; so it
gets a file that has the tokenizer alone. How text is split before byte pairs are merged, a file
says by a name only (`tokenizer.ggml.pre`). For names that transformers does not know, `_SPLITS` has
the expressions of the models' published tokenizers; a name that is in neither is an error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebound.checkpoint.gguf_header import Header
from moebound.errors import CheckpointError, MoeboundError

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_THREE_DIGITS = (rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",)
_ONE_DIGIT = (rf"{_ENDINGS}|{_LETTERS}|\p{{N}}|{_REST}",)
_DIGITS_APART = (r"\p{N}", _GPT2)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

_SPLITS: Mapping[str, tuple[str, ...]] = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        r"[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ),
    "kimi-k2": (
        r"\p{Han}+"
        rf"|{_BEFORE}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDINGS}?"
        rf"|\p{{N}}{{1,3}}|{_REST}",
    ),
    "glm4": _THREE_DIGITS,
    "chatglm-bpe": _THREE_DIGITS,
    "hunyuan": _ONE_DIGIT,
    "refact": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "smollm": _DIGITS_APART,
}
_AS_GPT2 = ("gpt-2", "olmo", "default", None)
"""What transformers leaves as GPT-2's splits, and is so."""


def write_tokenizer(header: Header, folder: Path) -> None:
    """Convert it, and save it to a folder. Raises CheckpointError where transformers cannot."""
    from transformers import AutoTokenizer

    kind = header.value("tokenizer.ggml.model")
    # Phi's spaces differ from other sentencepiece models', which only its architecture says.
    arch = "phi3" if header.arch == "phimoe" else "llama"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _write_alone(header, Path(scratch) / "tokenizer.gguf", arch)
            made = AutoTokenizer.from_pretrained(
                scratch, gguf_file="tokenizer.gguf", trust_remote_code=False
            )
        if kind == "gpt2":
            _split(header, made)
        made.save_pretrained(folder)
    except MoeboundError:
        raise
    except Exception as error:  # transformers raises what its converters do
        raise CheckpointError(
            f"{header.file}: transformers cannot convert its tokenizer: {error} "
            f"({type(error).__name__})"
        ) from error


def _write_alone(header: Header, file: Path, arch: str) -> None:
    """A file with the tokenizer, and what transformers makes a config of."""
    gguf = header.gguf
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(1)
    writer.add_head_count(1)
    for name, field in header.readers[0].fields.items():
        if name.startswith("tokenizer."):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, header.value(name), field.types[0], sub_type=sub)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _split(header: Header, tokenizer: Any) -> None:
    from tokenizers import Regex, pre_tokenizers

    name = header.value("tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if name in _SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(one), "isolated") for one in _SPLITS[name]),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and name not in _AS_GPT2:
        raise CheckpointError(
            f"{header.file}: tokenizer.ggml.pre is {name!r}, a way to split text that is not known "
            "here; compress the model's own checkpoint"
        )
