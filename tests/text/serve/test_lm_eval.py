"""lm-eval's API mode against the real server: the figures of its own mode on the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moebound.evaluate.loading import Loaded
from moebound.tasks.registry import get_task

from .live import NAME, Live

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # its own, and those of what it loads
]


def write_tasks(folder: Path) -> None:
    problems = get_task("wordmath").problems(6)
    rows = [
        {"question": p.prompt, "answer": p.reference, "choices": [p.reference, "Ava Ava Ava"],
         "gold": int(n == 3)}
        for n, p in enumerate(problems)
    ]  # fmt: skip
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "<bos>{{{{question}}}}<ans>"
"""
    (folder / "likely.yaml").write_text(
        f"""task: likely
{head}output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""
    )
    (folder / "written.yaml").write_text(
        f"""task: written
{head}output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["never"], max_gen_toks: 112, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
    )


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.long), 4])
def test_both_modes_say_the_same(
    shared: Live, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    lm_eval: Any = pytest.importorskip("lm_eval", reason="pip install '.[lm-eval]'")
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    folder = tmp_path / "tokenizer"
    loaded.tokenizer.save_pretrained(folder)
    manager = TaskManager(include_path=str(tmp_path))
    options: dict[str, Any] = {
        "tasks": ["likely", "written"], "task_manager": manager, "log_samples": True,
        "bootstrap_iters": 0,
    }  # fmt: skip
    # The API mode adds no special tokens by itself, so they stand in the prompts.
    own = HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, add_bos_token=False
    )
    here = lm_eval.simple_evaluate(model=own, **options)
    there = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": NAME, "base_url": f"{shared.url}/completions", "tokenizer": str(folder),
            "num_concurrent": 1, "max_length": 256,
        },
        batch_size=batch,
        **options,
    )  # fmt: skip
    assert there["results"]["likely"]["acc,none"] == here["results"]["likely"]["acc,none"] > 0.5
    for a, b in zip(here["samples"]["likely"], there["samples"]["likely"], strict=True):
        for (ours, greedy), (theirs, also) in zip(_responses(b), _responses(a), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
            assert greedy == also
    for a, b in zip(here["samples"]["written"], there["samples"]["written"], strict=True):
        assert str(b["resps"][0][0]).strip() == str(a["resps"][0][0]).strip() != ""


def test_the_chat_mode_generates(
    shared: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval: Any = pytest.importorskip("lm_eval", reason="pip install '.[lm-eval]'")
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    path = tmp_path / "written.yaml"
    path.write_text(path.read_text().replace("<bos>", "").replace("<ans>", ""))
    found = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"model": NAME, "base_url": f"{shared.url}/chat/completions", "max_retries": 1},
        tasks=["written"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        apply_chat_template=True,
        limit=2,
        batch_size=1,
        bootstrap_iters=0,
    )
    assert found["results"]["written"]["exact_match,none"] == 1


def _responses(sample: dict[str, Any]) -> list[tuple[float, bool]]:
    return [(float(one[0][0]), str(one[0][1]) == "True") for one in sample["resps"]]
