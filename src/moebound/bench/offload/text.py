"""The token ids that all runs read: drawn ones, or the problems of a task."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moebound.types import Array


def drawn_ids(vocab: int, n: int) -> Array:
    """n tokens without meaning: for a model that has none either."""
    return np.random.default_rng(1).integers(0, vocab, n)


def task_ids(model: Path, task: str, n: int) -> Array:
    """n tokens of the problems of a task and their solutions, one after the other, from the
    beginning again where they end. Every run reads the same, whatever it would say itself.

    Raises TaskError for a task without solutions, MoeboundError for one that cannot be read.
    """
    from moebound.evaluate.prompting import encode_prompts, encode_references
    from moebound.model.pretrained import load_tokenizer
    from moebound.tasks import get_task

    asked = get_task(task)
    tokenizer = load_tokenizer(model)
    problems = asked.problems(n)  # a problem has at least one token
    texts = zip(
        encode_prompts(tokenizer, asked, problems),
        encode_references(tokenizer, asked, problems),
        strict=True,
    )
    ids = [token for prompt, solution in texts for token in (*prompt, *solution)]
    return np.resize(np.array(ids, np.int64), n)
