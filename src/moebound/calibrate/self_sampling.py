"""Expert-balanced self-sampling (EBSS, MoEQuant, 2505.03804, section 3.2): the model makes the text
that it is calibrated on, so that no text is needed, and no expert is left out of it.

Each sequence begins with a token that is drawn from the vocabulary, special ones left out, no token
twice before all have been drawn. `beams.py` goes on from there: beam search by the mean log
probability and by how evenly experts are used. What comes of it is kept as token ids beside the
statistics (`text.py`), and read like any other text.

Deviations and choices. The paper's figure writes E/(E-1) under σ's root and takes the largest at
the end, which contradicts what it minimizes: here σ is the standard deviation, and the smallest is
taken. Usage counts relative to its mean, so that σ means the same with 8 experts and with 128. σ
is that of the tokens that the model has read, all but the candidate's own, whose experts only
another pass would tell. How many candidates a beam has is not stated: 50 here. 4 beams are those
of the released script, which searches by probability alone, from 3 to 6 tokens of greedy text. A
text that reaches an end mark ends; others end with `length` tokens.

Sequences are made some at a time, so that keys and values are of 8192 tokens at most, or of one
sequence's beams. What is finished is on disk; a run that was interrupted goes on behind it, and as
the same sequences are made together again, the text is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moebound.calibrate.beams import Search, beam_search
from moebound.calibrate.text import WINDOW, Text, read_text, save_text
from moebound.errors import MoeboundError
from moebound.evaluate.loading import Loaded
from moebound.model.fingerprint import of_corners
from moebound.model.live import live_experts
from moebound.text.encoding import encode, n_embeddings
from moebound.text.generation import end_tokens, n_positions

KEPT = "text.json"
"""Beside the statistics."""
SEQUENCES = 128
HELD_TOKENS = 8192
"""Of all beams of the sequences that are made together."""
MOST_SEQUENCES = 16


@dataclass(frozen=True)
class Sampling:
    """n_sequences: of the text. seed: of the tokens that they begin with."""

    n_sequences: int = SEQUENCES
    seed: int = 0
    search: Search = field(default_factory=lambda: Search(WINDOW))

    @property
    def name(self) -> str:
        """Of the text."""
        search = self.search
        return f"self-sampled ({search.beams} beams, tau {search.tau:g}, seed {self.seed})"


def length_of(loaded: Loaded, window: int | None = None) -> int:
    """Tokens of a sequence. Raises MoeboundError for more than the model has positions for."""
    positions = n_positions(loaded.model)
    if window is not None and positions is not None and window > positions:
        raise MoeboundError(f"--window {window}: the model has positions for {positions} tokens")
    return min(WINDOW, positions or WINDOW) if window is None else window


def self_sample(
    loaded: Loaded,
    sampling: Sampling,
    out: Path,
    say: Callable[[str, int, int], None] = lambda *_: None,
) -> Text:
    """The text, which is kept in the folder `out`; if it is there already, what was kept.

    say: called with what is done, sequences made, and sequences in all. Raises MoeboundError for a
    folder that keeps another text, and as `beam_search`.
    """
    begins, ends = beginnings(loaded, sampling), end_tokens(loaded.model, loaded.tokenizer)
    path, n = out / KEPT, sampling.n_sequences
    about = {
        "model": loaded.source.name,
        "fingerprint": of_corners(live_experts(loaded.model)),
        "sampling": asdict(sampling),
    }
    rows = _kept(path, about)
    out.mkdir(parents=True, exist_ok=True)
    search = sampling.search
    some = min(max(HELD_TOKENS // (search.beams * search.length), 1), MOST_SEQUENCES)
    while len(rows) < n:
        at = len(rows)
        rows += beam_search(
            loaded.model, begins[at : at + some], search, ends,
            lambda done, at=at: say("sampling", at + done, n),  # type: ignore[misc]
        )  # fmt: skip
        save_text(Text(sampling.name, tuple(rows)), path, loaded.tokenizer, about)
    return Text(sampling.name, tuple(rows))


def beginnings(loaded: Loaded, sampling: Sampling) -> list[list[int]]:
    """What the sequences begin with: a token that was drawn, behind what the tokenizer has any
    text begin with. Raises MoeboundError for sequences without room behind it."""
    tokenizer = loaded.tokenizer
    special = set(tokenizer.all_special_ids)
    front = encode(tokenizer, "a")[:1]
    front = [token for token in front if token == tokenizer.bos_token_id]
    if sampling.search.length <= len(front) + 1:
        raise MoeboundError(
            f"--window {sampling.search.length}: a sequence begins with {len(front) + 1} tokens; "
            "expected more than these"
        )
    known = min(len(tokenizer), n_embeddings(loaded.model))
    drawn = [token for token in range(known) if token not in special]
    rng, found = np.random.default_rng(sampling.seed), list[int]()
    while len(found) < sampling.n_sequences:
        found += rng.permutation(drawn).tolist()
    return [[*front, token] for token in found[: sampling.n_sequences]]


def _kept(path: Path, about: dict[str, Any]) -> list[tuple[int, ...]]:
    if not path.is_file():
        return []
    text, content = read_text(path)
    for name, wanted in about.items():
        if content.get(name) != wanted:
            raise MoeboundError(
                f"{path}: of another run ({name} is {content.get(name)!r}, asked is {wanted!r}); "
                "give another folder, or remove this one"
            )
    return list(text.rows)
