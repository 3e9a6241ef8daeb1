"""Tokenizers of GGUF files: text is split as `tokenizer.ggml.pre` says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moebound.checkpoint.gguf_header import read_header
from moebound.checkpoint.gguf_tokenizer import write_tokenizer
from moebound.errors import CheckpointError

gguf = pytest.importorskip("gguf")

TEXT = "1111111 a aa!! a\n\n 中11中aa'LL"
MERGES = ["1 1", "11 11", "Ġ a", "a a", "! !", "ä ¸", "ä¸ Ń", "ä¸Ń 1", "Ċ Ċ", "Ċ Ġ", "' L"]
PIECES = {
    "deepseek-v3": ["111", "111", "1", "Ġa", "Ġaa", "!!", "Ġa", "ĊĊ", "Ġ", "ä¸Ń", "11", "ä¸Ń",
                    "aa", "'LL"],
    "deepseek-llm": ["1111111", "Ġa", "Ġaa", "!!", "Ġa", "Ċ", "Ċ", "Ġ", "ä¸Ń", "11", "ä¸Ń", "aa",
                     "'", "LL"],
    "kimi-k2": ["111", "111", "1", "Ġa", "Ġaa", "!!", "Ġa", "ĊĊ", "Ġ", "ä¸Ń", "11", "ä¸Ń",
                "aa'LL"],
    "glm4": ["111", "111", "1", "Ġa", "Ġaa", "!!", "Ġa", "ĊĊ", "Ġä¸Ń", "11", "ä¸Ńaa", "'LL"],
    "hunyuan": [*"1111111", "Ġa", "Ġaa", "!!", "Ġa", "ĊĊ", "Ġä¸Ń", "1", "1", "ä¸Ńaa", "'LL"],
    "refact": [*"1111111", "Ġa", "Ġaa", "!!", "Ġa", "ĊĊ", "Ġä¸Ń", "1", "1", "ä¸Ńaa", "'",
               "LL"],
    "olmo": ["1111111", "Ġa", "Ġaa", "!!", "Ġa", "ĊĊ", "Ġä¸Ń", "11", "ä¸Ńaa", "'", "LL"],
}  # fmt: skip


def vocabulary(file: Path, pre: str, arch: str = "llama") -> Path:
    tokens = [*bytes_to_unicode().values()]  # type: ignore[no-untyped-call]
    tokens += [*(merge.replace(" ", "") for merge in MERGES), "<end>"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_head_count(1)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tokenizer_of(file: Path, folder: Path) -> Any:
    write_tokenizer(read_header(gguf, [file]), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("pre", PIECES)
def test_splits(pre: str, tmp_path: Path) -> None:
    file = vocabulary(tmp_path / "m.gguf", pre, "deepseek2")
    found = tokenizer_of(file, tmp_path / "made").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in found.pre_tokenize_str(TEXT)] == PIECES[pre]


@pytest.mark.parametrize("pre", [*PIECES, "qwen2", "qwen35", "gpt-4o", "llama-bpe"])
def test_llama_cpp_makes_the_same_tokens(pre: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    file = vocabulary(tmp_path / "m.gguf", pre)
    engine = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    wanted = engine.tokenize(TEXT.encode(), add_bos=False)
    found = tokenizer_of(file, tmp_path / "made")(TEXT, add_special_tokens=False)
    assert found["input_ids"] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek-llm", "refact"])
def test_published_vocabularies(name: str, tmp_path: Path) -> None:
    """llama.cpp's own test data: texts, and what the models' own tokenizers make of them."""
    root = os.environ.get("LLAMA_CPP")
    if not root:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    file = Path(root) / "models" / f"ggml-vocab-{name}.gguf"
    tokenizer = tokenizer_of(file, tmp_path / "made")
    texts = file.with_name(f"{file.name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    wanted = file.with_name(f"{file.name}.out").read_text().splitlines()
    for text, ids in zip(texts, wanted, strict=False):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == [int(one) for one in ids.split()], text


def test_a_way_to_split_that_is_not_known(tmp_path: Path) -> None:
    file = vocabulary(tmp_path / "m.gguf", "of-tomorrow")
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre is 'of-tomorrow'"):
        write_tokenizer(read_header(gguf, [file]), tmp_path / "made")
