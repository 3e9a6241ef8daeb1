"""Texts and conversations to the token ids of a model, and what can be wrong with them.

Whatever a tokenizer or a chat template raises is CheckpointError here: both are files of the
checkpoint. `generate`, `serve` and what measures answers use these functions and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moebound.errors import CheckpointError
from moebound.model.pretrained import named
from moebound.text.templates import RENDERER


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """special: with what the tokenizer adds to any text. Raises CheckpointError for a text that it
    cannot take."""
    return encode_all(tokenizer, [text], special=special)[0]


def encode_all(tokenizer: Any, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """`encode` of each."""
    if not texts:  # which tokenizers trip over
        return []
    with named("the tokenizer cannot encode a text"):
        options: dict[str, Any] = {} if special else {"add_special_tokens": False}
        return [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]


def chat_text(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, template: str | None = None
) -> str:
    """The conversation up to where the answer begins. template: in place of the tokenizer's.
    Raises CheckpointError for a template that fails or goes beyond a limit (`templates.py`)."""
    from transformers import PreTrainedTokenizerBase

    with named("the chat template refuses the messages"):
        own = getattr(type(tokenizer), "apply_chat_template", None)
        if own is PreTrainedTokenizerBase.apply_chat_template:
            return RENDERER.render(
                tokenizer.get_chat_template(template), messages, tokenizer.special_tokens_map
            )
        # A class with a way of its own: Python that is installed, no template of a checkpoint.
        options: dict[str, Any] = {} if template is None else {"chat_template": template}
        return str(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **options
            )
        )


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, template: str | None = None
) -> list[int]:
    """`chat_text`, encoded. The template brings the special tokens."""
    return encode(tokenizer, chat_text(tokenizer, messages, template=template), special=False)


def n_embeddings(model: Any) -> int:
    """Token ids that the model can read: 0 up to this, without it."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_tokens(ids: Iterable[int], model: Any, what: str) -> None:
    """Raises CheckpointError for a token id that the model has no embedding for."""
    n = n_embeddings(model)
    for token in ids:
        if not 0 <= token < n:
            raise CheckpointError(
                f"{what}: token {token}: the model has embeddings for 0 to {n - 1}; the tokenizer "
                "has tokens that the model was not resized for, or is that of another model"
            )
