"""The stored baseline gives what comparing whole distributions gives."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moebound.errors import TaskError
from moebound.evaluate.fidelity import Baseline, logits_of
from moebound.evaluate.loading import Loaded
from moebound.evaluate.perplexity import perplexity
from moebound.evaluate.text import answered_rows, batches, pad, solved_rows
from moebound.score import Score
from moebound.tasks import get_task


@pytest.fixture(scope="module")
def changed(loaded: Loaded) -> Loaded:
    model = copy.deepcopy(loaded.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.9.mlp.experts" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Loaded(model, loaded.tokenizer, loaded.source)


def test_a_comparison_in_parts_is_that_of_the_whole(loaded: Loaded, changed: Loaded) -> None:
    task = get_task("wordmath")
    rows = solved_rows(loaded.tokenizer, task, task.problems(9))
    batch = pad(rows, 0)
    p, q = (
        logits_of(one.model, batch)[:, :-1].double().log_softmax(-1) for one in (loaded, changed)
    )
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    right = (q.argmax(-1) == batch.input_ids[:, 1:]) | ~batch.answers
    of_prompts = [float(row[mask].mean()) for row, mask in zip(kl, batch.answers, strict=True)]
    baseline = Baseline.of(loaded.model, rows)
    found = baseline.compare(changed.model)
    assert found.exact
    each, reproduced = zip(*found.per_problem, strict=True)
    assert reproduced == tuple(right.all(dim=1).tolist())
    assert found.kl_nats == pytest.approx(float(kl[batch.predicts].mean()), rel=1e-4)
    assert found.answer_kl_nats == pytest.approx(float(kl[batch.answers].mean()), rel=1e-4)
    assert each == pytest.approx(of_prompts, rel=1e-3)
    assert found.top1_agreement == pytest.approx(float(agree[batch.predicts].mean()))
    assert found.answer_kl_nats > 0
    same = baseline.compare(loaded.model)
    assert same.kl_nats == pytest.approx(0, abs=1e-9)
    assert same.top1_agreement == same.answer_top1_agreement == 1

    # Rare tokens taken as one: never more, and nearly all of it.
    some = Baseline.of(loaded.model, rows, kept=40).compare(changed.model)
    assert not some.exact
    assert 0.8 * found.kl_nats < some.kl_nats <= found.kl_nats * (1 + 1e-4)
    assert some.top1_agreement == found.top1_agreement


def test_a_broken_model_is_infinitely_far(loaded: Loaded) -> None:
    task = get_task("wordmath")
    rows = solved_rows(loaded.tokenizer, task, task.problems(2))
    baseline = Baseline.of(loaded.model, rows)
    broken = copy.deepcopy(loaded.model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    found = baseline.compare(broken)
    assert found.kl_nats == found.answer_kl_nats == math.inf
    assert math.isnan(found.kl_stderr)
    assert found.top1_agreement == found.reproduced == 0
    assert found.to_json()["kl_nats"] is None


def test_batches_hold_each_row_once_and_their_limit() -> None:
    rows = [([1] * n, [2]) for n in (5, 1, 9, 3, 3)]
    found = list(batches(rows, 12))
    assert sorted(index for batch in found for index in batch) == list(range(5))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(len(rows[i][0]) + 1 for i in batch) <= 12


def test_own_answers_serve_where_there_is_no_reference(loaded: Loaded) -> None:
    task = get_task("wordmath")
    problems = task.problems(2)
    [(prompt, solution), _] = answered_rows(loaded.tokenizer, task, problems, ["1 = 1", "2"])
    assert loaded.tokenizer.decode(list(solution[:-1])).strip() == "1 = 1"
    assert prompt
    with pytest.raises(TaskError, match="2 problems, but 1"):
        answered_rows(loaded.tokenizer, task, problems, ["1"])


def test_perplexity_counts_each_token_once(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(" ".join(p.prompt for p in get_task("wordmath").problems(6)), encoding="utf-8")
    ids = loaded.tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    whole = perplexity(loaded, path)
    assert whole.n_tokens == len(ids) - 1
    with torch.inference_mode():
        loss = loaded.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert whole.nats == pytest.approx(float(loss), rel=1e-4)
    assert whole.value == pytest.approx(math.exp(whole.nats))
    seen: list[int] = []
    parts = perplexity(loaded, path, length=20, progress=lambda n, of: seen.append(n))
    assert parts.n_tokens == whole.n_tokens
    assert seen[-1] == len(ids)
    assert perplexity(loaded, path, limit=11).n_tokens == 10
    path.write_bytes(b"\xff")
    with pytest.raises(TaskError, match="cannot be read as text"):
        perplexity(loaded, path)


class Says:
    """A model whose distributions are given: [rows, T - 1, vocabulary], shortest row first."""

    device = torch.device("cpu")

    def __init__(self, logs: torch.Tensor) -> None:
        self.logs = logs
        text = SimpleNamespace(vocab_size=logs.shape[-1])
        self.config = SimpleNamespace(get_text_config=lambda decoder: text)

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        last = torch.zeros_like(self.logs[:, :1])  # which predicts nothing
        return SimpleNamespace(logits=torch.cat([self.logs, last], dim=1))


def compared(
    original: torch.Tensor, changed: torch.Tensor, lengths: list[int], *, answers: int
) -> Score:
    """Of rows of these many tokens (all of token 0), the last `answers` of each being the solution,
    under models that say this."""
    rows = [([0] * (length - answers), [0] * answers) for length in lengths]
    return Baseline.of(Says(original), rows).compare(Says(changed))


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_kl_is_of_the_original_from_the_compressed_in_nats() -> None:
    p, q = logs(0.5, 0.25, 0.25).expand(1, 1, 3), logs(0.25, 0.5, 0.25).expand(1, 1, 3)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert compared(p, q, [2], answers=1).kl_nats == pytest.approx(expected)


def test_kl_is_not_symmetric_and_ours_is_the_right_way_round() -> None:
    p, q = logs(1.0, 0.0).expand(1, 1, 2), logs(0.5, 0.5).expand(1, 1, 2)
    assert compared(p, q, [2], answers=1).kl_nats == pytest.approx(math.log(2))
    assert compared(q, p, [2], answers=1).kl_nats == math.inf


def test_padding_never_counts() -> None:
    p = logs(0.9, 0.1).expand(2, 3, 2)
    q = p.clone()
    q[0, 1:] = logs(0.1, 0.9)  # padding of the first row
    found = compared(p, q, [2, 4], answers=1)
    assert found.kl_nats == pytest.approx(0, abs=1e-12)
    assert found.top1_agreement == 1
    q[0, 0] = logs(0.1, 0.9)  # its one real position, of four in all
    found = compared(p, q, [2, 4], answers=1)
    one = 0.9 * math.log(9) + 0.1 * math.log(1 / 9)
    assert found.kl_nats == pytest.approx(one / 4)
    assert found.top1_agreement == pytest.approx(3 / 4)
    assert found.answer_kl_nats == pytest.approx(one / 2)


def test_reproduced_asks_for_every_token_of_the_solution() -> None:
    p = logs(0.9, 0.1).expand(2, 3, 2)
    q = p.clone()
    q[0, 0] = logs(0.1, 0.9)  # in the prompt: does not matter
    q[1, 2] = logs(0.1, 0.9)  # the last token of the solution: does
    found = compared(p, q, [4, 4], answers=2)
    assert found.reproduced == 1
    assert [right for _, right in found.per_problem] == [True, False]


def test_a_batch_covers_prompt_solution_and_end(loaded: Loaded) -> None:
    task = get_task("wordmath")
    problems = task.problems(4)
    tokenizer = loaded.tokenizer
    batch = pad(solved_rows(tokenizer, task, problems), tokenizer.pad_token_id)
    for row, problem in enumerate(problems):
        n = int(batch.attention_mask[row].sum())
        assert batch.input_ids[row, n - 1] == tokenizer.eos_token_id
        assert batch.predicts[row].sum() == n - 1
        target = batch.input_ids[row, 1:][batch.answers[row]]
        assert target[-1] == tokenizer.eos_token_id
        # What the masks select is the solution, and nothing of the prompt.
        solution = tokenizer(problem.reference, add_special_tokens=False)["input_ids"]
        assert target[:-1].tolist() == solution
