"""The tokenizer of the built-in model: whole words, with digits and punctuation apart.

A word keeps the space before it (`▁apples`), a digit or a mark that follows without a space does
not, so text comes back exactly as it went in: `= 25. \\boxed{25}` is read by the same regular
expressions before and after. Numbers are spelled in digits: `▁2 5`.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from moebound.wordmath.draw import NAMES, PLACES, THINGS
from moebound.wordmath.formats import FORMATS
from moebound.wordmath.problems import LEVELS, train_problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "<bos>", "<ans>", "<eos>", "<unk>")
PAD, BOS, ANS, EOS, UNK = range(5)

CHAT_TEMPLATE = (
    "{% if messages | length != 1 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('this model answers single questions: expected one message, of a user') }}"
    "{% endif %}"
    "{{ '<bos>' + messages[0]['content'] }}{% if add_generation_prompt %}{{ '<ans>' }}{% endif %}"
)
"""A chat is one question: its tokens are those of the question by itself."""

# One digit, or one closing mark, is a token; a digit takes the space before it along.
_APART = "▁?[0-9]|[.,?:}]"
_SAMPLES = 6000


def split_words(text: str) -> list[str]:
    """The tokens of a text, as the tokenizer makes them."""
    spaced = "▁" + text.replace(" ", "▁")
    words = re.findall("▁?[^▁]+", spaced)
    return [token for word in words for token in re.split(f"({_APART})", word) if token]


def vocabulary() -> dict[str, int]:
    """Every token of every problem of both levels. Deterministic.

    Words are collected from many training problems; pools and wordings, of which test problems
    have more, are added whole.
    """
    rng = random.Random("moebound/vocabulary")
    words: set[str] = set()
    for level in LEVELS:
        for _ in range(_SAMPLES):
            problem = train_problem(rng, level)
            words.update(split_words(problem.prompt), split_words(problem.reference))
    for pool in (NAMES, PLACES, THINGS):
        words.update(f"▁{word}" for word in pool)
    for format_ in FORMATS.values():
        for wording in format_.train + format_.test:
            words.update(split_words(wording))
    words.update(digit for d in range(10) for digit in (str(d), f"▁{d}"))
    return {word: index for index, word in enumerate([*SPECIAL, *sorted(words)])}


def build_tokenizer() -> Tokenizer:
    """The tokenizer, of the `tokenizers` library. A prompt gets <bos> before and <ans> behind."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(_APART), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <ans>", special_tokens=[("<bos>", BOS), ("<ans>", ANS)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
