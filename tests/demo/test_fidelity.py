"""The right KL, over the right positions."""

from __future__ import annotations

import math

import pytest
import torch

from moebound.demo.fidelity import compare
from moebound.demo.models import load_tokenizer
from moebound.demo.prompts import Batch, Sample, make_batch, read_samples
from moebound.errors import CheckpointError
from moebound.wordmath.builtin import resolve


def batch_of(lengths: list[int], answers: int) -> Batch:
    """Rows of these many tokens (all of token 0), the last `answers` of each being the solution."""
    total = max(lengths)
    mask = torch.tensor([[int(t < length) for t in range(total)] for length in lengths])
    solution = torch.tensor(
        [[length - answers <= t + 1 < length for t in range(total - 1)] for length in lengths]
    )
    return Batch(torch.zeros_like(mask), mask, mask[:, 1:].bool(), solution)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_kl_is_of_the_original_from_the_compressed_in_nats() -> None:
    batch = batch_of([2], answers=1)
    p, q = logs(0.5, 0.25, 0.25).expand(1, 1, 3), logs(0.25, 0.5, 0.25).expand(1, 1, 3)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert compare(p, q, batch).kl_nats == pytest.approx(expected)
    library = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    assert compare(p, q, batch).kl_nats == pytest.approx(float(library))


def test_kl_is_not_symmetric_and_ours_is_the_right_way_round() -> None:
    batch = batch_of([2], answers=1)
    p, q = logs(1.0, 0.0).expand(1, 1, 2), logs(0.5, 0.5).expand(1, 1, 2)
    assert compare(p, q, batch).kl_nats == pytest.approx(math.log(2))
    assert compare(q, p, batch).kl_nats == math.inf


def test_padding_never_counts() -> None:
    batch = batch_of([4, 2], answers=1)
    p = logs(0.9, 0.1).expand(2, 3, 2)
    q = p.clone()
    q[1, 1:] = logs(0.1, 0.9)  # padding of the second row
    found = compare(p, q, batch)
    assert found.kl_nats == 0
    assert found.top1_agreement == 1
    q[1, 0] = logs(0.1, 0.9)  # its one real position, of four in all
    found = compare(p, q, batch)
    one = 0.9 * math.log(9) + 0.1 * math.log(1 / 9)
    assert found.kl_nats == pytest.approx(one / 4)
    assert found.top1_agreement == pytest.approx(3 / 4)
    assert found.answer_kl_nats == pytest.approx(one / 2)


def test_reproduced_asks_for_every_token_of_the_solution() -> None:
    batch = batch_of([4, 4], answers=2)
    p = logs(0.9, 0.1).expand(2, 3, 2)
    q = p.clone()
    q[0, 0] = logs(0.1, 0.9)  # in the prompt: does not matter
    q[1, 2] = logs(0.1, 0.9)  # the last token of the solution: does
    found = compare(p, q, batch)
    assert found.reproduced == 1
    assert found.per_prompt == (True, False)


def test_batch_covers_prompt_solution_and_end() -> None:
    from pathlib import Path

    folder = Path(resolve("builtin:wordmath"))
    tokenizer = load_tokenizer(folder)
    samples = read_samples(folder)
    assert len(samples) == 200
    batch = make_batch([*samples[:3], Sample("Ava has 2 books.", "2 + 2 = 4.")], tokenizer)
    for row, (mask, answers) in enumerate(zip(batch.attention_mask, batch.answers, strict=True)):
        n = int(mask.sum())
        assert batch.input_ids[row, n - 1] == tokenizer.eos_token_id
        assert batch.predicts[row].sum() == n - 1
        target = batch.input_ids[row, 1:][answers]
        assert target[-1] == tokenizer.eos_token_id
    # What the masks select is the solution, and nothing of the prompt.
    assert tokenizer.decode(target[:-1]).strip() == "2 + 2 = 4."


def test_builtin_names() -> None:
    assert resolve("some/folder") == "some/folder"
    with pytest.raises(CheckpointError, match="builtin:wordmath"):
        resolve("builtin:nosuch")
