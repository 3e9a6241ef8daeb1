"""Tokenizers of the three kinds that models come with, small enough to be made in a test."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ("Eli has 42 coins. Ava gives 17 to Eli.", "the cat sat on the mat", "ein Käse für 3 €")
END = "</s>"


def byte_level() -> Any:
    """As of GPT-2, Qwen and Llama 3: tokens are bytes, spaces are in tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer)


def byte_fallback() -> Any:
    """As of Mixtral and Llama 2: words with their space, bytes for what is in no word, and the
    first space of a text left out."""
    words = ["▁the", "▁cat", "▁", "a", "s", "t", ".", "▁é", "x"]
    vocabulary = [END, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(vocabulary)},
            merges=[], byte_fallback=True, unk_token=END,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )  # fmt: skip
    tokenizer.add_special_tokens([END])
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> Any:
    wrapper: Any = PreTrainedTokenizerFast  # which has no types
    return wrapper(tokenizer_object=tokenizer, eos_token=END)
