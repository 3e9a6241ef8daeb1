"""Tasks of lm-eval: scored by it where it is installed, and a clear word where it is not."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from moebound.errors import BackendUnavailable, TaskError
from moebound.evaluate.loading import load
from moebound.tasks import get_task
from moebound.tasks.lm_eval import Metric, metrics, run_lm_eval


def test_without_it_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BackendUnavailable, match=r"pip install '\.\[lm-eval\]'"):
        run_lm_eval(None, None, "lm-eval:hellaswag")


def test_its_results_are_read() -> None:
    found = metrics(
        {"gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5,
                   "exact_match_stderr,strict-match": 0.1, "word_perplexity,none": 12.0,
                   "word_perplexity_stderr,none": "N/A", "sample_len": 3}}
    )  # fmt: skip
    assert found == [
        Metric("gsm8k", "exact_match (strict-match)", 0.5, 0.1),
        Metric("gsm8k", "word_perplexity", 12.0, None),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own, and those of what it loads
def test_it_scores_the_model_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="pip install '.[lm-eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    problems = get_task("wordmath").problems(5)
    rows = [{"question": p.prompt, "choices": [p.reference, "Ava Ava Ava"], "gold": int(n == 3)}
            for n, p in enumerate(problems)]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "coins.yaml").write_text(
        f"""task: coins
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""
    )
    manager = partial(tasks.TaskManager, include_path=str(tmp_path))
    monkeypatch.setattr(tasks, "TaskManager", manager)
    loaded = load("builtin:wordmath")
    found = run_lm_eval(loaded.model, loaded.tokenizer, "lm-eval:coins", limit=4)
    [accuracy] = [metric for metric in found if metric.metric == "acc"]
    assert (accuracy.task, accuracy.value) == ("coins", 0.75)
    with pytest.raises(TaskError, match="no task of this name; similar: coins"):
        run_lm_eval(loaded.model, loaded.tokenizer, "lm-eval:coin")
