"""Tasks of lm-eval, the evaluation harness of EleutherAI, through its Python API.

They are asked and scored by lm-eval as a whole, few-shot prompts and all, with its own metrics:
ICA and PIA are not among them (gsm8k's strict-match and flexible-extract are something else).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moebound.errors import TaskError
from moebound.extras import unavailable

PREFIX = "lm-eval:"


@dataclass(frozen=True)
class Metric:
    """One figure. stderr: as lm-eval estimates it, None where it does not."""

    task: str
    metric: str
    value: float
    stderr: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_lm_eval(
    model: Any, tokenizer: Any, name: str, *, limit: int | None = None, batch: int = 8
) -> list[Metric]:
    """Score a loaded transformers model on a task, or a group of tasks, of lm-eval.

    name: with or without PREFIX. limit: documents of each task. The model is used as it is, so
    perturbed weights are measured; answers are never taken from lm-eval's cache, which does not
    know that weights have changed. Raises BackendUnavailable without lm-eval, TaskError for a
    task that it does not have or cannot run.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise unavailable(f"task {name!r}", "lm_eval", reason=error) from error
    name = name.removeprefix(PREFIX)
    manager = TaskManager()
    if not name or name not in manager.all_tasks:
        near = [task for task in manager.all_tasks if name and name.lower() in task.lower()][:5]
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise TaskError(f"task {PREFIX}{name}: lm-eval has no task of this name{hint}")
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=[name],
            task_manager=manager,
            limit=limit,
            apply_chat_template=bool(getattr(tokenizer, "chat_template", None)),
            use_cache=None,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except Exception as error:  # its data sets, metrics and tasks raise whatever they like
        raise TaskError(
            f"task {PREFIX}{name}: lm-eval could not run it: {type(error).__name__}: {error}"
        ) from error
    return metrics(found["results"])


def metrics(results: Mapping[str, Mapping[str, Any]]) -> list[Metric]:
    """From lm-eval's `results`: {task: {"metric,filter": value, "metric_stderr,filter": ...}}."""
    found = []
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not comma or metric.endswith("_stderr") or not is_number:
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            label = metric if chosen == "none" else f"{metric} ({chosen})"
            found.append(
                Metric(task, label, float(value), float(stderr) if known else None)  # type: ignore[arg-type]
            )
    return found
